"""Seconds and peak memory of a stretch of work, on a GPU or a CPU, and what to do when memory runs out."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["Meter", "out_of_memory_says"]


class Meter:
    """Measures from `start` to `stop`.

    CUDA: the peak of torch's allocator on that device. Else the peak resident memory of this process, everything in it
    counted: within the stretch where the system can forget an earlier peak (Linux), since its start elsewhere.

    Arguments:
        device: The device that works.

    Attributes:
        seconds: The seconds of the wall, the device waited for.
        cpu_seconds: The seconds that this process' threads ran: on a shared machine they leave out what others took.
        peak_gib: The peak in GiB.
    """

    seconds: float
    cpu_seconds: float
    peak_gib: float

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.resets = device.type != "cuda" and _forget_peak()

    @property
    def memory(self) -> str:
        """What `peak_gib` is, in words."""
        if self.device.type == "cuda":
            return "peak of the CUDA allocator while sampling and decoding a batch"
        within = "while sampling and decoding a batch" if self.resets else "since its start"
        return f"peak resident memory of the whole process {within}"

    def start(self) -> None:
        """Starts the clock and forgets the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.resets:
            _forget_peak()
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Stops the clock and reads the peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_gib = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            self.peak_gib = _peak_resident() if self.resets else _peak_ever()
        self.seconds = time.perf_counter() - self._start
        self.cpu_seconds = time.process_time() - self._cpu


@contextmanager
def out_of_memory_says(message: Callable[[], str]) -> Iterator[None]:
    """Raises MemoryError with a message in place of torch's own error when memory runs out."""
    try:
        yield
    except RuntimeError as error:  # a GPU has torch.OutOfMemoryError, a CPU only words
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(message()) from error
        raise


def _forget_peak() -> bool:
    """Lets Linux forget the peak resident memory of this process; returns whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak_resident() > 0
    except (OSError, ValueError):
        return False


def _peak_resident() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 2**20
    raise ValueError("no VmHWM")


def _peak_ever() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if Path("/proc").is_dir() else 2**30)  # Linux counts KiB, macOS bytes
