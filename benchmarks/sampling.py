"""Inference-time alignment measured: what plain sampling, guidance, FK steering and best-of-N cost, side by side.

    python benchmarks/sampling.py                                                the world, on a CPU
    python benchmarks/sampling.py --setup sd35m_1024 --device cuda               real sizes, random weights
    python benchmarks/sampling.py --setup sd35m_1024 --count                     FLOPs only, on any machine
    python benchmarks/sampling.py --setup sd35m_1024 --reduced                   the same code, every size shrunk

One prompt at a time. Few steps of every variant are run and the full run is added up from them: its first step, every
other kind of step as often as it occurs, and its end (judging particles, decoding the sample); each time is the least
of `--repeats`. Encoding prompts is left out. On a CPU each variant has a process of its own, forked once the networks
are loaded, so that peaks compare; on CUDA the peak is the allocator's. What a value costs is given in passes of the
generator three times: on paper, counted on the calls, and in measured time.

Everything real on one H200, in under ten minutes (see `everything`):

    python benchmarks/sampling.py --setup real --device cuda --minutes 9 --output results/h200/benchmark_sampling.json
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import chosen, load, matmul_rate, parse_device, write
from sampling_counts import Paper, Part, Units
from sampling_flops import counted_parts, counted_units, meta_sampling
from sampling_report import Outcome, part_records, ratio_records, show, variant_records
from sampling_setups import SAMPLING_SETUPS, Rig, SamplingSetup
from sampling_steps import in_own_process, measured, part_seconds
from sampling_tuning import Tuning, attention, tune
from sampling_variants import Variant, make_sampler, plan, variants

from stitchvm.results import check_free

Record = dict[str, Any]


Counts = tuple[Paper, Paper, dict[str, Part], dict[Variant, Units]]


def counts(
    setup: SamplingSetup, only: Sequence[str] | None = None, graphs: bool = False
) -> Counts:
    """Returns FLOPs without running anything: on paper, roughly, and counted on the calls of parts and variants."""
    with meta_sampling():
        rig = Rig(setup, torch.device("meta"))
        plain, *rest = variants(rig.branches == 2, setup.fk, graphs)
        listed = [plain, *(v for v in rest if chosen(v.name, only))]
        return Paper(rig), Paper(rig, rough=True), counted_parts(rig), counted_units(rig, listed)


def measure(
    setup: SamplingSetup,
    device: torch.device,
    args: argparse.Namespace,
    deadline: float,
    counting: Callable[[], Counts],
) -> list[Record]:
    """Measures one setup, or only counts, prints its tables and returns its records."""
    torch.manual_seed(0)
    apart: Callable[[Callable[[], Any]], Any] = (
        in_own_process if device.type == "cpu" else lambda call: call()
    )
    paper, rough, parts, units = counting()
    outcomes = {
        v: Outcome(
            v,
            plan(make_sampler(setup, v), u.continued < u.fresh),
            paper.units(v),
            rough.units(v),
            u,
        )
        for v, u in units.items()
    }
    seconds: dict[str, tuple[float, float]] = {}
    tuning: Tuning | None = None
    errors: dict[Variant, str] = {}
    about: Record = {"benchmark": "sampling", "setup": setup.name, "device": device.type}
    if device.type != "meta":
        about["matmul_flops_per_s"] = matmul_rate(device)
        rig = Rig(setup, device)
        if args.compile:  # each choice, each part would be compiled for itself
            rig.compile(args.compile)
            tuning = Tuning("auto", "contiguous", rig.generator.vae.dtype, [])
        else:
            tuning, seconds = apart(lambda: prepare(rig, args.repeats))
        tuning.apply(rig)
        print(f"\n{setup.name}: {rig.dtypes}; attention {tuning.attention}, VAE {tuning.layout}")
        for v, outcome in outcomes.items():
            if time.perf_counter() > deadline:
                errors[v] = "no time left"
                continue
            try:
                with attention(tuning.attention):
                    outcome.measured, outcome.memory = apart(
                        lambda v=v: measured(rig, v, args.steps, args.repeats)
                    )
            except torch.OutOfMemoryError:
                errors[v] = "out of memory"
        # the best product seen is the nearest to what the device can do
        about["matmul_flops_per_s"] = max(about["matmul_flops_per_s"], matmul_rate(device))
        about |= {"dtypes": rig.dtypes, "compile": args.compile, "load": load()}
        del rig
        gc.collect()
    records = variant_records(
        list(outcomes.values()),
        paper.branches,
        about.get("matmul_flops_per_s"),
        1e12 * args.rate if device.type == "meta" else None,
    )
    for v, record in zip(outcomes, records, strict=True):
        record |= {"error": errors[v]} if v in errors else {}
    described = part_records(paper.parts, parts, seconds)
    ratios = ratio_records(setup, records)
    show(setup, device.type, described, records, ratios)
    if device.type == "meta":
        short = sum(
            u.sample(v, plan(make_sampler(setup, v, args.steps), u.continued < u.fresh))
            for v, u in units.items()
        )
        seconds_taken = args.repeats * short / (1e12 * args.rate / 3)
        print(f"to measure this: {seconds_taken:.0f} s at a third of {args.rate:g} TFLOP/s")
    if "matmul_flops_per_s" in about:
        print(f"matrix products: {about['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s")
    tried = tuning.records if tuning else []
    return [about | record for record in [*tried, *described, *records, *ratios]]


def prepare(rig: Rig, repeats: int) -> tuple[Tuning, dict[str, tuple[float, float]]]:
    """Returns what is fastest, and with it the seconds of each part of the computation."""
    tuning = tune(rig, repeats)
    with attention(tuning.attention):
        return tuning, part_seconds(rig, repeats)


def leave_devices() -> None:
    """Keeps a process that only counts off the GPUs."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def everything(
    names: Sequence[str], device: torch.device, args: argparse.Namespace
) -> list[Record]:
    """Measures setups one after the other and writes the results after each: a run cut short leaves what it has.

    With `--minutes`, no variant is begun after so long; those left out say so. All real setups take one H200 under ten
    minutes by their count (`--count`) at a third of its rate:

        python benchmarks/sampling.py --setup real --device cuda --minutes 9 \\
            --output results/h200/benchmark_sampling.json
    """
    deadline = time.perf_counter() + 60 * (args.minutes or float("inf"))
    setups = [SAMPLING_SETUPS[name] for name in names]
    setups = [setup.shrunk() if args.reduced and setup.real else setup for setup in setups]
    records: list[Record] = []
    with ExitStack() as stack:
        counting: list[Callable[[], Counts]]
        if device.type == "cuda":  # it would wait for the counts
            context = multiprocessing.get_context("spawn")
            workers = min(len(setups), max(1, (os.cpu_count() or 2) // 2))
            pool = stack.enter_context(
                ProcessPoolExecutor(workers, mp_context=context, initializer=leave_devices)
            )
            counting = [pool.submit(counts, setup, args.only, True).result for setup in setups]
        elif device.type == "cpu":
            counting = [partial(in_own_process, partial(counts, s, args.only)) for s in setups]
        else:
            counting = [partial(counts, setup, args.only) for setup in setups]
        for number, (setup, counted) in enumerate(zip(setups, counting, strict=True)):
            records += measure(setup, device, args, deadline, counted)
            if args.output:
                write(args.output, records, device, args.overwrite or number > 0)
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--setup",
        nargs="+",
        default=["world"],
        choices=[*SAMPLING_SETUPS, "real"],
        help="real: all but the world",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", help="variants whose name has one of these in it")
    parser.add_argument("--count", action="store_true", help="count FLOPs only, running nothing")
    parser.add_argument("--rate", type=float, default=790, help="TFLOP/s that --count assumes")
    parser.add_argument("--steps", type=int, default=2, help="steps that are run of every variant")
    parser.add_argument("--repeats", type=int, default=2, help="runs of which the fastest counts")
    parser.add_argument("--minutes", type=float, help="begin no variant after so long")
    parser.add_argument(
        "--compile", nargs="?", const="inductor", help="compile blocks, tail and decoder"
    )
    parser.add_argument("--reduced", action="store_true", help="shrink every size")
    parser.add_argument("--output", type=Path, help="a JSON file for the records")
    parser.add_argument("--overwrite", action="store_true", help="replace the JSON file")
    args = parser.parse_args(argv)
    device = parse_device("meta" if args.count else args.device)
    if args.output:
        check_free(args.output, overwrite=args.overwrite)
    real = [name for name, setup in SAMPLING_SETUPS.items() if setup.real]
    names = [n for name in args.setup for n in (real if name == "real" else [name])]
    everything(list(dict.fromkeys(names)), device, args)


if __name__ == "__main__":
    main()
