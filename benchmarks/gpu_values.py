"""One call of a value: stitched and Tweedie, without and with its gradient in z_t, at several batch sizes.

    python benchmarks/gpu_values.py --setup sd35m_1024 --device cuda

FLOPs are those counted on paper (`sampling_counts.Paper`, which the counts on the calls confirm): a value and, with
its gradient, the backward pass to the latents. Nothing is shared with a sampler's velocity here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import matmul_rate, parse, parser, seconds_of, write
from sampling_counts import Paper
from sampling_setups import SAMPLING_SETUPS, Rig
from sampling_variants import Variant, make_value

from stitchvm.modules.meter import Meter
from stitchvm.results import records_to_text
from stitchvm.values.base import Value

Record = dict[str, Any]
BATCHES = (1, 4, 8)  # a sample, the paper's N, and N particles with M = 2 proposals


def cases() -> list[tuple[Variant, int, bool]]:
    """Returns values with their batch sizes, without and with a gradient."""
    answer = [
        (Variant("dps", "stitched"), size, gradient)
        for size in BATCHES
        for gradient in (False, True)
    ]
    for velocity in ("null", "cfg"):  # beyond one sample it is the decoder's memory that counts
        answer += [
            (Variant("dps", "tweedie", velocity), 1, gradient) for gradient in (False, True)
        ]
    return answer


def value_record(
    rig: Rig, paper: Paper, variant: Variant, size: int, gradient: bool, repeats: int
) -> Record:
    """Returns what a call costs: seconds, peak memory, FLOPs; or that memory ran out."""
    value = make_value(rig, variant)
    assert value is not None
    stitched = variant.estimator == "stitched"
    name = "stitched" if stitched else f"Tweedie, {variant.velocity}"
    rig.place(reward=not stitched, model=stitched)  # a peak is of what the value needs
    parts = paper.value(variant)
    record: Record = {
        "benchmark": "value",
        "setup": rig.setup.name,
        "device": rig.device.type,
        "value": name,
        "gradient": gradient,
        "batch_size": size,
        "variant": f"{name}, batch {size}" + ", with gradient" * gradient,
        "flops": size * (parts.forward + gradient * parts.backward),
    }
    meter = Meter(rig.device)
    meter.start()
    try:
        seconds = seconds_of(call(rig, value, size, gradient), rig.device, repeats)
    except torch.OutOfMemoryError:
        return record | {"error": "out of memory"}
    meter.stop()
    return record | {"seconds": seconds, "peak_memory_gib": meter.peak_gib}


def call(rig: Rig, value: Value, size: int, gradient: bool) -> Callable[[], None]:
    """Returns one call of a value."""
    bound = value.bind(rig.prompts * size)
    z = torch.randn(size, rig.generator.latent_channels, *rig.latent_size, device=rig.device)
    t = torch.full((size,), 0.5, device=rig.device)

    def run() -> None:
        leaf = z.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            v = bound(leaf, t)
        if gradient:
            torch.autograd.grad(v.sum(), leaf)

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
    print(records_to_text(records, rows=columns, column=None))


if __name__ == "__main__":
    main()
