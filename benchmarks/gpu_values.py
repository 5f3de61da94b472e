"""One call of a value: stitched and Tweedie, without and with its gradient in z_t, at several batch sizes.

    python benchmarks/gpu_values.py --setup sd35m_1024 --device cuda

With a CUDA graph of stitch and tail, too, and how far that is from the same without ("difference", of the largest),
beside how far two runs without are apart ("own_difference": sums on a GPU are in no fixed order).
FLOPs are those counted on paper (`sampling_counts.Paper`, which the counts on the calls confirm): a value and, with
its gradient, the backward pass to the latents. Nothing is shared with a sampler's velocity here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from common import matmul_rate, parse, parser, seconds_of, write
from sampling_counts import Paper
from sampling_setups import SAMPLING_SETUPS, Rig
from sampling_variants import Variant, make_value
from torch import Tensor

from stitchvm.modules.meter import Meter
from stitchvm.results import records_to_text
from stitchvm.values.base import Value

Record = dict[str, Any]
BATCHES = (1, 4, 8)  # a sample, the paper's N, and N particles with M = 2 proposals


def cases() -> list[tuple[Variant, int, bool]]:
    """Returns values with their batch sizes, without and with a gradient."""
    stitched, graphed = (
        [
            (Variant("dps", "stitched", graph=graph), size, gradient)
            for size in BATCHES
            for gradient in (False, True)
        ]
        for graph in (False, True)
    )
    tweedie = [  # beyond one sample it is the decoder's memory that counts
        (Variant("dps", "tweedie", velocity), 1, gradient)
        for velocity in ("null", "cfg")
        for gradient in (False, True)
    ]
    return [*stitched, *tweedie, *graphed]  # each recording leaves some memory behind


def value_record(
    rig: Rig, paper: Paper, variant: Variant, size: int, gradient: bool, repeats: int
) -> Record:
    """Returns what a call costs: seconds, peak memory, FLOPs; or that memory ran out."""
    value = make_value(rig, variant)
    assert value is not None
    stitched = variant.estimator == "stitched"
    name = "stitched" if stitched else f"Tweedie, {variant.velocity}"
    name += ", CUDA graph" * variant.graph
    rig.place(reward=not stitched, model=stitched)  # a peak is of what the value needs
    parts = paper.value(variant)
    record: Record = {
        "benchmark": "value",
        "setup": rig.setup.name,
        "device": rig.device.type,
        "value": name,
        "gradient": gradient,
        "batch_size": size,
        "cuda_graph": variant.graph,
        "variant": f"{name}, batch {size}" + ", with gradient" * gradient,
        "flops": size * (parts.forward + gradient * parts.backward),
    }
    meter = Meter(rig.device)
    meter.start()
    run = call(rig, value, size, gradient)
    try:
        seconds = seconds_of(run, rig.device, repeats)
    except torch.OutOfMemoryError:
        return record | {"error": "out of memory"}
    meter.stop()
    record |= {"seconds": seconds, "peak_memory_gib": meter.peak_gib}
    if variant.graph:
        plain = make_value(rig, replace(variant, graph=False))
        assert plain is not None
        eager = call(rig, plain, size, gradient)
        one, other, again = (seeded(each) for each in (run, eager, eager))
        record["difference"] = float((one - other).abs().max() / other.abs().max())
        record["own_difference"] = float((again - other).abs().max() / other.abs().max())
    return record


def seeded(run: Callable[[], Tensor]) -> Tensor:
    """Returns what a call makes of the same latents every time."""
    torch.manual_seed(0)
    return run()


def call(rig: Rig, value: Value, size: int, gradient: bool) -> Callable[[], Tensor]:
    """Returns one call of a value, which returns the gradient, or the value where none is asked for."""
    bound = value.bind(rig.prompts * size)
    t = torch.full((size,), 0.5, device=rig.device)

    def run() -> Tensor:
        shape = (size, rig.generator.latent_channels, *rig.latent_size)
        leaf = torch.randn(shape, device=rig.device, requires_grad=gradient)
        with torch.set_grad_enabled(gradient):
            v = bound(leaf, t)
        return torch.autograd.grad(v.sum(), leaf)[0] if gradient else v

    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    made = parser(__doc__)
    made.add_argument("--setup", nargs="+", default=["world"], choices=[*SAMPLING_SETUPS])
    made.add_argument("--repeats", type=int, default=3, help="calls whose median counts")
    args, device = parse(made, argv)
    rate, records = matmul_rate(device), []
    for number, name in enumerate(args.setup):
        setup = SAMPLING_SETUPS[name]
        torch.manual_seed(0)
        rig = Rig(setup.shrunk() if args.reduced and setup.real else setup, device)
        paper = Paper(rig)
        for variant, size, gradient in cases():
            record = value_record(rig, paper, variant, size, gradient, args.repeats)
            if "seconds" in record:
                record["utilisation"] = record["flops"] / record["seconds"] / rate
            records.append(record | {"matmul_flops_per_s": rate})
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if args.output:
            write(args.output, records, device, args.overwrite or number > 0)
        del rig, paper
    columns = ("setup", "variant", "seconds", "peak_memory_gib", "utilisation")
    columns = (*columns, "difference", "own_difference")
    records = [dict.fromkeys(columns) | record for record in records]
    print(records_to_text(records, rows=columns, column=None))


if __name__ == "__main__":
    main()
