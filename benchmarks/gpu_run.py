"""Runs parts one after the other, keeps what has become of each, and goes on where an earlier run stopped."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_plan import Part
from gpu_worker import PRELOAD, Worker

from stitchvm.results import command_line, read_results, write_results

__all__ = ["Runs", "command", "run"]

Record = dict[str, Any]
STATES = "gpu.json"
SHORT = {"estimate": 10.0, "limit": 300.0}  # seconds of a reduced part


class Runs:
    """A folder of results and what has become of every part.

    Arguments:
        folder: The folder.
        device: "cpu" or "cuda".
        reduced: Whether sizes are shrunk.

    Attributes:
        states: What has become of every part.
        about: The machine and versions of the last run.

    Raises:
        SystemExit: If the folder holds results of another kind.
    """

    def __init__(self, folder: Path, device: str, reduced: bool) -> None:
        self.folder, self.device, self.reduced = folder, device, reduced
        self.states: dict[str, Record] = {}
        self.about: Record = {}
        path = folder / STATES
        if path.is_file():
            known = read_results(path)
            self.about = {key: known[key] for key in ("machine", "versions")}
            for record in known["records"]:
                if (record["device"], record["reduced"]) != (device, reduced):
                    kind = f"{'reduced ' * record['reduced']}results on {record['device']}"
                    raise SystemExit(f"gpu: {folder} holds {kind}; give another --output")
                self.states[record["part"]] = record

    def done(self, part: Part) -> bool:
        """Returns whether a part is done, and its results are there."""
        known = self.states.get(part.name, {}).get("state")
        return known == "done" and part.output(self.folder).is_file()

    def note(self, part: Part, state: str, message: str | None = None, **more: Any) -> None:
        """Keeps what has become of a part, in the file too, and prints it."""
        record = {"benchmark": "gpu", "part": part.name, "state": state, "message": message}
        record |= {"device": self.device, "reduced": self.reduced, "what": part.what}
        self.states[part.name] = record | more
        path = self.folder / STATES
        write_results(path, self.states.values(), command=command(), overwrite=True)
        self.about = {key: read_results(path)[key] for key in ("machine", "versions")}
        seconds = f" {more['seconds']:.0f} s" if "seconds" in more else ""
        print(f"{part.name}: {state}{seconds}{f' ({message})' if message else ''}", flush=True)

    def results(self, plan: Sequence[Part]) -> dict[str, list[Record]]:
        """Returns the records there are, by part."""
        paths = {part.name: part.output(self.folder) for part in plan}
        return {n: list(read_results(p)["records"]) for n, p in paths.items() if p.is_file()}


def command() -> str:
    """Returns the command that is running."""
    return command_line().replace("python ", "python benchmarks/", 1)


def run(runs: Runs, plan: Sequence[Part], seconds: float, longest: float = float("inf")) -> None:
    """Runs the parts that are not done and fit into the seconds left; on a GPU the next one is prepared meanwhile."""
    deadline = time.perf_counter() + seconds
    cuda = runs.device == "cuda"
    context: Any = multiprocessing.get_context("spawn" if cuda else "forkserver")
    if not cuda:
        context.set_forkserver_preload(PRELOAD)
    workers: dict[str, Worker] = {}
    todo = [part for part in plan if not runs.done(part) and (cuda or not part.gpu_only)]
    for part in plan:
        if runs.done(part):
            print(f"{part.name}: done before")
        elif part not in todo:
            runs.note(part, "skipped", "it needs a GPU")

    def ready(part: Part) -> Worker:
        if part.name not in workers:
            argv = part.command(runs.folder, runs.device, runs.reduced)
            log = runs.folder / "log" / f"{part.name}.txt"
            workers[part.name] = Worker(context, part.script, argv, log, part.minutes)
        return workers[part.name]

    def estimate(part: Part) -> float:
        return SHORT["estimate"] if runs.reduced else part.estimate

    try:
        for number, part in enumerate(todo):
            left = deadline - time.perf_counter()
            needed = estimate(part)
            if needed > left:
                message = f"it needs about {needed:.0f} s, {max(left, 0):.0f} s are left"
                runs.note(part, "skipped", message)
                continue
            worker = ready(part)
            after = next((p for p in todo[number + 1 :] if estimate(p) <= left - needed), None)
            if cuda and after is not None:  # on a CPU it would take time from what is measured
                ready(after)
            limit = min(left, longest, SHORT["limit"] if runs.reduced else part.limit)
            taken, error = worker.run(limit)
            del workers[part.name]
            state = "failed" if error else "done"
            runs.note(part, state, error, seconds=taken, estimate=needed, limit=limit)
    finally:
        for worker in workers.values():
            worker.stop()
