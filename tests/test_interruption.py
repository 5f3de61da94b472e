"""SIGTERM as an exception of its own, in a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from stitchvm.interruption import Terminated, exit_code, stop_on_sigterm, uninterrupted


@pytest.fixture
def handler():
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, interrupt)


def test_sigterm_is_raised_where_the_work_is(handler) -> None:
    stop_on_sigterm()
    with pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
    assert issubclass(Terminated, KeyboardInterrupt), "Lightning ends on it as on Ctrl-C"


def test_other_threads_leave_it_alone(handler) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_on_sigterm)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_must_not_be_cut_in_two_comes_to_its_end(handler, number: int) -> None:
    stop_on_sigterm()
    kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    before, done = signal.getsignal(number), []
    with pytest.raises(kind), uninterrupted():
        with uninterrupted():
            os.kill(os.getpid(), number)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"] and signal.getsignal(number) is before
    with pytest.raises(ZeroDivisionError), uninterrupted():
        _ = 1 / 0
    assert signal.getsignal(number) is before
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with uninterrupted():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


@pytest.mark.parametrize("place", [2, 3])
def test_a_signal_at_either_end_leaves_no_other_waiting_for_ever(
    handler, monkeypatch, place: int
) -> None:
    """Between the handlers of SIGINT and SIGTERM, when one of them is in its place and the other is not."""
    stop_on_sigterm()
    kinds = {2: signal.SIGTERM, 3: signal.SIGINT}
    put, calls = signal.signal, []

    def interrupted(number: int, handler: Any) -> Any:
        calls.append(number)
        if len(calls) == 2 == place:
            os.kill(os.getpid(), kinds[place])  # SIGINT waits already, SIGTERM does not
        before = put(number, handler)
        if len(calls) == 3 == place:
            os.kill(os.getpid(), kinds[place])  # SIGINT waits no longer, SIGTERM does
        return before

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(signal, "signal", interrupted)
        with uninterrupted():
            pass
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_other_threads_hold_nothing_up() -> None:
    found = []

    def work() -> None:
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_exit_codes_are_those_of_shells() -> None:
    assert exit_code(KeyboardInterrupt()) == 130 and exit_code(Terminated()) == 143
    code = (
        "import os, signal; from stitchvm.interruption import *\n"
        "stop_on_sigterm()\n"
        "try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "except KeyboardInterrupt as interrupt: raise SystemExit(exit_code(interrupt))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 143
