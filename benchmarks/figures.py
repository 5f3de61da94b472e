"""Figures that compare methods: a reward against what a sample costs (Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["reward_against_cost"]

MARKS = {"fks": ("#7a7a7a", "o"), "fks_stitched": ("#0b6e99", "s")}


def reward_against_cost(
    records: Sequence[dict[str, Any]], path: Path, cost: str = "cpu_seconds"
) -> Path:
    """Draws mean reward ± standard error against the cost of a sample, one point per (N, M), and writes the file.

    Arguments:
        records: Records of one metric, with `name`, `particles`, `proposals`, `value`, `stderr` and the cost.
        path: The picture's file; it is replaced if it is there.
        cost: The key of the cost, in seconds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(record["name"] for record in records):
        mine = sorted((r for r in records if r["name"] == name), key=lambda r: r[cost])
        colour, mark = MARKS.get(name, ("#b3446c", "^"))
        axis.errorbar(
            [r[cost] for r in mine],
            [r["value"] for r in mine],
            yerr=[r["stderr"] for r in mine],
            color=colour,
            marker=mark,
            linestyle="none" if name == "fks_stitched" else "-",
            linewidth=1,
            capsize=2,
            label="FK steering, Tweedie" if name == "fks" else "FK steering + StitchVM",
        )
        for r in mine:
            text = f"N={r['particles']}" + (f", M={r['proposals']}" if r["proposals"] > 1 else "")
            below = name == "fks"
            axis.annotate(
                text,
                (r[cost], r["value"]),
                xytext=(6, -12) if below else (-6, 6),
                ha="left" if below else "right",
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axis.set_xlabel(f"{cost.replace('_', ' ')} per sample")
    axis.set_ylabel(f"{records[0]['metric']}, clean, mean ± s.e.")
    axis.margins(x=0.15, y=0.2)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
