"""SIGTERM ends a run as Ctrl-C does, and is told apart from it by its exit code."""

from __future__ import annotations

import signal
import threading
from types import FrameType

__all__ = ["Terminated", "exit_code", "stop_on_sigterm"]


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def stop_on_sigterm() -> None:
    """Lets SIGTERM raise `Terminated` from now on; in other threads than the main one it does nothing.

    Lightning notes SIGTERM down and looks at it between training batches only: a prediction would go on until killed.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)


def exit_code(interrupt: BaseException) -> int:
    """Returns the exit code that shells expect of an interrupted process: 128 + the signal's number."""
    number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
    return 128 + int(number)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Terminated
