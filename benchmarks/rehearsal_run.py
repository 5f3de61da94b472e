"""Runs the plans one configuration after the other, and keeps what each came to in results/rehearsal.json."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rehearsal_child import Outcome, preload, run_command
from rehearsal_plan import Plan, plans

__all__ = ["run_all", "run_plan"]


def run_all(
    root: Path,
    scale: str,
    patterns: Sequence[str],
    out: Path,
    device: str = "cpu",
    seconds: float | None = None,
) -> int:
    """Runs the configurations that match and have not passed yet at this scale; returns 1 if one fails.

    Arguments:
        root: The rehearsal's folder, written before; `rehearsal_hub.enter` was called.
        scale: "tiny" or "full".
        patterns: Globs of configurations.
        out: The results file; records of other scales and devices stay.
        device: "cpu" or "gpu".
        seconds: Begin no further configuration after these.
    """
    if device == "cpu":
        preload()
    records = _read(out)
    key = {"scale": scale, "device": device}
    begun = time.perf_counter()
    failed = 0
    for plan in plans(scale, device, patterns, root):
        known = next((r for r in records if _same(r, plan.name, key)), None)
        if known and known["passed"]:
            continue
        if seconds is not None and time.perf_counter() - begun > seconds:
            print("time is up; the same command goes on")
            break
        record = run_plan(root, plan, device) | key
        records = [r for r in records if not _same(r, plan.name, key)] + [record]
        _write(out, records)
        failed += not record["passed"]
        print(_line(record), flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


def run_plan(root: Path, plan: Plan, device: str = "cpu") -> dict[str, Any]:
    """Runs a configuration's commands up to the first that fails; returns its record."""
    shutil.rmtree(root / "runs" / plan.name, ignore_errors=True)
    outcomes: list[Outcome] = []
    error: str | None = None
    method = "fork" if device == "cpu" else "spawn"
    for k, argv in enumerate(plan.commands):
        log = root / "logs" / f"{plan.name}_{k}.log"
        outcomes.append(run_command(root, list(argv), log, method))
        if outcomes[-1].code:
            error = f"{argv[0]}: {reason(outcomes[-1])}"
            break
    missing = [file for file in plan.makes if not (root / file).is_file()]
    if error is None and missing:
        error = f"not written: {', '.join(missing)}"
    return {
        "config": plan.name,
        "commands": [argv[0] for argv in plan.commands],
        "steps": plan.steps,
        "peak_memory_gib": round(max(o.peak_memory_gib for o in outcomes), 3),
        "peak_memory_of": outcomes[-1].peak_memory_of,
        "anonymous_memory_gib": round(max(o.anonymous_memory_gib for o in outcomes), 3),
        "seconds": round(sum(o.seconds for o in outcomes), 1),
        "passed": error is None,
        "error": error,
    }


def reason(outcome: Outcome) -> str:
    """Returns why a command failed."""
    if outcome.code == -signal.SIGKILL:
        return "killed, most likely for want of memory"
    if outcome.code < 0:
        return f"ended by {signal.Signals(-outcome.code).name}"
    return f"exit code {outcome.code}: {_last_line(outcome.log)}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["no output"])[-1][:300]


def _same(record: dict[str, Any], name: str, key: dict[str, str]) -> bool:
    return record["config"] == name and all(record[k] == v for k, v in key.items())


def _read(out: Path) -> list[dict[str, Any]]:
    from stitchvm.results import read_results

    return [dict(record) for record in read_results(out)["records"]] if out.is_file() else []


def _write(out: Path, records: list[dict[str, Any]]) -> None:
    from stitchvm.results import write_results

    command = (
        "python benchmarks/rehearsal.py --root FOLDER, --scale and --device as in each record"
    )
    write_results(out, records, command=command, overwrite=True)


def _line(record: dict[str, Any]) -> str:
    state = "ok" if record["passed"] else f"FAILED: {record['error']}"
    return (
        f"{record['config']:<30} {record['seconds']:>7.1f} s "
        f"{record['peak_memory_gib']:>7.2f} GiB  {state}"
    )
