r"""Training curves as in Figures 4, 5 and 7: reward against cost, the cost to equal reward, and the picture.

A method is one run or several, which differ in their seed s. Evaluation k of one has a cost x_s(k) and a value y_s(k).

    mean and band:   (mean_s x_s(k), mean_s y_s(k) ± standard error over the seeds), at the steps that all of them have
    cost to R:       the first x at which the line through a run's points is at R; its mean over seeds, none if one of
                     them never gets there
    equal reward:    R = min over all runs of max_k y_s(k): the highest that every run reaches
    ratio:           the cost to R of the method that is compared with, over that of a method; above 1 is cheaper

Evaluations are noisy, and the first crossing of a noisy line comes early: more so with more evaluations, so methods are
to be compared at the same intervals.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from stitchvm.plots import legend_below, save_figure

__all__ = ["AXES", "cost_to_reach", "equal_level", "mean_curve", "summaries", "training_curves"]

Record = Mapping[str, Any]
Run = dict[int, tuple[float, float]]  # cost and value by step

# the Okabe–Ito palette, without its yellow, and a grey; with nine markers to it no two methods look alike
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*", "<")

# key of a point → (axis in the picture, the same in hours)
AXES: dict[str, tuple[str, str | None]] = {
    "cpu_seconds": ("core-seconds", "core-hours"),
    "device_seconds": ("device-seconds", "device-hours"),
    "seconds": ("seconds", "hours"),
    "samples": ("samples", None),
    "updates": ("updates", None),
    "step": ("optimiser steps", None),
}


def runs_of(records: Iterable[Record], x: str) -> dict[str, list[Run]]:
    """Returns the runs of one metric by method, in the order of appearance: cost and value by step.

    Arguments:
        records: Points with method, run, step, value and x.
        x: The cost, a key of `AXES`.

    Raises:
        ValueError: If points have no such cost.
    """
    found: dict[str, dict[Any, Run]] = {}
    for record in sorted(records, key=lambda r: r["step"]):
        if record.get(x) is None:
            raise ValueError(
                f"a run of {record['method']} has no {x} in its logs, as those of older versions: take --x step, "
                "which all have."
            )
        run = found.setdefault(record["method"], {}).setdefault(record["run"], {})
        run[record["step"]] = float(record[x]), float(record["value"])
    return {name: list(runs.values()) for name, runs in found.items()}


def mean_curve(runs: Sequence[Run]) -> list[tuple[float, float, float | None]]:
    """Returns (mean cost, mean value, its standard error) at the steps that all runs have; one run has no error."""
    steps = [step for step in runs[0] if all(step in run for run in runs)]
    return [
        (
            statistics.fmean(run[step][0] for run in runs),
            statistics.fmean(run[step][1] for run in runs),
            standard_error([run[step][1] for run in runs]),
        )
        for step in steps
    ]


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the standard error of a mean; None of a single value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def cost_to_reach(run: Run, level: float) -> float | None:
    """Returns the first cost at which the line through a run's points is at a level or above; None if it never is."""
    before: tuple[float, float] | None = None
    for x, y in run.values():
        if y >= level:
            if before is None:
                return x
            x_0, y_0 = before
            return x_0 + (x - x_0) * (level - y_0) / (y - y_0)
        before = x, y
    return None


def equal_level(methods: Mapping[str, Sequence[Run]]) -> float:
    """Returns the highest level that every run of every method reaches."""
    return min(max(y for _, y in run.values()) for runs in methods.values() for run in runs)


def summaries(
    records: Iterable[Record],
    metric: str,
    x: str,
    level: float | None = None,
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Returns a record per method: where it ended, at what cost, and what it cost to reach a level.

    Arguments:
        records: Points of runs, of this metric and others.
        metric: The metric.
        x: The cost.
        level: The level; the one of equal reward by default.
        against: The method that the others are compared with; the first by default.

    Raises:
        ValueError: If there is no such metric or method, or a run without this cost.
    """
    methods = runs_of([r for r in records if r["metric"] == metric], x)
    if not methods:
        raise ValueError(f"no run has a value of {metric}: nothing to compare.")
    against = next(iter(methods)) if against is None else against
    if against not in methods:
        raise ValueError(
            f"there is no method {against!r} to compare with: expected one of {', '.join(methods)}."
        )
    level = equal_level(methods) if level is None else level
    reached = {name: [cost_to_reach(run, level) for run in runs] for name, runs in methods.items()}
    costs = {
        name: [x for x in each if x is not None] if None not in each else []
        for name, each in reached.items()
    }
    found = []
    for name, runs in methods.items():
        ends, own = [list(run.values())[-1] for run in runs], costs[name]
        mean = statistics.fmean(own) if own else None
        other = statistics.fmean(costs[against]) if costs[against] else None
        found.append(
            {
                "method": name,
                "metric": metric,
                "x": x,
                "runs": len(runs),
                "value": statistics.fmean(y for _, y in ends),
                "stderr": standard_error([y for _, y in ends]),
                "cost": statistics.fmean(x for x, _ in ends),
                "level": level,
                "cost_to_level": mean,
                "cost_to_level_stderr": standard_error(own),
                "against": against,
                "ratio": other / mean if other is not None and mean else None,
            }
        )
    return found


def training_curves(
    records: Iterable[Record],
    path: str | Path,
    *,
    x: str = "cpu_seconds",
    levels: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path:
    """Draws every metric against a cost, one line with its band per method (Figures 4, 5 and 7).

    Arguments:
        records: Points with method, run, metric, value and the cost.
        path: The picture's file; it is replaced if it is there.
        x: The cost, a key of `AXES`.
        levels: By metric, a level to draw as a dotted line.
        title: A line above all panels.

    Raises:
        ValueError: If there are no points, or no such cost.
    """
    from matplotlib.figure import Figure

    records = list(records)
    metrics = list(dict.fromkeys(r["metric"] for r in records))
    if not metrics:
        raise ValueError("there are no points of training curves: nothing to draw.")
    methods = list(dict.fromkeys(r["method"] for r in records))
    styles = dict(zip(methods, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    columns = min(len(metrics), 4)
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(max(3.6 * columns, 5.2), 3.0 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    name, hours = AXES[x]
    most = max((r[x] for r in records if r.get(x) is not None), default=0)
    unit, label = (3600, hours) if hours is not None and most >= 3 * 3600 else (1, name)
    handles: dict[str, Any] = {}
    for axis, metric in zip(axes, metrics, strict=False):
        for method, runs in runs_of([r for r in records if r["metric"] == metric], x).items():
            points = mean_curve(runs)
            colour, marker = styles[method]
            xs, ys = [p[0] / unit for p in points], [p[1] for p in points]
            (line,) = axis.plot(
                xs, ys, color=colour, marker=marker, markersize=4, linewidth=1.6, label=method
            )
            handles.setdefault(method, line)
            if len(runs) > 1:
                low = [y - (e or 0) for _, y, e in points]
                high = [y + (e or 0) for _, y, e in points]
                axis.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
        if levels is not None and metric in levels:
            axis.axhline(levels[metric], color="black", linestyle=":", linewidth=1)
        axis.set_xlabel(label)
        axis.set_title(metric, fontsize=10)
        axis.set_xlim(left=0)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in axes[len(metrics) :]:
        axis.remove()
    legend_below(figure, handles, width=1.9)
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)
