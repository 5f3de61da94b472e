"""SIGTERM ends a run as Ctrl-C does, and is told apart from it by its exit code; what must not be cut in two is not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

__all__ = ["Terminated", "exit_code", "stop_on_sigterm", "uninterrupted"]


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def stop_on_sigterm() -> None:
    """Lets SIGTERM raise `Terminated` from now on; in other threads than the main one it does nothing.

    Lightning notes SIGTERM down and looks at it between training batches only: a prediction would go on until killed.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets what is inside come to its end before SIGINT and SIGTERM do what they do; in the main thread only."""
    waiting: list[Callable[[], object]] = []
    inside, before = True, {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if callable(handler)}

    def later(handler: Any, *how: Any) -> None:
        if inside:
            waiting.append(partial(handler, *how))
        else:  # another signal has kept the handler from being put back
            handler(*how)

    try:
        for number, handler in before.items():
            signal.signal(number, partial(later, handler))
        yield
    finally:
        inside = False
        for number, handler in before.items():
            signal.signal(number, handler)
        for raise_it in waiting:
            raise_it()


def exit_code(interrupt: BaseException) -> int:
    """Returns the exit code that shells expect of an interrupted process: 128 + the signal's number."""
    number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
    return 128 + int(number)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Terminated
