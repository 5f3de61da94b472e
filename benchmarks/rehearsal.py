"""Rehearsal at full size without a download: checkpoints of the published architectures and layouts, random weights.

    python benchmarks/rehearsal.py --list                                     shapes and counts; writes nothing
    python benchmarks/rehearsal.py --root FOLDER --scale tiny                 write, then run every configuration
    python benchmarks/rehearsal.py --root FOLDER --scale full --only sd35m    SD 3.5 Medium at its real size (16 GB)
    python benchmarks/rehearsal.py --root FOLDER --write                      write only
    python benchmarks/rehearsal.py --root FOLDER --configs 'nft_*'            some configurations

What has been written or has passed is not done again. FOLDER becomes a cache of the hub (see rehearsal_hub.py), with
data/ and runs/ beside it, so that the files in configs/ run as they stand; only numbers that set their size are
overridden (see rehearsal_plan.py). docs/rehearsal.md tells the rest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

from rehearsal_check import rows, table
from rehearsal_data import write_data
from rehearsal_hub import enter
from rehearsal_pipelines import write_pipeline
from rehearsal_rewards import write_reward
from rehearsal_tiny import ARCHITECTURES, scaled_pipelines, scaled_rewards

REPOSITORY = Path(__file__).parents[1]
DONE = "written.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Lists, writes and runs; returns the exit code."""
    args = _parser().parse_args(argv)
    only = tuple(args.only)
    if args.list:
        print(table(rows(args.scale, only)))
        return 0
    if args.root is None:
        raise SystemExit("rehearsal: give --root, a folder outside the repository (or --list)")
    root = args.root.expanduser().resolve()
    if REPOSITORY in (root, *root.parents):
        raise SystemExit(f"rehearsal: {root} is inside the repository; give another --root")
    enter(root)  # before anything that reads where the cache is, once, when it is imported
    known = [*scaled_pipelines(args.scale), *scaled_rewards(args.scale)]
    if unknown := sorted(set(only) - set(known)):
        raise SystemExit(
            f"rehearsal: --only {' '.join(unknown)}: expected some of {', '.join(known)}"
        )
    code = _apart(write, root, args.scale, only)
    if code or args.write:
        return code
    from rehearsal_run import run_all

    return run_all(root, args.scale, args.configs, args.out, args.device, args.seconds)


def write(root: Path, scale: str, only: Sequence[str] = ()) -> None:
    """Writes what is not there yet: pipelines, rewards, data. Without `only`, everything."""
    pipelines, rewards = scaled_pipelines(scale), scaled_rewards(scale)
    root.mkdir(parents=True, exist_ok=True)
    note = root / DONE
    done = json.loads(note.read_text()) if note.is_file() else {"scale": scale, "names": []}
    if done["scale"] != scale:
        raise SystemExit(f"rehearsal: {root} holds scale {done['scale']}; give another --root")
    for name in [*pipelines, *rewards, "data"]:
        # rewards are small beside a pipeline: --only names pipelines as a rule, and gets all rewards
        wanted = not only or name in only or (name in (*rewards, "data") and not _rewards_in(only))
        if not wanted or name in done["names"]:
            continue
        print(f"writing {name}", flush=True)
        if name in pipelines:
            write_pipeline(root, pipelines[name])
        elif name in rewards:
            write_reward(root, rewards[name], scale)
        else:
            write_data(root)
        done["names"].append(name)
        note.write_text(json.dumps(done, indent=2))
    if scale == "tiny":
        folder = root / "architectures"
        folder.mkdir(exist_ok=True)
        for name, config in ARCHITECTURES.items():
            (folder / f"{name}.json").write_text(json.dumps(config))


def _apart(function: Callable[..., None], *args: object) -> int:
    """Calls a function in a process of its own; returns that one's exit code.

    Writing starts torch's threads, and a fork (as which the commands run) of a process with such threads waits for
    ever at its first parallel loop.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode if process.exitcode is not None else 1


def _rewards_in(only: Sequence[str]) -> bool:
    return bool(set(only) & scaled_rewards("full").keys())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rehearsal.py", description="Every shipped configuration, on random weights."
    )
    parser.add_argument(
        "--list", action="store_true", help="print shapes and counts, write nothing"
    )
    parser.add_argument(
        "--root", type=Path, help="where to write: a folder outside the repository"
    )
    parser.add_argument("--scale", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--only", nargs="*", default=[], help="some checkpoints, such as sd35m")
    parser.add_argument("--write", action="store_true", help="write, run nothing")
    parser.add_argument("--configs", nargs="*", default=["*"], help="globs of names in configs/")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "rehearsal.json")
    parser.add_argument(
        "--seconds", type=float, default=None, help="begin no further configuration after these"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
