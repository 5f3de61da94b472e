"""Checks of numbers that lie on a GPU, without making the host wait for them.

`require(ok, error)` raises what `error()` returns unless all of `ok` is true. To look at a number on a GPU is to wait
until the GPU has come to it, and in the meantime nothing new is given to it to do. So the loop of a sampler says

    checks = Deferred()
    with checks.collecting():
        ...                       # what is required here of numbers on a GPU is fetched in the background
    checks.settle(keep=n)         # looks at all but the latest n, raising the first error among them

and is at most a step behind. On a CPU, and outside of `collecting`, an error is raised at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["Change", "Deferred", "require", "sent"]

Error = Callable[[], Exception]
Change = Callable[[Exception], Exception]


def require(ok: Tensor, error: Error) -> None:
    """Raises `error()` unless all of `ok` is true; later, if the loop around it defers that and `ok` is on a GPU.

    Arguments:
        ok: Booleans, with any shape.
        error: Makes the error; it may look at tensors.
    """
    if ok.is_meta:  # where FLOPs are counted there are no numbers
        return
    collector = _collector.get()
    if collector is not None and ok.device.type == "cuda":
        collector(ok, error)
    elif not bool(ok.all()):
        raise error()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on a device; nobody waits for the copy."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Deferred:
    """What is still to be looked at, the oldest first."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, torch.cuda.Event, Error]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def collecting(self, change: Change | None = None) -> Iterator[None]:
        """Puts off what is required of numbers on a GPU in here.

        Arguments:
            change: Is given an error and returns the one to raise, e.g. with the step that it came up in.
        """

        def collect(ok: Tensor, error: Error) -> None:
            answer = ok.all().to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(ok.device))
            self._waiting.append((answer, copied, lambda: _changed(error(), change)))

        token = _collector.set(collect)
        try:
            yield
        finally:
            _collector.reset(token)

    @contextmanager
    def coming_first(self) -> Iterator[None]:
        """Raises the error of a check that was put off instead of one that comes up in here: it may be its cause."""
        try:
            yield
        except Exception:
            self.settle()
            raise

    def settle(self, keep: int = 0) -> None:
        """Looks at what was put off, but for the latest `keep`, and raises the error of the oldest that failed."""
        while len(self._waiting) > keep:
            answer, copied, error = self._waiting.popleft()
            copied.synchronize()
            if not bool(answer):
                self._waiting.clear()
                raise error()


def _changed(error: Exception, change: Change | None) -> Exception:
    if change is None:
        return error
    other = change(error)
    if other is not error:
        other.__cause__ = error
    return other


_collector: ContextVar[Callable[[Tensor, Error], None] | None] = ContextVar(
    "collector", default=None
)
