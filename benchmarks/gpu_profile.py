"""Where the device's time goes, by operator: one step of stage 2, or of guidance by a stitched value.

    python benchmarks/gpu_profile.py --of distillation --device cuda --output results/h200/profile_distillation.json
    python benchmarks/gpu_profile.py --of guidance --device cuda

A torch.profiler table is printed and, beside the JSON file, written as text. "busy" is the kernels' time over the
wall's without the profiler, which slows Python down: what is missing to 1 the device spent waiting for Python, for a
synchronisation or for data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from common import parse, parser, seconds_of, synchronize, write
from sampling_setups import SAMPLING_SETUPS, Rig
from sampling_steps import run_short
from sampling_variants import Variant, make_value
from setups import SETUPS
from steps import Run
from steps import Variant as Step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Record = dict[str, Any]
OPERATORS = 25
STEPS = 4  # of guidance


def distillation(device: torch.device, reduced: bool) -> tuple[Callable[[], None], str]:
    """Returns one micro-batch of stage 2 at 512², optimiser included, and what it is."""
    setup = SETUPS["sd35m_512"]
    setup = setup.shrunk() if reduced else setup
    run = Run(setup, device)
    batch = run.batch(Step(setup.batch_size, setup.noise_levels))
    run.module.noise_levels = setup.noise_levels
    run.setup = replace(setup, accumulate=1)  # every step has an optimiser's
    return lambda: run.step(batch), f"{setup.name}, batch {setup.batch_size}, one optimiser step"


def guidance(device: torch.device, reduced: bool) -> tuple[Callable[[], None], str]:
    """Returns a short run of guidance by a stitched value at 1024², and what it is."""
    setup = SAMPLING_SETUPS["sd35m_1024"]
    rig = Rig(setup.shrunk() if reduced else setup, device)
    variant = Variant("dps", "stitched", graph=device.type == "cuda")
    value = make_value(rig, variant)

    def call() -> None:
        run_short(rig, variant, STEPS, time.perf_counter, value)

    return call, f"{setup.name}, {variant.name}, {STEPS} steps and decoding"


def profiled(call: Callable[[], None], device: torch.device) -> tuple[list[Record], str]:
    """Returns a record of the whole and of each of the top operators, and the profiler's table."""
    plain = seconds_of(call, device, repeats=1)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities) as found:
        start = time.perf_counter()
        call()
        synchronize(device)
        wall = time.perf_counter() - start
    averages = found.key_averages()
    of = "self_device_time_total" if cuda else "self_cpu_time_total"
    # an operator's own time on the device is that of its kernels, which stand in the list, too
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    own = [e for e in averages if e.device_type == kind and not e.is_user_annotation]
    total = sum(getattr(e, of) for e in own) / 1e6
    operators = [e for e in averages if e.device_type == DeviceType.CPU and getattr(e, of) > 0]
    operators.sort(key=lambda e: -getattr(e, of))
    records: list[Record] = [
        {"operator": "all", "seconds": plain, "profiled_seconds": wall, "device_seconds": total}
    ]
    for event in operators[:OPERATORS]:
        seconds = getattr(event, of) / 1e6
        records.append(
            {"operator": event.key, "calls": event.count, "device_seconds": seconds}
            | {"share": seconds / total if total else None}
        )
    return records, averages.table(sort_by=of, row_limit=OPERATORS, max_name_column_width=60)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    made = parser(__doc__)
    known = {"distillation": distillation, "guidance": guidance}
    made.add_argument("--of", default="distillation", choices=[*known])
    args, device = parse(made, argv)
    torch.manual_seed(0)
    call, what = known[args.of](device, args.reduced)
    records, table = profiled(call, device)
    about = {"benchmark": "profile", "of": args.of, "device": device.type, "variant": what}
    print(f"{what}\n\n{table}\nbusy: {records[0]['device_seconds'] / records[0]['seconds']:.0%}")
    if args.output:
        write(args.output, [about | record for record in records], device, args.overwrite)
        args.output.with_suffix(".txt").write_text(f"{what}\n\n{table}\n")


if __name__ == "__main__":
    main()
