"""Every kind of run of the command line on the world, several processes at a time: does it work on this device?

    python benchmarks/gpu_cli.py --device cuda

A run is `stitchvm` in a process of its own, in the mixed precision of the real configurations: stage 1, stage 2 with
its resume (eager and compiled), the three ways of fine-tuning with theirs, an evaluation, and samplers. What samplers
draw in float32 is drawn on the CPU, too, and the rewards of the images are compared, in units of their spread over the
prompts: noise is keyed, so that only rounding tells the two apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import chosen, parse, parser, write

from stitchvm.results import records_to_text

Record = dict[str, Any]
REPOSITORY = Path(__file__).parents[1]
FIT = ("--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=1")
CHECKPOINTS = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.save_top_k=0",
)
MIXED = "--trainer.precision=bf16-mixed"
STEPS = ("--trainer.max_steps=2", "--trainer.max_steps=4 --ckpt_path=last")
PROBES = ("--model.num_probes=24", "--model.num_held_out=24", "--model.num_end_probes=8")
DISTIL = (
    *FIT,
    *CHECKPOINTS,
    *PROBES,
    "--trainer.val_check_interval=2",
    "--data.val_size=64",
    MIXED,
)
TUNE = (*FIT, *CHECKPOINTS, "--trainer.val_check_interval=1", "--data.batch_size=8", MIXED)
TUNE = (*TUNE, "--data.num_prompts=8", "--data.prompts_per_update=4")
GROUPS = ("--model.group_size=4",)
DRAW = ("--data.num_prompts=4", "--model.sampler.init_args.num_steps=10")
PARTICLES = (
    "--model.sampler.init_args.resample_from=2",
    "--model.sampler.init_args.resample_to=8",
)
TRUTH = ("--model.truth_images=2", "--model.truth_rollouts=2", "--model.truth_steps=2")
ESTIMATORS = tuple(
    f"--model.estimators.{name}.init_args.path=world:value_clip"
    for name in ("stitched", "vae_stitch")
)
# by name: commands, configuration, options of all, options of each command
RUNS: dict[str, tuple[Sequence[str], str, Sequence[str], Sequence[str]]] = {
    "stage 1 and 2": (("search", "fit", "fit"), "distill_world", DISTIL, ("", *STEPS)),
    "stage 2, compiled": (
        ("fit",),
        "distill_world",
        (*DISTIL, "--model.stitch_point=[7,1]", "--model.compile=true"),
        STEPS[:1],
    ),
    "draft1_stitched": (("fit", "fit"), "draft1_stitched_world", TUNE, STEPS),
    "draft3": (("fit", "fit"), "draft3_world", TUNE, STEPS),
    "nft_stitched": (("fit", "fit"), "nft_stitched_world", (*TUNE, *GROUPS), STEPS),
    "grpo_fast": (("fit", "fit"), "grpo_fast_world", (*TUNE, *GROUPS), STEPS),
    "eval": (
        ("test",),
        "eval_world",
        (*ESTIMATORS, *TRUTH, "--data.num_images=64", MIXED),
        ("",),
    ),
    "plain": (("predict",), "plain_world", DRAW, ("",)),
    "dps": (("predict",), "dps_world", DRAW, ("",)),
    "dps_stitched": (("predict",), "dps_stitched_world", DRAW, ("",)),
    "fks_stitched": (("predict",), "fks_stitched_world", (*DRAW, *PARTICLES), ("",)),
}


def commands(name: str, folder: Path, accelerator: str) -> list[list[str]]:
    """Returns the command lines of a run that writes below a folder."""
    verbs, config, common, each = RUNS[name]
    path = str(REPOSITORY / "configs" / f"{config}.yaml")
    made = ["--trainer.accelerator", accelerator, "--trainer.default_root_dir", str(folder)]
    return [
        [verb, "--config", path, *made, *common, *more.split()]
        for verb, more in zip(verbs, each, strict=True)
    ]


def outcome(name: str, folder: Path, accelerator: str, limit: float = 300.0) -> Record:
    """Runs the commands up to the first that fails or takes too long; returns seconds, and the error or None."""
    place = os.environ.get("PYTHONPATH")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), place)))}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start, error = time.perf_counter(), None
    for argv in commands(name, folder, accelerator):
        command = [sys.executable, "-m", "stitchvm", *argv]
        try:
            done = subprocess.run(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=limit - (time.perf_counter() - start),
            )
        except subprocess.TimeoutExpired:
            error = f"{argv[0]}: stopped after {limit:.0f} s"
            break
        if done.returncode:
            print(f"{name} on {accelerator}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            error = f"{argv[0]}: exit code {done.returncode}: {lines[-1][:300] if lines else ''}"
            break
    return {"seconds": time.perf_counter() - start, "error": error}


def rewards(folder: Path) -> torch.Tensor:
    """Returns the rewards of the drawn images, a row each."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    drawn = sorted((json.loads(line) for line in lines), key=lambda r: r["index"])
    return torch.tensor([[value for _, value in sorted(r["rewards"].items())] for r in drawn])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line.

    Raises:
        SystemExit: If a run failed; the records are written.
    """
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", help="runs whose name has one of these in it")
    made.add_argument("--limit", type=float, default=300.0, help="seconds of a run")
    args, device = parse(made, argv)
    accelerator = {"cuda": "gpu", "cpu": "cpu"}[device.type]
    names = [n for n in RUNS if chosen(n, args.only)]
    jobs = [(name, accelerator) for name in names]
    if device.type == "cuda":
        jobs += [(name, "cpu") for name in names if RUNS[name][0] == ("predict",)]
    workers = max(1, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 1
    with tempfile.TemporaryDirectory() as root:
        folders = {job: Path(root) / f"{n}" for n, job in enumerate(jobs)}
        with ThreadPoolExecutor(workers) as pool:
            found = dict(
                zip(
                    jobs,
                    pool.map(lambda j: outcome(j[0], folders[j], j[1], args.limit), jobs),
                    strict=True,
                )
            )
        records: list[Record] = []
        for name in names:
            record: Record = {"benchmark": "cli", "run": name, "device": device.type}
            record |= {"commands": len(RUNS[name][0]), **found[name, accelerator]}
            other = found.get((name, "cpu"))
            if accelerator != "cpu" and other and not record["error"] and not other["error"]:
                here, there = (rewards(folders[name, where]) for where in (accelerator, "cpu"))
                difference = (here - there).abs().amax(0)
                record["difference_to_spread"] = (difference / there.std(0)).max().item()
            records.append(record)
    columns = ("run", "commands", "seconds", "difference_to_spread", "error")
    shown = [{c: r.get(c) for c in columns} for r in records]
    print(records_to_text(shown, rows=columns, column=None))
    if args.output:
        write(args.output, records, device, args.overwrite)
    failed = [r["run"] for r in records if r["error"]]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
