"""Seconds of the stages of an update, without making a GPU wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Stages"]


class Stages:
    """Adds up the seconds spent in named stages, which do not overlap.

    On a GPU it records events and reads them when asked, on a CPU the clock.

    Arguments:
        device: The device that works.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[tuple[object, object]]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts what happens inside to a stage."""
        start = self._mark()
        try:
            yield
        finally:
            self._spans[name].append((start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Returns the seconds by stage since the last call; a GPU must have finished."""
        spans, self._spans = self._spans, defaultdict(list)
        return {name: sum(self._between(*span) for span in each) for name, each in spans.items()}

    def _mark(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: object, end: object) -> float:
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return start.elapsed_time(end) / 1000
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
