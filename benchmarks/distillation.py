"""Stage 2 measured: images/s of the training step, where its time and its FLOPs go, and what a whole run costs.

    python benchmarks/distillation.py                                          the world, on a CPU
    python benchmarks/distillation.py --setup sd35m_512 sd35m_1024 --device cuda
    python benchmarks/distillation.py --setup sd35m_512 --count                FLOPs only, on any machine
    python benchmarks/distillation.py --setup sd35m_512 --reduced              the same code, every size shrunk

The step is the module's own `training_step`, backward and fused AdamW every `accumulate` micro-batches. Its split is
measured with the device waited for after each part, so the parts add up to a little more than the step. The
projection is for the paper's run, 5 epochs over AVA and HPDv2; cached latents are charged with making them once.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import chosen, load, matmul_rate, parse_device, write
from setups import SETUPS, Setup
from steps import PARTS, Run, meta_tensors, reading_rate, variants

from stitchvm.results import check_free, records_to_text

Record = dict[str, Any]
EPOCHS, IMAGES = 5, 685_000  # the paper's: AVA and HPDv2


def part_records(setup: Setup, run: Run, args: argparse.Namespace) -> list[Record]:
    """Returns one record per part of the step of the shipped configuration."""
    base = variants(setup, False)[0]
    counted, analytic = run.flops(base.noise_levels), run.analytic_flops(base.noise_levels)
    times = {} if args.count else run.split(base, args.steps)
    records: list[Record] = []
    for name in PARTS:
        seconds = times[name] / base.batch_size if times else None
        record = {
            "part": name,
            "variant": base.name,
            "ms_per_image": None if seconds is None else 1e3 * seconds,
            "seconds": times.get(name),
            "flops": counted[name],
            "analytic_flops": analytic.get(name),
            "tflops_per_s": None if not seconds else counted[name] / seconds / 1e12,
        }
        records.append(record)
    return records


def variant_records(
    setup: Setup, run: Run, device: torch.device, args: argparse.Namespace, encoding: float
) -> list[Record]:
    """Returns one record per variant: throughput, utilisation, memory, projected GPU-hours.

    `encoding` is the VAE's time per image in seconds.
    """
    per_part = {K: run.flops(K) for K in (1, 2, 4)}
    peak = matmul_rate(device)
    records: list[Record] = []
    lost: list[Record] = []
    for variant in variants(setup, args.compile):
        if not chosen(variant.name, args.only):
            continue
        parts = per_part[variant.noise_levels]
        flops = sum(parts.values()) - (parts["vae"] if variant.cached else 0)
        try:
            seconds, memory = run.rate(variant, args.steps)
        except torch.cuda.OutOfMemoryError:
            run.optimizer.zero_grad()
            print(f"{setup.name}, {variant.name}: out of memory, left out")
            lost.append({"variant": variant.name, "error": "out of memory"})
            continue
        peak = max(peak, matmul_rate(device))
        rate = variant.batch_size / seconds
        record: Record = {
            "variant": variant.name,
            "batch_size": variant.batch_size,
            "noise_levels": variant.noise_levels,
            "cached_latents": variant.cached,
            "compile": variant.compile,
            "seconds": seconds,
            "images_per_second": rate,
            "latents_per_second": rate * variant.noise_levels,
            "peak_memory_gib": memory,
            "flops": flops,
            "matmul_flops_per_s": peak,
            "utilisation": flops * rate / peak,
            "load": load(),
        }
        if setup.reward is not None and not setup.reduced:
            # the same number of images, or of noisy latents: K noise levels of an image against K images
            making = IMAGES * encoding / 3600 if variant.cached else 0.0
            training = EPOCHS * IMAGES / rate / 3600
            record["hours"] = training + making
            record["hours_same_latents"] = training / variant.noise_levels + making
            record["paper_hours"] = setup.paper_hours
        records.append(record)
    for record in records:  # the best product seen is the nearest to what the device can do
        record["utilisation"] *= record["matmul_flops_per_s"] / peak
        record["matmul_flops_per_s"] = peak
    return [*records, *lost]


def giga(number: float | None) -> float | None:
    """Returns a number in units of 10^9."""
    return None if number is None else number / 1e9


def count_records(setup: Setup, run: Run, rate: float) -> list[Record]:
    """Returns, per variant, FLOPs and the GPU-hours they take at half of a device's rate (FLOP/s)."""
    records: list[Record] = []
    for variant in variants(setup, False):
        if variant.batch_size != setup.batch_size:
            continue
        parts = run.flops(variant.noise_levels)
        flops = sum(parts.values()) - (parts["vae"] if variant.cached else 0)
        making = IMAGES * parts["vae"] / (rate / 2) / 3600 if variant.cached else 0.0
        training = EPOCHS * IMAGES * flops / (rate / 2) / 3600
        records.append(
            {
                "variant": variant.name,
                "flops": flops,
                "tflop_per_image": flops / 1e12,
                "hours": training + making,
                "hours_same_latents": training / variant.noise_levels + making,
                "paper_hours": setup.paper_hours,
            }
        )
    return records


def measure(setup: Setup, device: torch.device, args: argparse.Namespace) -> list[Record]:
    """Measures one setup, prints its tables and returns its records."""
    if args.batch_size:
        setup = replace(setup, batch_size=args.batch_size)
    torch.manual_seed(0)
    where = device.type
    common = {"benchmark": "distillation", "setup": setup.name, "device": where}
    with meta_tensors() if args.count else ExitStack():
        run = Run(setup, device)
        parts = part_records(setup, run, args)
        whole = count_records(setup, run, 1e12 * args.rate) if args.count else []
    title = f"{setup.name} on {where}" + (", reduced" if setup.reduced else "")
    print(f"\n{title}: one micro-batch of {parts[0]['variant']}\n")
    columns = ("part", "ms_per_image", "gflop", "gflop_analytic", "tflops_per_s")
    shown = [
        p | {"gflop": giga(p["flops"]), "gflop_analytic": giga(p["analytic_flops"])} for p in parts
    ]
    print(records_to_text(shown, rows=columns, column=None))
    print(f"\nper image {sum(p['flops'] for p in parts) / 1e12:.4g} TFLOP")
    hours = ("hours", "hours_same_latents", "paper_hours")
    if args.count:
        print(f"the paper's {EPOCHS * IMAGES:,} images at half of {args.rate:g} TFLOP/s:\n")
        print(records_to_text(whole, rows=("variant", "tflop_per_image", *hours), column=None))
    else:
        reading = reading_rate(setup, setup.batch_size, args.workers)
        parts.append(
            {"part": "data", "workers": args.workers, "images_per_second": reading, "load": load()}
        )
        print(f"data: {reading:.0f} images/s with {args.workers} workers\n")
        encoding = next(p["ms_per_image"] for p in parts if p["part"] == "vae") / 1e3
        whole = variant_records(setup, run, device, args, encoding)
        keys = ["variant", "images_per_second", "utilisation", "peak_memory_gib"]
        keys += hours if "hours" in whole[0] else ()
        print(records_to_text(whole, rows=keys, column=None))
        print(f"\nmatrix products: {whole[0]['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s")
    return [common | record for record in [*parts, *whole]]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--setup", nargs="+", default=["world"], choices=sorted(SETUPS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", help="variants whose name has one of these in it")
    parser.add_argument("--count", action="store_true", help="count FLOPs only, running nothing")
    parser.add_argument("--rate", type=float, default=790, help="TFLOP/s that --count assumes")
    parser.add_argument("--steps", type=int, default=16, help="micro-batches per measurement")
    parser.add_argument("--batch-size", type=int, help="instead of the setup's own")
    parser.add_argument("--workers", type=int, default=0, help="worker processes that read images")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--reduced", action="store_true", help="shrink every size")
    parser.add_argument("--output", type=Path, help="a JSON file for the records")
    parser.add_argument("--overwrite", action="store_true", help="replace the JSON file")
    args = parser.parse_args(argv)
    device = parse_device("meta" if args.count else args.device)
    if args.output:
        check_free(args.output, overwrite=args.overwrite)
    warnings.filterwarnings("ignore", message=".*self.trainer. reference is not registered.*")
    records: list[Record] = []
    for name in args.setup:
        setup = SETUPS[name]
        small = args.reduced and setup.reward is not None
        records += measure(setup.shrunk() if small else setup, device, args)
    if args.output:
        write(args.output, records, device, args.overwrite)


if __name__ == "__main__":
    main()
