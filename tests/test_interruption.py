"""SIGTERM as an exception of its own, in a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from stitchvm.interruption import Terminated, exit_code, stop_on_sigterm


@pytest.fixture
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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


def test_exit_codes_are_those_of_shells() -> None:
    assert exit_code(KeyboardInterrupt()) == 130 and exit_code(Terminated()) == 143
    code = (
        "import os, signal; from stitchvm.interruption import *\n"
        "stop_on_sigterm()\n"
        "try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "except KeyboardInterrupt as interrupt: raise SystemExit(exit_code(interrupt))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 143
