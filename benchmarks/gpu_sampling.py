"""`sampling.py` for one setup, counted before its turn: counts take a CPU tens of seconds that a GPU need not wait for.

    python benchmarks/gpu_sampling.py --setup sd35m_1024 --device cuda --only "DPS" --output results/h200/guidance.json

Everything is measured by `sampling.measure`, and the records are its records. With `--minutes`, no variant is begun
after so long; those left out say so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

from common import parse_device, write
from sampling import Counts, counts, measure
from sampling_setups import SAMPLING_SETUPS, SamplingSetup
from sampling_steps import in_own_process

from stitchvm.results import check_free

LATE = "no time left"  # as `sampling.measure` says it
COUNTED: dict[str, Counts] = {}  # by setup, for this process' one run


def prepare(argv: Sequence[str]) -> None:
    """Counts, in a process of its own that sees no GPU."""
    args = parse(argv)
    count = partial(counts, setup_of(args), args.only, args.device == "cuda")
    if args.device == "cpu":
        COUNTED[args.setup] = in_own_process(count)
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with (
        mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        COUNTED[args.setup] = pool.submit(count).result()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line.

    Raises:
        SystemExit: If variants were left out for want of time; the others are written.
    """
    args = parse(argv)
    device = parse_device(args.device)
    if args.output:
        check_free(args.output, overwrite=args.overwrite)
    deadline = time.perf_counter() + 60 * (args.minutes or float("inf"))
    setup = setup_of(args)
    if args.setup in COUNTED:
        known = COUNTED[args.setup]
        records = measure(setup, device, args, deadline, lambda: known)
    else:
        records = measure(
            setup, device, args, deadline, partial(counts, setup, args.only, device.type == "cuda")
        )
    if args.output:
        write(args.output, records, device, args.overwrite)
    late = [r["variant"] for r in records if r.get("error") == LATE]
    if late:
        raise SystemExit(f"{LATE} for {'; '.join(late)}")


def setup_of(args: argparse.Namespace) -> SamplingSetup:
    """Returns the setup, shrunk if asked."""
    setup = SAMPLING_SETUPS[args.setup]
    return setup.shrunk() if args.reduced and setup.real else setup


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, with all that `sampling.measure` reads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setup", default="world", choices=[*SAMPLING_SETUPS])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", help="variants whose name has one of these in it")
    parser.add_argument("--steps", type=int, default=2, help="steps that are run of every variant")
    parser.add_argument("--repeats", type=int, default=2, help="runs of which the fastest counts")
    parser.add_argument("--minutes", type=float, help="begin no variant after so long")
    parser.add_argument("--compile", help="compile blocks, tail and decoder with this backend")
    parser.add_argument("--reduced", action="store_true", help="shrink every size")
    parser.add_argument("--output", type=Path, help="a JSON file for the records")
    parser.add_argument("--overwrite", action="store_true", help="replace the JSON file")
    args = parser.parse_args(argv)
    args.rate = None  # of counts alone
    return args


if __name__ == "__main__":
    main()
