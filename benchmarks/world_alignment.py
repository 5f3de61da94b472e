"""What the world must show of training-time alignment: Table 3 and Figures 4, 5 and 7 in small.

    python benchmarks/world_alignment.py --parts methods windows scales controls --seeds 0 1 2

- methods: Flow-GRPO-Fast, DRaFT-1, DRaFT-3 and DiffusionNFT with the terminal reward, the last three with a stitched
  value and a stopping point, too; same reward (CLIP + preference), same prompts, about the same core-seconds;
- windows: the stopping windows of Figure 7 for DiffusionNFT;
- scales: DiffusionNFT with the terms of the reward standardised within each prompt's group, terminal and stitched. At a
  noise level the spread of a term is not that of the clean reward, so that a plain sum weighs the terms in another way;
- controls: DiffusionNFT stopped where the stitched runs stop, with the Tweedie value that is told the prompt, which in
  the world is nearly exact: what the stitched value's error costs, beside what stopping costs.

Every run is `stitchvm fit` on a shipped config with overrides, in a folder and a process of its own. While it trains,
64 captions of the split "tune" are sampled now and then: those are the curves. At the end `stitchvm validate` scores
the averaged policy on 200 captions of "test", 40 steps at guidance 1, with the clean rewards and the exact checker:
that is the table. Finished runs are not done again, interrupted ones go on from their last checkpoint.

Core-seconds are the process's CPU seconds on one thread, of training alone. Writes results/world/alignment.json and
alignment_PART.json, and prints tables; `benchmarks/readme.py` draws them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from stitchvm.results import write_results
from stitchvm.tables import records_to_text
from stitchvm.training_logs import read_curve, read_scalars

RUNS = Path("runs/world_alignment")
RESULTS = Path("results/world")
REWARDS = ("clip", "hps")  # what is trained for: their sum
SCORES = ("clip", "hps", "aesthetic", "checker/whole")

# method → (optimiser steps, updates between two points of its curve): about 150 core-seconds each
METHODS: dict[str, tuple[int, int]] = {
    "grpo_fast": (48, 6),
    "draft1": (60, 12),
    "draft3": (45, 9),
    "draft1_stitched": (100, 20),
    "draft3_stitched": (60, 12),
    "nft": (18, 3),
    "nft_stitched": (27, 3),
}
# The stopping windows of Figure 7, in the same shares of the schedule's steps: 12–17, 12–25, 2–12 and 20–25 of 25
WINDOWS = {"5-7": "[5, 7]", "5-10": "[5, 10]", "1-5": "[1, 5]", "8-10": "[8, 10]"}
TWEEDIE = (
    "--model.value=stitchvm.values.tweedie.TweedieFactory",
    "--model.value.velocity=prompt",
    f"--model.stop={WINDOWS['5-7']}",
)
SCALES = {"nft_scaled": "nft", "nft_stitched_scaled": "nft_stitched"}


def stitchvm(*arguments: str | Path) -> None:
    """Runs the command line in a process of its own, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stitchvm", *map(str, arguments)]
    subprocess.run(command, check=True, env=environment)


def train(name: str, method: str, seed: int, updates: int, every: int, extra: list[str]) -> Path:
    """Returns the folder of a finished training, run or resumed first if need be."""
    folder = RUNS / f"{name}_seed{seed}"
    if not (folder / "lora").is_dir():
        last = folder / "checkpoints" / "last.ckpt"
        stitchvm(
            *("fit", "--config", f"configs/{method}_world.yaml"),
            f"--trainer.default_root_dir={folder}",
            f"--trainer.max_steps={updates}",
            f"--trainer.val_check_interval={every}",
            "--trainer.enable_progress_bar=false",
            *(f"--{part}.seed={seed}" for part in ("model", "data")),
            f"--seed_everything={seed}",
            *("--data.split=tune", "--data.num_prompts=64", "--data.batch_size=64"),
            "--model.evaluation.sampler.num_steps=20",
            *extra,
            *(["--ckpt_path", "last"] if last.is_file() else []),
        )
    return folder


def score(folder: Path, method: str, checkpoint: Path | None) -> dict[str, float]:
    """Returns the scores of a policy on the captions of "test", measured first if need be."""
    if not list(folder.glob("events.out.tfevents.*")):
        stitchvm(
            *("validate", "--config", f"configs/{method}_world.yaml"),
            f"--trainer.default_root_dir={folder}",
            "--trainer.enable_progress_bar=false",
            *("--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={folder}"),
            *("--trainer.logger.name=", "--trainer.logger.version="),
            *("--data.split=test", "--data.num_prompts=200", "--data.batch_size=100"),
            *([] if checkpoint is None else ["--ckpt_path", str(checkpoint)]),
        )
    logs = read_scalars(folder)
    return {metric: read_curve(logs, f"val/{metric}")[-1]["value"] for metric in SCORES}


def curve(folder: Path) -> list[dict[str, Any]]:
    """Returns the points of a training's curve, one record per score and point."""
    logs, answer = read_scalars(folder), []
    for metric in SCORES:
        for point in read_curve(logs, f"val/{metric}"):
            costs = {key: point[key] for key in ("updates", "samples", "cpu_seconds")}
            answer.append({"metric": metric, "value": point["value"], **costs})
    return answer


def run(
    name: str, method: str, seed: int, extra: list[str], length: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Returns the records of one training: its curve on "tune" and its scores on "test"."""
    updates, every = length or METHODS[method]
    folder = train(name, method, seed, updates, every, extra)
    points = curve(folder)
    scores = score(folder / "test", method, folder / "checkpoints" / "last.ckpt")
    cost = max(points, key=lambda p: p["updates"])
    keys = {
        "name": name,
        "method": method.removesuffix("_stitched"),
        "value_estimator": next((e for e in ("stitched", "tweedie") if e in name), "terminal"),
        "seed": seed,
    }
    costs = {key: cost[key] for key in ("updates", "cpu_seconds", "samples")}
    final = [{"metric": m, "value": v, **costs} for m, v in scores.items()]
    return [
        *({**keys, "split": "tune", **point} for point in points),
        *({**keys, "split": "test", **record} for record in final),
    ]


def base() -> list[dict[str, Any]]:
    """Returns the scores of the model before training."""
    keys = {"name": "base", "method": "base", "split": "test", "seed": 0}
    costs = {"updates": 0, "cpu_seconds": 0.0, "samples": 0}
    found = score(RUNS / "base", "nft", None)
    return [{**keys, "metric": metric, "value": value, **costs} for metric, value in found.items()]


def write(found: list[dict[str, Any]], name: str, seeds: list[int]) -> None:
    """Writes results/world/NAME.json."""
    command = " ".join(["python benchmarks/world_alignment.py", *sys.argv[1:]])
    path = RESULTS / f"{name}.json"
    write_results(path, found, command=command, extra={"seeds": seeds}, overwrite=True)


def show(found: list[dict[str, Any]]) -> None:
    """Prints the scores on "test", one row per run."""
    rows = [
        {**r, "run": f"{r['name']}, seed {r['seed']}", "core-seconds": round(r["cpu_seconds"])}
        for r in found
        if r["split"] == "test"
    ]
    print(records_to_text(rows, rows=("run", "core-seconds"), column="metric", digits=3))


def main() -> None:
    """Runs what is missing of the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("methods", "windows", "scales", "controls")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--windows", nargs="+", default=list(WINDOWS), choices=list(WINDOWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    found = base()
    if "methods" in args.parts:
        for seed in args.seeds:
            for method in args.methods:
                found += run(method, method, seed, [])
                write(found, "alignment", args.seeds)
        show(found)
    if "windows" in args.parts:
        found = []
        for seed in args.seeds:
            for window in args.windows:
                # the first window is that of the methods' run
                name = "nft_stitched" if window == "5-7" else f"nft_stitched_window_{window}"
                extra = [f"--model.stop={WINDOWS[window]}"]
                records = run(name, "nft_stitched", seed, extra)
                found += [{**record, "name": window} for record in records]
                write(found, "alignment_windows", args.seeds)
        show(found)
    if "scales" in args.parts:
        found = []
        for seed in args.seeds:
            for name, method in SCALES.items():
                found += run(method, method, seed, [])
                found += run(name, method, seed, ["--model.normalise=group"])
                write(found, "alignment_scales", args.seeds)
        show(found)
    if "controls" in args.parts:
        found = []
        for seed in args.seeds:
            for method in ("nft", "nft_stitched"):
                found += run(method, method, seed, [])
            found += run("nft_tweedie", "nft", seed, list(TWEEDIE), METHODS["nft_stitched"])
            write(found, "alignment_controls", args.seeds)
        show(found)


if __name__ == "__main__":
    main()
