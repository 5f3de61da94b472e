"""Training-time alignment measured: DRaFT-1, DRaFT-3 and DiffusionNFT, terminal reward against stitched value.

    python benchmarks/training.py                                        the world, on a CPU
    python benchmarks/training.py --setup sd35m --device cuda            real size, random weights
    python benchmarks/training.py --setup sd35m --device cuda --checkpointing
    python benchmarks/training.py --setup sd35m sd35m_205 --count        FLOPs only, on any machine
    python benchmarks/training.py --setup sd35m --reduced                the same code, every size shrunk

Seconds are of 1,000 samples of roll-out, value and update, by the module's own stages. Each way runs its roll-outs and
`--losses` losses at full micro-batch size, at the first and the last stop of its window (the mean of both is that of
the window), and the rest is added up by its count (`stitchvm.modules.cost`); each time is the least of `--repeats`. On
a CPU each way has a process of its own, so that peaks compare; on CUDA the peak is the allocator's. Utilisation leaves
out what gradient checkpointing runs again. Encoding prompts, the optimiser's step and evaluation are left out.

Counts: "rough" takes a backward pass for as much as a forward pass, and adapters for nothing, as a count by hand does.
In truth attention costs twice as much backward.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import autocast, chosen, load, matmul_rate, parse_device, write
from sampling_flops import meta_sampling
from sampling_steps import in_own_process
from training_report import SAMPLES, Record, add_times, ratio_records, show, training_record
from training_setups import TRAINING_SETUPS, Trained, TrainingSetup, build, trainings

from stitchvm.data.world_prompts import world_captions
from stitchvm.modules.alignment import Alignment
from stitchvm.modules.cost import Plan, Prices
from stitchvm.modules.cost_flops import counted_prices, no_checkpointing
from stitchvm.modules.cost_measure import WarmUp, measure, some_rows
from stitchvm.modules.cost_report import forwards_of, plan_of
from stitchvm.results import check_free

PROMPTS = 64


@dataclass
class Known:
    """What the methods with one value share.

    Attributes:
        prices: FLOPs of each kind of call, without and with what is run again.
        parts: The networks, on the meta device, where they cost nothing to keep.
    """

    prices: tuple[Prices, Prices]
    parts: Any = None


def one(
    setup: TrainingSetup,
    trained: Trained,
    device: torch.device,
    args: argparse.Namespace,
    known: Known | None,
) -> tuple[Record, list[WarmUp], Known]:
    """Returns the counts of one way of fine-tuning and, but for the meta device, what was measured of it."""
    torch.manual_seed(0)
    meta = device.type == "meta"
    with meta_sampling() if meta else nullcontext():
        module = build(setup, trained, device, known.parts if known else None)
        plan = plan_of(module)
        if known is None:
            with no_checkpointing(module._built.generator, module._built.value):
                model = counted_prices(module)
            run = counted_prices(module) if trained.checkpointing else model
            known = Known((model, run), module.parts if meta else None)
        if args.compile:
            module.generator.compile_blocks(args.compile)
        runs = [] if meta else timed(module, plan, args)
    record = training_record(trained, plan, *known.prices, forwards_of(module, known.prices[0]))
    return record, runs, known


def timed(module: Alignment, plan: Plan, args: argparse.Namespace) -> list[WarmUp]:
    """Returns what 1,000 samples take, from short runs at the first and the last stop."""
    captions = world_captions("train", PROMPTS)
    with torch.no_grad():
        module.generator.encode_prompts(captions)  # kept
    runs = []
    for stop in sorted({plan.window.low, plan.window.high}) * args.repeats:
        rows = some_rows(module, plan, captions, args.losses, stop)
        runs.append(
            measure(
                module,
                rows,
                plan,
                forwards_of(module, None),
                total=SAMPLES,
                losses=args.losses,
                context=partial(autocast, module.device),
            )
        )
    return runs


def setup_records(
    setup: TrainingSetup, device: torch.device, args: argparse.Namespace
) -> list[Record]:
    """Counts and measures one setup, prints its tables and returns its records."""
    apart: Callable[[Callable[[], Any]], Any] = (
        in_own_process if device.type == "cpu" else lambda call: call()
    )
    about: Record = {"benchmark": "training", "setup": setup.name, "device": device.type}
    listed = trainings(args.checkpointing)
    if device.type == "meta":  # at all levels above τ, as the count beforehand has it
        listed.append(Trained("NFT", "stitched", args.checkpointing, (("fraction", 1.0),)))
    listed = [t for t in listed if chosen(t.name, args.only)]
    rate = 0.0 if device.type == "meta" else matmul_rate(device)
    records: list[Record] = []
    found: list[tuple[Record, list[WarmUp]]] = []
    known: dict[str, Known] = {}
    for trained in listed:
        try:
            value = trained.estimator
            record, runs, known[value] = apart(
                partial(one, setup, trained, device, args, known.get(value))
            )
            found.append((record, runs))
        except (MemoryError, torch.OutOfMemoryError) as error:
            print(f"{trained.name}: {error}")
            records.append(about | {"variant": trained.name, "error": "out of memory"})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if device.type != "meta":  # the best product seen is the nearest to what the device can do
        rate = max(rate, matmul_rate(device))
    for record, runs in found:
        if runs:
            add_times(record, runs, rate)
            record["load"] = load()
        records.append(about | record | {"compile": args.compile})
    counted = [r for r in records if "flops" in r]
    ratios = [about | ratio for ratio in ratio_records(counted)]
    show(setup, device.type, counted, ratios)
    if rate:
        print(f"\nmatrix products: {rate / 1e12:.3g} TFLOP/s")
    return [*records, *ratios]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--setup", nargs="+", default=["world"], choices=list(TRAINING_SETUPS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", help="ways whose name has one of these in it")
    parser.add_argument("--count", action="store_true", help="count FLOPs only, running nothing")
    parser.add_argument("--losses", type=int, default=2, help="losses sent backwards of each way")
    parser.add_argument("--repeats", type=int, default=2, help="runs of which the fastest counts")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument(
        "--compile", nargs="?", const="inductor", help="compile the generator's blocks"
    )
    parser.add_argument("--reduced", action="store_true", help="shrink every size")
    parser.add_argument("--output", type=Path, help="a JSON file for the records")
    parser.add_argument("--overwrite", action="store_true", help="replace the JSON file")
    args = parser.parse_args(argv)
    device = parse_device("meta" if args.count else args.device)
    if args.output:
        check_free(args.output, overwrite=args.overwrite)
    records: list[Record] = []
    for number, name in enumerate(dict.fromkeys(args.setup)):
        setup = TRAINING_SETUPS[name]
        records += setup_records(
            setup.shrunk() if args.reduced and setup.real else setup, device, args
        )
        if args.output:
            write(args.output, records, device, args.overwrite or number > 0)


if __name__ == "__main__":
    main()
