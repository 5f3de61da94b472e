"""One part of the GPU benchmarks in a process of its own: what it prints goes to a log, and a time limit ends it.

A process imports what it needs, does what needs no device (`prepare` of its script, where it has one), and waits to be
told to begin. So the next part is made ready while one runs, and the device idles little in between; what runs out of
memory, crashes or hangs costs its own numbers only.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

__all__ = ["PRELOAD", "Worker"]

PRELOAD = ["torch", "lightning.pytorch", "diffusers", "transformers", "open_clip", "peft"]
MARGIN = 0.9  # of its limit, after which a script that can begins nothing new


class Worker:
    """A script in a process of its own, which waits for `run`.

    Arguments:
        context: How processes are started. A GPU needs "spawn": whoever imported diffusers has asked for devices, and
            CUDA does not survive a fork after that.
        script: The script's module; its `main` takes the command line.
        argv: The command line.
        log: The file that gets what it prints.
        minutes: Whether it takes `--minutes`, the time left to it.
    """

    def __init__(
        self,
        context: BaseContext,
        script: str,
        argv: Sequence[str],
        log: Path,
        minutes: bool = False,
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        receiver, self._sender = context.Pipe(duplex=False)
        make: Any = context
        self.process = make.Process(
            target=_work, args=(script, list(argv), log, receiver, self._sender, minutes)
        )
        self.process.start()
        receiver.close()

    def run(self, limit: float) -> tuple[float, str | None]:
        """Lets the script begin; returns its seconds, and what went wrong, if anything did.

        Arguments:
            limit: The seconds after which it is stopped.
        """
        start = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # it has died already
            self._sender.send(limit)
        self.process.join(limit)
        seconds = time.perf_counter() - start
        if self.process.is_alive():
            self.stop()
            return seconds, f"stopped after its limit of {limit:.0f} s"
        code = self.process.exitcode
        return seconds, None if code == 0 else f"exit code {code}: {last_line(self.log)}"

    def stop(self) -> None:
        """Ends the process and those it started, whether or not it has begun."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it leads no group yet
                self.process.kill()
        self.process.join()


def last_line(log: Path) -> str:
    """Returns the line of a log that says most about a failure."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it printed nothing"])[-1][:200]


def _work(
    script: str,
    argv: list[str],
    log: Path,
    receiver: Connection,
    sender: Connection,
    minutes: bool,
) -> None:
    os.setsid()  # what it starts ends with it
    sender.close()  # else the end of the parent would not be seen
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = [f"{script}.py", *argv]
    code = 0
    try:
        module = importlib.import_module(script)
        if hasattr(module, "prepare"):
            module.prepare(argv)
        limit = receiver.recv()
        more = ["--minutes", f"{MARGIN * limit / 60:.2f}"] if minutes else []
        print(script, *argv, *more, flush=True)
        module.main([*argv, *more])
    except EOFError:
        code = 1
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code)
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:  # a crash is a result, too
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
