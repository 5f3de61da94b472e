"""What an update takes: a short run of its own code on its own networks, extrapolated to the whole of it.

A few losses at full micro-batch size are sent backwards, after as many that do not count. Their seconds, by stage, are
scaled by the work that is left of the update: images, and a stage's FLOPs at the mean stop over those at the stop that
ran. No optimiser step is made, random numbers are keyed, gradients are dropped: nothing of a run has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import torch

from stitchvm.modules import alignment_checks as checks
from stitchvm.modules.cost import STAGES, Plan, Prices
from stitchvm.modules.groups import inner_parts
from stitchvm.modules.meter import Meter, out_of_memory_says
from stitchvm.modules.rows import Rows
from stitchvm.rewards.base import NotFiniteError

if TYPE_CHECKING:
    from stitchvm.modules.alignment import Alignment

__all__ = ["WarmUp", "measure", "some_rows", "update_that_stops"]


@dataclass(frozen=True)
class WarmUp:
    """What a short run has shown of an update on one device.

    Attributes:
        seconds: By stage, for the whole update, extrapolated.
        measured: By stage, of what ran.
        stop: Where its roll-outs stopped.
        rolled: The images that were rolled out and valued.
        losses: The losses that were sent backwards.
        images: The images of each of them.
        resident_gib: The memory before, in GiB.
        peak_gib: The peak of it.
        optimiser_gib: What AdamW will add to it: two float32 moments for each trained weight.
        memory: What the peak is, in words.
    """

    seconds: dict[str, float]
    measured: dict[str, float]
    stop: int
    rolled: int
    losses: int
    images: int
    resident_gib: float
    peak_gib: float
    optimiser_gib: float
    memory: str


def measure(
    module: Alignment,
    rows: Rows,
    plan: Plan,
    prices: Prices,
    *,
    total: int,
    losses: int | None = 3,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> WarmUp:
    """Returns what an update takes on this device.

    Arguments:
        module: The fine-tuning with its networks.
        rows: Images to run, as `some_rows` gives them; their update's number determines the stop.
        plan: What the method runs.
        prices: What its calls cost, in any unit; stages are extrapolated by them.
        total: The images of the update on this device.
        losses: How many losses are sent backwards; None for all of these images.
        context: The precision's context.

    Raises:
        MemoryError: If memory runs out, saying what to lower.
        NotFiniteError: If a loss is not finite.
    """
    stop = plan.window.draw(module.seed, rows.update)
    meter = Meter(module.device)
    meter.start()
    meter.stop()
    resident = meter.peak_gib
    meter.start()
    try:
        with context(), out_of_memory_says(partial(checks.what_to_lower, module)):
            _run(module, rows, 1)
            module.stages.seconds()
            done = _run(module, rows, losses)
        meter.stop()
        measured = dict.fromkeys(STAGES, 0.0) | module.stages.seconds()
    finally:
        module._notes.clear()
        for weight in module.trained:
            weight.grad = None
    sizes = [
        len(part)
        for images in inner_parts(rows, getattr(module, "inner_steps", 1))
        for part in images.split(module.micro_batch)
        for _ in range(plan.losses(stop))
    ]
    updated = sum(sizes[:done]) / plan.losses(stop)
    of = {"rollout": len(rows), "value": len(rows)} if plan.ahead else {}
    mean, here = plan.mean(), plan.work(stop)
    factors = {}
    for stage in STAGES:
        ran = here[stage].at(prices)
        # a value that is not counted costs 0, but as much at every stop
        left = mean[stage].at(prices) / ran if ran else 1.0
        factors[stage] = left * total / of.get(stage, updated)
    return WarmUp(
        {stage: measured[stage] * factors[stage] for stage in STAGES},
        measured,
        stop,
        of.get("rollout", round(updated)),
        done,
        sizes[0],
        resident,
        meter.peak_gib,
        8 * sum(p.numel() for p in module.trained) / 2**30,
        meter.memory.split(" while ")[0],
    )


def _run(module: Alignment, rows: Rows, losses: int | None) -> int:
    """Rolls out, and sends some losses backwards; returns how many there were."""
    rolled = module.rollout(rows)
    done, total = 0, torch.zeros((), device=module.device)
    for loss in module.micro_steps(rows, rolled):
        if loss is None:  # where an optimiser's step would be
            continue
        with module.stage("update"):
            loss.backward()
            total += loss.detach()
        done += 1
        if done == losses:
            break
    if not bool(total.isfinite()):
        raise NotFiniteError(
            "a loss of the warm-up is not finite: look at the value of some samples, or run generator and reward in "
            "bfloat16 or float32."
        )
    return done


def some_rows(
    module: Alignment, plan: Plan, prompts: Sequence[str], losses: int | None, stop: int
) -> Rows:
    """Returns images for a warm-up, of an update that stops after `stop` calls: at most one for each of `prompts`' K.

    Arguments:
        module: The fine-tuning.
        plan: What the method runs.
        prompts: The prompts of an update on this device.
        losses: How many losses are to be sent backwards; None for all images of these prompts.
        stop: The stop.
    """
    batch = {"index": torch.arange(len(prompts)), "prompt": list(prompts)}
    update = update_that_stops(plan, module.seed, stop)
    rows = Rows.of(batch, module.group_size, module.seed, update, module.device)
    if losses is None:
        return rows
    micro = module.micro_batch or len(rows)
    if plan.ahead:
        steps = getattr(module, "inner_steps", 1)
        wanted = max(micro * steps, getattr(module, "rollout_batch", None) or 0)
    else:
        wanted = micro * losses
    return rows.take(range(min(wanted, len(rows))))


def update_that_stops(plan: Plan, seed: int, stop: int) -> int:
    """Returns the number of an update whose roll-outs stop after `stop` calls."""
    return next(n for n in count() if plan.window.draw(seed, n) == stop)
