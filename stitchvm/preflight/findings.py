"""What was looked at, what came of it, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["BAD", "STATES", "Finding", "table"]

STATES = ("ok", "download", "gated", "missing", "wrong")
BAD = ("gated", "missing", "wrong")


class Finding(NamedTuple):
    """One row of the report.

    Attributes:
        part: Where the configuration names it, such as `model.generator`.
        what: What was looked at.
        state: One of `STATES`.
        detail: What was found.
        remedy: What to do; "" where nothing is to be done.
    """

    part: str
    what: str
    state: str
    detail: str = ""
    remedy: str = ""


def table(findings: Iterable[Finding]) -> str:
    """Returns the findings as text: a row each, and below it what is wrong and how to mend it."""
    found = list(findings)
    width = max((len(f.what) for f in found), default=0)
    lines = []
    for f in found:
        lines.append(f"{f.state:<9} {f.what:<{width}}  {f.part}")
        if f.detail and f.state != "ok":
            lines.append(f"          {f.detail}")
        if f.remedy:
            lines.append(f"          → {f.remedy}")
    counts = {state: sum(f.state == state for f in found) for state in STATES}
    lines.append(
        ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "nothing to check"
    )
    return "\n".join(lines)
