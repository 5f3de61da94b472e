"""One variant's short run: seconds of each kind of step and of the end, peak memory; and the full run added up."""

from __future__ import annotations

import gc
import multiprocessing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from common import Reader, clock, seconds_of
from sampling_setups import Rig
from sampling_variants import Kind, Variant, field_of, final_value, make_sampler, make_value, plan
from torch import Tensor

from stitchvm.modules.meter import Meter
from stitchvm.values.base import Value
from stitchvm.values.stitched import StitchedValue

__all__ = ["Measured", "in_own_process", "measured", "part_calls", "part_seconds", "run_short"]


@dataclass
class Measured:
    """What each kind of step of a variant took, and the end of a run: seconds or FLOPs.

    Attributes:
        each: The mean of one step, by kind.
        end: What came after the last step: judging the particles, decoding the sample.
        full: The kinds of the full run's steps.
        steps: How many steps were run.
    """

    each: dict[Kind, float]
    end: float
    full: list[Kind]
    steps: int

    @property
    def first(self) -> float:
        """The first step."""
        return self.each[self.full[0]]

    @property
    def step(self) -> float:
        """The mean over the other steps of the full run."""
        rest = self.full[1:] or self.full
        return sum(self.each[kind] for kind in rest) / len(rest)

    @property
    def sample(self) -> float:
        """The full run: all its steps, of which few were run, and its end."""
        return sum(self.each[kind] for kind in self.full) + self.end


def run_short(
    rig: Rig, variant: Variant, steps: int, read: Reader, value: Value | None = None
) -> Measured:
    """Runs a short run and reads a clock or a counter between steps of different kinds, and at the end.

    Arguments:
        rig: The networks.
        variant: The variant.
        steps: About how many steps.
        read: The clock or counter.
        value: What `make_value` returned, if it is to serve several runs.
    """
    value = make_value(rig, variant) if value is None else value
    shared = field_of(rig, variant, value).shares
    sampler = make_sampler(rig.setup, variant, steps)
    kinds = plan(sampler, shared)
    full = plan(make_sampler(rig.setup, variant), shared)
    assert set(full) <= set(kinds), (full, kinds)
    sums: Counter[Kind] = Counter()
    calls: Counter[str] = Counter()
    advance, last = sampler.advance, 0.0

    def timed(run: Any, k: int) -> Any:
        nonlocal last
        last = read() if k == 0 else last
        record = advance(run, k)
        if k + 1 == len(kinds) or kinds[k + 1] != kinds[k]:
            now = read()
            sums[kinds[k]] += now - last
            last = now
        if k + 1 == len(kinds):
            calls.update(run.field.calls)
        return record

    with mock.patch.object(sampler, "advance", timed):
        samples = sampler(
            rig.generator,
            rig.prompts,
            value,
            latent_size=rig.latent_size,
            final_value=final_value(rig, variant),
        )
    with torch.no_grad():
        rig.generator.vae.decode(samples.latents, clamp=True)
    end = read() - last
    for name in ("velocity", "continued", "value", "gradient"):
        assert calls[name] == sum(getattr(kind, name) for kind in kinds), (name, calls, kinds)
    times = Counter(kinds)
    return Measured({kind: sums[kind] / times[kind] for kind in sums}, end, full, len(kinds))


def measured(
    rig: Rig, variant: Variant, steps: int, repeats: int = 1
) -> tuple[Measured, dict[str, float]]:
    """Returns seconds, of each kind of step the least of `repeats` short runs, and GiB of memory.

    Memory: "peak_memory_gib" while sampling and decoding, "resident_gib" before, with the networks that the variant
    needs, and "working_gib" between them. On CUDA the allocator's, on a CPU the process' own.
    """
    rig.place(
        reward=variant.estimator is not None or variant.particles > 1,
        model=variant.estimator == "stitched",
    )
    gc.collect()
    if rig.device.type == "cuda":
        torch.cuda.empty_cache()
    read = clock(rig.device)
    meter = Meter(rig.device)
    meter.start()
    meter.stop()
    memory = {"resident_gib": meter.peak_gib}
    meter.start()
    value = make_value(rig, variant)  # one, as in a real run: its CUDA graph is recorded once
    runs = [run_short(rig, variant, steps, read, value) for _ in range(repeats)]
    meter.stop()
    memory["peak_memory_gib"] = meter.peak_gib
    memory["working_gib"] = meter.peak_gib - memory["resident_gib"]
    best = runs[0]
    for kind in best.each:
        best.each[kind] = min(run.each[kind] for run in runs)
    best.end = min(run.end for run in runs)
    return best, memory


def part_calls(
    rig: Rig, graph: bool = False
) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Returns each part of the computation as a function, and an input for it, a batch of one.

    Arguments:
        rig: The networks.
        graph: Whether stitch and tail are launched as a CUDA graph.
    """
    generator, model, device = rig.generator, rig.model, rig.device
    z = torch.randn(1, generator.latent_channels, *rig.latent_size, device=device)
    t = torch.full((1,), 0.5, device=device)
    side = rig.setup.resolution
    with torch.no_grad():
        h = model.backbone(z, t, model.i)
    return {
        "denoiser": (lambda x: generator.velocity(x, t, generator.null, 1.0), z),
        "prefix": (lambda x: model.backbone(x, t, model.i), z),
        "stitch and tail": (StitchedValue(model, graph).from_features, h),
        "decoder": (generator.vae.decode, z),
        "reward": (
            lambda x: rig.reward.embed(x).image,
            torch.rand(1, 3, side, side, device=device),
        ),
    }


def part_seconds(rig: Rig, repeats: int, graph: bool = False) -> dict[str, tuple[float, float]]:
    """Returns the seconds of each part: forward alone, and forward with backward less that.

    Arguments:
        rig: The networks.
        repeats: Calls whose median counts.
        graph: Whether to measure stitch and tail only, as a CUDA graph.
    """
    answer = {}
    calls = part_calls(rig, graph)
    for name in ["stitch and tail"] if graph else calls:
        call, x = calls[name]

        def forward(call: Callable[[Tensor], Tensor] = call, x: Tensor = x) -> None:
            with torch.no_grad():
                call(x)

        def both(call: Callable[[Tensor], Tensor] = call, x: Tensor = x) -> None:
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(call(leaf).sum(), leaf)

        alone = seconds_of(forward, rig.device, repeats)
        answer[name] = alone, seconds_of(both, rig.device, repeats) - alone
    return answer


def in_own_process(call: Callable[[], Any]) -> Any:
    """Returns what a call returns in a forked process, which begins with this one's memory and nothing else's peak."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        try:
            theirs.send((call(), None))
        except BaseException as error:
            theirs.send((None, repr(error)))
            raise

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        answer, error = ours.recv()
    finally:
        process.join()
    if error is not None:
        raise RuntimeError(f"a variant failed in its process: {error}")
    return answer
