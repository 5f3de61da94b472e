"""What the updates of a run have taken so far: the costs that training curves are drawn against (Figures 4, 5 and 7).

    cost/updates          updates, skipped ones counted
    cost/samples          images that were rolled out and learnt from, of all ranks
    cost/seconds          of the wall, the mean over ranks, which wait for each other
    cost/device_seconds   these times the number of ranks: over 3600 the GPU-hours of Table 3
    cost/cpu_seconds      that the threads of all ranks ran; on a shared machine they leave out what others took

Only updates count: neither evaluations nor checkpoints, loading or the encoding of prompts ahead. Data loaders' worker
processes are not in `cpu_seconds`. The totals are checkpointed, so that a resumed run goes on counting.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

__all__ = ["COSTS", "Spent"]

COSTS = ("updates", "samples", "seconds", "device_seconds", "cpu_seconds")


class Spent:
    """Adds up what updates take.

    Attributes:
        totals: The totals by name, the same on all ranks.
    """

    def __init__(self) -> None:
        self.totals = dict.fromkeys(COSTS, 0.0)

    def start(self) -> None:
        """An update begins."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self, device: torch.device) -> dict[str, float]:
        """An update ended: returns its `seconds` and `cpu_seconds` on this rank, the device waited for."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
        }

    def add(self, seconds: float, cpu_seconds: float, samples: int, ranks: int) -> None:
        """Adds an update.

        Arguments:
            seconds: The mean over ranks of what `stop` returned.
            cpu_seconds: The same.
            samples: The images of one rank.
            ranks: The number of ranks.
        """
        own = (1, samples * ranks, seconds, seconds * ranks, cpu_seconds * ranks)
        for name, cost in zip(COSTS, own, strict=True):
            self.totals[name] += cost

    def scalars(self) -> dict[str, float]:
        """Returns the totals as they are logged."""
        return {f"cost/{name}": total for name, total in self.totals.items()}

    def load(self, totals: Mapping[str, float]) -> None:
        """Goes on from a checkpoint's `totals`."""
        self.totals = {name: float(totals[name]) for name in COSTS}
