"""The scalars that runs of `stitchvm fit` leave for TensorBoard, read back as curves over what training has cost.

A run is one folder. Whenever it is resumed it begins another event file; of what an earlier file has, everything after
the later one's first step is dropped: that is what was done again. At that step the later one adds an evaluation that
had been left to the training there. So each step is there once, also after a kill between two checkpoints, and a run
that began anew in its folder counts alone.

    {"step": optimiser steps, "updates", "samples", "seconds", "device_seconds", "cpu_seconds", "value"}

is a point of a curve; the costs are those of `modules/spent.py`, of training alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["read_curve", "read_scalars"]

COST = "cost/"
Scalars = Mapping[str, Mapping[int, float]]


def read_scalars(run: str | Path) -> dict[str, dict[int, float]]:
    """Returns a run's scalars by tag and step, steps in order; of a step that was logged twice the last.

    Arguments:
        run: The folder of a run, with its event files in it or, if a logger of another folder layout made them, below.

    Raises:
        FileNotFoundError: If there is no such folder, or no event file in it.
    """
    found: dict[str, dict[int, float]] = {}
    for scalars in _in_time(Path(run)):
        steps = [step for points in scalars.values() for step in points]
        if not steps:
            continue
        first = min(steps)
        before = first + 1 if first else 0  # at 0 a run begins
        kept = {tag: {s: x for s, x in xs.items() if s < before} for tag, xs in found.items()}
        found = {tag: kept.get(tag, {}) | scalars.get(tag, {}) for tag in kept | scalars}
    return {tag: dict(sorted(points.items())) for tag, points in found.items() if points}


def _in_time(run: Path) -> list[dict[str, dict[int, float]]]:
    """Returns the scalars of each event file, the oldest first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not run.is_dir():
        raise FileNotFoundError(
            f"there is no folder {run}: expected that of a run, its trainer.default_root_dir."
        )
    pattern = "events.out.tfevents.*"
    files = sorted(run.glob(pattern)) or sorted(run.rglob(pattern))
    if not files:
        raise FileNotFoundError(
            f"{run} has no event files: expected the folder of a run of `stitchvm fit` with its TensorBoard logger."
        )
    answer = []
    for file in files:
        # one of each kind in memory, all of the scalars
        keep = {"scalars": 0, "images": 1, "histograms": 1, "tensors": 1}
        events = EventAccumulator(str(file), size_guidance=keep, purge_orphaned_data=False)
        events.Reload()
        tags = events.Tags()["scalars"]
        scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}
        start = min((e.wall_time for tag in tags for e in events.Scalars(tag)), default=math.inf)
        answer.append((start, file.name, scalars))
    return [scalars for *_, scalars in sorted(answer, key=lambda each: each[:2])]


def read_curve(scalars: Scalars, metric: str) -> list[dict[str, Any]]:
    """Returns the points of a metric in the order of steps; those that are not finite (skipped updates) are left out.

    Logs of a run without costs give points without them.

    Arguments:
        scalars: What `read_scalars` returned.
        metric: The tag, such as "val/hps", or the sum of several, "val/clip+val/hps".

    Raises:
        ValueError: If the run has no such tag.
    """
    parts = metric.split("+")
    for tag in parts:
        if tag not in scalars:
            near = [known for known in scalars if known.startswith(("val/", "train/"))]
            raise ValueError(
                f"there is no {tag} in the logs; there are {', '.join(near) or 'none'}."
            )
    costs = {tag.removeprefix(COST): xs for tag, xs in scalars.items() if tag.startswith(COST)}
    points = []
    for step in scalars[parts[0]]:
        terms = [scalars[tag].get(step, math.nan) for tag in parts]
        if math.isfinite(sum(terms)):
            spent = {name: xs[step] for name, xs in costs.items() if step in xs}
            points.append({"step": step, **spent, "value": sum(terms)})
    return points
