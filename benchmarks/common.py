"""How things are measured: seconds with the device waited for, FLOPs counted on the calls themselves, memory."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from stitchvm.modules.distillation import StitchDistillation
from stitchvm.results import check_free, command_line, write_results

__all__ = [
    "Laps",
    "Reader",
    "autocast",
    "chosen",
    "clock",
    "instrumented",
    "load",
    "matmul_rate",
    "parse",
    "parse_device",
    "parser",
    "peak_memory",
    "reset_memory",
    "seconds_of",
    "synchronize",
    "write",
]

Reader = Callable[[], float]


def chosen(name: str, words: Sequence[str] | None) -> bool:
    """Returns whether a name has one of the words in it, or is one: "=DPS stitched". All are chosen without words."""
    return not words or any(w[1:] == name if w.startswith("=") else w in name for w in words)


def parse_device(name: str) -> torch.device:
    """Returns a device.

    Raises:
        SystemExit: If it is CUDA and there is none.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: torch sees no CUDA device. On a CPU use --setup world, or --reduced for any "
            "setup; --count counts the FLOPs of the real sizes without running them."
        )
    return device


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with what benchmarks have in common, described by the first line of a docstring."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--reduced", action="store_true", help="shrink every size")
    made.add_argument("--output", type=Path, help="a JSON file for the records")
    made.add_argument("--overwrite", action="store_true", help="replace the JSON file")
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, torch.device]:
    """Returns the arguments and the device; ends if there is no such device, or results would be written over."""
    args = made.parse_args(argv)
    device = parse_device(args.device)
    if args.output:
        check_free(args.output, overwrite=args.overwrite)
    return args, device


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> Reader:
    """Returns a clock: seconds of the wall once the device is done, or of this process where it has one CPU thread.

    The two agree on a quiet machine; on a shared one a process' own time leaves out most of what others do.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time

    def read() -> float:
        synchronize(device)
        return time.perf_counter()

    return read


def autocast(device: torch.device) -> torch.autocast:
    """Returns bfloat16 autocast on CUDA, as `precision: bf16-mixed` has it; none elsewhere: the world is float32."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def seconds_of(
    call: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 1
) -> float:
    """Returns the median seconds of a call that ends when the device is done."""
    for _ in range(warmup):
        call()
    times, now = [], clock(device)
    for _ in range(repeats):
        start = now()
        call()
        times.append(now() - start)
    return statistics.median(times)


def matmul_rate(
    device: torch.device, dtype: torch.dtype | None = None, size: int | None = None
) -> float:
    """Returns the FLOP/s of a large matrix product: bfloat16 on CUDA, float32 on a CPU, unless told."""
    cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    size = size or (8192 if cuda else 1024)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: a @ b, device, repeats=10, warmup=3)


def reset_memory(device: torch.device) -> None:
    """Forgets the peak so far (CUDA; a process' peak cannot be reset)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Returns GiB: the allocator's peak since `reset_memory` on CUDA, the process' peak so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def load() -> float:
    """Returns the machine's load average over the last minute: timings are worth less when it exceeds our threads."""
    return round(os.getloadavg()[0], 2)


def write(
    path: Path, records: list[dict[str, Any]], device: torch.device, overwrite: bool
) -> None:
    """Writes a benchmark's records with command, load average and kind of clock, and says where."""
    command = command_line().replace("python ", "python benchmarks/", 1)
    extra = {"load": load(), "clock": "process" if clock(device) is time.process_time else "wall"}
    write_results(path, records, command=command, overwrite=overwrite, extra=extra)
    print(f"\nrecords: {path}")


class Laps:
    """Adds up what a reader gains between laps, by name.

    Arguments:
        read: Returns a number that grows: seconds, or FLOPs.
    """

    def __init__(self, read: Reader) -> None:
        self.read, self.last = read, read()
        self.sums: dict[str, float] = {}

    @classmethod
    def of_seconds(cls, device: torch.device) -> Laps:
        """Returns laps of seconds; each waits for the device."""
        return cls(clock(device))

    @classmethod
    def of_flops(cls, counter: FlopCounterMode) -> Laps:
        """Returns laps of the FLOPs a counter saw (2 per multiply-add)."""
        return cls(lambda: float(counter.get_total_flops()))

    def lap(self, name: str) -> None:
        """Charges what was gained since the last lap to `name`."""
        now = self.read()
        self.sums[name] = self.sums.get(name, 0.0) + now - self.last
        self.last = now


@contextmanager
def instrumented(module: StitchDistillation, laps: Laps) -> Iterator[None]:
    """Charges VAE, teacher, prefix and student inside `losses` to their names; what lies between is "other"."""
    model = module.value_model
    assert model is not None
    parts: list[tuple[Any, str, str]] = [
        (module.vae, "encode", "vae"),
        (module.teacher, "embed", "teacher"),
        (model.backbone, "forward", "prefix"),
        (model.stitch, "forward", "student"),
        (model.tail, "forward", "student"),
    ]

    def wrapped(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            laps.lap("other")
            answer = call(*args, **kwargs)
            laps.lap(name)
            return answer

        return run

    for owner, method, name in parts:
        owner.__dict__[method] = wrapped(getattr(owner, method), name)
    try:
        yield
    finally:
        for owner, method, _ in parts:
            del owner.__dict__[method]
