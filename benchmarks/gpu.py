"""All GPU benchmarks at real sizes, random weights, as one command, nine minutes at a time, on one H200 or 80 GB H100.

    PYTHONPATH=. python benchmarks/gpu.py --output results/h200                 all that fits into --minutes
    PYTHONPATH=. python benchmarks/gpu.py --output results/h200 --profile       with profiles of two steps
    PYTHONPATH=. python benchmarks/gpu.py --output results/h200 --report        prints what is there, runs nothing
    PYTHONPATH=. python benchmarks/gpu.py --list                                the parts, their FLOPs and seconds
    PYTHONPATH=. python benchmarks/gpu.py --output FOLDER --reduced --device cpu      the same code, all sizes shrunk

Parts are run one after the other, the most important first, each in a process of its own with a time limit, and each
writes its own results file: what fails costs its own numbers only. A part that does not fit into the minutes left is
skipped, and says so; the same command again goes on with what is missing: all of it is about twenty minutes. In the end
one table, the ratios with their aims, and what each variant changes are printed, and kept as summary.json and
summary.txt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import chosen, parse_device
from gpu_changes import changes
from gpu_plan import Part, parts
from gpu_report import rate_of, ratios, rows, text
from gpu_run import Runs, command, run

from stitchvm.results import records_to_text, write_results


def report(runs: Runs, plan: Sequence[Part]) -> None:
    """Prints the report and keeps it."""
    results = runs.results(plan)
    states = [runs.states[part.name] for part in plan if part.name in runs.states]
    if not states:
        raise SystemExit(f"gpu: {runs.folder} holds no results yet; leave out --report")
    rate = rate_of(results)
    found = text(results, states)
    print(f"\n{found}")
    kinds = {
        "row": rows(results, rate),
        "ratio": ratios(results, rate),
        "change": changes(results),
    }
    records = [{"summary": kind, **record} for kind, every in kinds.items() for record in every]
    extra = {"matmul_flops_per_s": rate, "reduced": runs.reduced, "device": runs.device}
    extra |= runs.about  # of where it was measured, not of where the report is made
    write_results(
        runs.folder / "summary.json", records, command=command(), overwrite=True, extra=extra
    )
    (runs.folder / "summary.txt").write_text(f"{found}\n", encoding="utf-8")


def listed(plan: Sequence[Part]) -> str:
    """Returns the parts as a table, with the seconds they should take on an H200 and their sum so far."""
    total, lines = 0.0, []
    for part in plan:
        total += part.estimate
        lines.append(
            {"part": part.name, "what": part.what, "PFLOP": part.work / 1e15}
            | {"seconds": round(part.estimate), "sum": round(total)}
        )
    return records_to_text(lines, rows=list(lines[0]), column=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts and prints the report; returns 1 if a part failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="the folder of the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="for all; no part goes on after"
    )
    parser.add_argument(
        "--only", nargs="+", help="parts whose name has one of these in it, or is one: =NAME"
    )
    parser.add_argument(
        "--part-seconds", type=float, default=float("inf"), help="no part goes on for longer"
    )
    parser.add_argument("--profile", action="store_true", help="profile two steps, too")
    parser.add_argument("--reduced", action="store_true", help="shrink every size")
    parser.add_argument("--list", action="store_true", help="print the parts, run nothing")
    parser.add_argument("--report", action="store_true", help="print the report, run nothing")
    args = parser.parse_args(argv)
    plan = parts(args.profile, args.reduced)
    asked = [p for p in plan if chosen(p.name, args.only)]
    if args.list:
        print(listed(asked))
        return 0
    if args.output is None:
        raise SystemExit("gpu: give --output, a folder for the results (or --list)")
    runs = Runs(args.output, args.device, args.reduced)
    if args.device == "cpu" and not args.reduced:
        raise SystemExit("gpu: real sizes are for --device cuda; on a CPU add --reduced")
    if not args.report:
        parse_device(args.device)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "log").mkdir(exist_ok=True)
        (args.output / "log" / ".gitignore").write_text("*\n")  # they name paths of the machine
        run(runs, asked, 60 * args.minutes, args.part_seconds)
    report(runs, parts(True, args.reduced))
    return int(any(runs.states.get(p.name, {}).get("state") == "failed" for p in asked))


if __name__ == "__main__":
    raise SystemExit(main())
