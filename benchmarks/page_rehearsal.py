"""The configurations that were rehearsed at real size, from results/rehearsal.json: a section of docs/rehearsal.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stitchvm.results import read_results

__all__ = ["PAGE", "section"]

PAGE = Path("docs/rehearsal.md")
RESULTS = Path("results/rehearsal.json")


def section() -> str:
    """Returns the table of the records of scale "full"."""
    content = read_results(RESULTS)
    records = [r for r in content["records"] if r["scale"] == "full"]
    machine = content["machine"]
    passed = sum(r["passed"] for r in records)
    lines = [
        f"{passed} of {len(records)} that have ended have passed on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']:.0f} GiB (`{RESULTS}`).",
        "",
        "| configuration | commands | peak memory, GiB | anonymous, GiB | seconds | |",
        "|---|---|---:|---:|---:|---|",
        *map(_row, sorted(records, key=lambda r: (not r["passed"], r["config"]))),
    ]
    return "\n".join(lines)


def _row(record: dict[str, Any]) -> str:
    own = record.get("anonymous_memory_gib")
    peak = (
        record["peak_memory_gib"] if record["passed"] else None
    )  # of a killed process nobody knows
    cells = (
        f"`{record['config']}`",
        ", ".join(record["commands"]),
        "" if peak is None else f"{peak:.1f}",
        "" if own is None else f"{own:.1f}",
        f"{record['seconds']:.0f}",
        "passed" if record["passed"] else record["error"],
    )
    return f"| {' | '.join(cells)} |"
