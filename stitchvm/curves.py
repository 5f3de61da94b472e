"""`stitchvm curves`: the training curves of runs of `stitchvm fit`, side by side (Figures 4, 5 and 7).

    stitchvm curves nft=runs/nft_0,runs/nft_1 stitched=runs/stitched_0,runs/stitched_1 --metric val/hps --x cpu_seconds

Each argument is one method: the folders of its runs, which differ in their seed, after a name of its own. Writes the
picture, a results file of the same name with every point and what the methods come to, and prints the latter: where
each ended, and what it cost to a level, by default the highest that all runs reach ("at equal reward").
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

__all__ = ["main"]

XS = ("cpu_seconds", "device_seconds", "seconds", "samples", "updates", "step")
NOT_SCORES = "val/image/"  # of an evaluation, but nothing that should rise


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Draws curves and returns their records.

    Arguments:
        argv: The command line after `stitchvm curves`.

    Raises:
        SystemExit: If the arguments or the runs do not go together.
    """
    args = _parser().parse_args(list(argv))
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"stitchvm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stitchvm curves",
        description="Draws reward against cost of runs of `stitchvm fit` and compares what they cost.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "methods",
        nargs="+",
        metavar="[NAME=]RUN[,RUN...]",
        help="folders of runs; several of one method, with other seeds, become a mean with its band",
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        help="tags of the logs, or sums of tags (val/clip+val/hps), a panel each; by default all scores of held-out "
        "prompts that all runs have",
    )
    parser.add_argument(
        "--x", choices=XS, default="device_seconds", help="the cost; seconds are of training alone"
    )
    parser.add_argument(
        "--target",
        default="equal",
        help="the level to which costs are compared: a number, or `equal` for the highest that all runs reach",
    )
    parser.add_argument(
        "--against", metavar="NAME", help="the method that ratios are over; the first"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("curves.png"), help="the picture's file"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="draw over what an earlier command has left there"
    )
    parser.add_argument("--title", help="a line above the panels")
    return parser


def _run(args: argparse.Namespace) -> list[dict[str, Any]]:
    from stitchvm.results import write_results
    from stitchvm.tables import records_to_text
    from stitchvm.training_curves import summaries, training_curves
    from stitchvm.training_logs import read_curve, read_scalars

    path = args.output.with_suffix(".json")
    there = [str(file) for file in (args.output, path) if file.exists()]
    if there and not args.overwrite:
        raise FileExistsError(
            f"{' and '.join(there)} would be written over: give another --output, or --overwrite"
        )
    logs = {name: {run: read_scalars(run) for run in runs} for name, runs in _named(args.methods)}
    metrics = args.metric or _scores(
        [scalars for runs in logs.values() for scalars in runs.values()]
    )
    level = _level(args.target, metrics)
    points = []
    for metric in metrics:
        for name, runs in logs.items():
            for number, (run, scalars) in enumerate(runs.items()):
                try:
                    curve = read_curve(scalars, metric)
                except ValueError as error:
                    raise ValueError(f"{run}: {error}") from error
                points += [{"method": name, "run": number, "metric": metric, **p} for p in curve]
    found = [
        s for metric in metrics for s in summaries(points, metric, args.x, level, args.against)
    ]
    levels = {record["metric"]: record["level"] for record in found}
    picture = training_curves(points, args.output, x=args.x, levels=levels, title=args.title)
    folders = {name: [_shown(run) for run in each] for name, each in logs.items()}
    write_results(path, [*found, *points], extra={"runs": folders}, overwrite=True)
    _print(found, args.x, records_to_text)
    print(f"wrote {path}, {picture}")
    return found


def _named(arguments: Sequence[str]) -> list[tuple[str, list[Path]]]:
    """Returns the methods with their runs. Raises ValueError if a name or a run comes twice."""
    found: dict[str, list[Path]] = {}
    for argument in arguments:
        name, sign, rest = argument.partition("=")
        runs = [Path(run) for run in (rest if sign else argument).split(",") if run]
        if not runs or not name:
            raise ValueError(f"{argument!r}: expected the folder of a run, or NAME=RUN,RUN.")
        name = name if sign else ", ".join(run.resolve().name for run in runs)
        if name in found:
            raise ValueError(
                f"the name {name!r} comes twice: give each method one of its own, NAME=RUN,RUN."
            )
        found[name] = runs
    every = [run.resolve() for runs in found.values() for run in runs]
    twice = next((run for run in every if every.count(run) > 1), None)
    if twice is not None:
        raise ValueError(f"the run {twice.name} comes twice: each counts once.")
    return list(found.items())


def _shown(run: Path) -> str:
    """Returns a run's folder below the working directory, or its name alone: no path of a machine."""
    here = Path.cwd()
    return str(run.resolve().relative_to(here)) if run.resolve().is_relative_to(here) else run.name


def _scores(runs: Sequence[Any]) -> list[str]:
    """Returns the scores of held-out prompts that all runs have."""
    names = [tag for tag in runs[0] if tag.startswith("val/") and not tag.startswith(NOT_SCORES)]
    names = [tag for tag in names if all(tag in scalars for scalars in runs)]
    if not names:
        common = [tag for tag in runs[0] if all(tag in scalars for scalars in runs)]
        raise ValueError(
            "the runs have no score of held-out prompts in common: name one of their tags with --metric. They have "
            f"{', '.join(common) or 'no tag in common'}."
        )
    return names


def _level(target: str, metrics: Sequence[str]) -> float | None:
    if target == "equal":
        return None
    try:
        level = float(target)
    except ValueError:
        raise ValueError(f"--target {target}: expected a number, or `equal`.") from None
    if len(metrics) > 1:
        raise ValueError(
            f"--target {target} is a level of one metric: name it with --metric, of {', '.join(metrics)}."
        )
    return level


def _print(found: Sequence[dict[str, Any]], x: str, text: Any) -> None:
    """Prints what the methods come to, a table per metric."""
    for metric in dict.fromkeys(record["metric"] for record in found):
        mine = [record for record in found if record["metric"] == metric]
        to = f"{x} to {mine[0]['level']:.4g}"
        rows = [
            {
                metric: r["method"],
                "runs": r["runs"],
                "final": r["value"],
                "±": r["stderr"],
                x: _short(r["cost"]),
                to: _short(r["cost_to_level"]),
                "± ": _short(r["cost_to_level_stderr"]),
                "ratio": None if r["ratio"] is None else Decimal(f"{r['ratio']:.2f}"),
            }
            for r in mine
        ]
        print(f"\n{text(rows, rows=tuple(rows[0]), column=None, digits=4)}")
    against = found[0]["against"]
    print(
        f"\nratio: the cost of {against} to the level over that of the method; – is: not reached, or from the start"
    )


def _short(cost: float | None) -> Decimal | None:
    """Returns a cost as it is printed: with three digits, and none after the point from 100 on."""
    return None if cost is None else Decimal(f"{cost:.0f}" if cost >= 100 else f"{cost:.3g}")
