"""What the world must show: stitched values against VAE stitch and Tweedie, per noise level.

    python benchmarks/world_values.py --rewards clip aesthetic hps --seeds 0 1 2 --steps 1000

For every reward and seed: `stitchvm fit` of the stitched model and of the VAE-stitch baseline, `stitchvm test` of both
and of Tweedie, with the seed's own images and noise. What is finished is not done again, and an interrupted training
goes on from its last checkpoint. Writes results/world/values_REWARD.json (mean over seeds; `std` is the spread over
seeds where there are several) and docs/images/world_REWARD.png, and prints retention, the ratio to the clean reward.
The error against the truth is benchmarks/world_truth.py's; `--truth` adds the generator's roll-outs here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from stitchvm.plots import retention_curves
from stitchvm.results import write_results
from stitchvm.tables import records_to_text

RUNS = Path("runs/world_values")
NAMES = {"clip": "world", "aesthetic": "world_aesthetic", "hps": "world_hps"}
METRICS = {
    "clip": ("retrieval/image_to_text_r1", "retrieval/text_to_image_r1"),
    "aesthetic": ("aesthetic/srcc",),
    "hps": ("preference/hpdv2",),
}


def stitchvm(*arguments: str | Path) -> None:
    """Runs the command line in a process of its own."""
    subprocess.run([sys.executable, "-m", "stitchvm", *map(str, arguments)], check=True)


def distil(reward: str, vae_stitch: bool, seed: int, steps: int) -> Path:
    """Returns the value model of a finished distillation, running or resuming it first if need be."""
    name = NAMES[reward].replace("world", "vae_world") if vae_stitch else NAMES[reward]
    root = RUNS / reward / f"{'vae_stitch' if vae_stitch else 'stitched'}_{steps}_seed{seed}"
    if not (root / "value_model" / "model.safetensors").is_file():
        start = time.perf_counter()
        resume = ["--ckpt_path", "last"] if (root / "checkpoints" / "last.ckpt").is_file() else []
        stitchvm(
            *(
                "fit",
                "--config",
                f"configs/distill_{name}.yaml",
                "--trainer.default_root_dir",
                root,
            ),
            *("--trainer.max_steps", str(steps), "--trainer.enable_progress_bar", "false"),
            *("--seed_everything", str(seed), "--model.seed", str(seed), "--data.seed", str(seed)),
            *resume,
        )
        print(f"{root}: {time.perf_counter() - start:.0f} s", flush=True)
    return root / "value_model"


def evaluate(
    reward: str, seed: int, baseline_seed: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Returns the records of `stitchvm test` for one seed of the stitched model and one of the VAE stitch."""
    truth, steps, images = args.truth, args.steps, args.images
    root = RUNS / reward / f"eval_{steps}_seed{seed}_vae{baseline_seed}_truth{truth[0]}x{truth[1]}"
    if not (root / "metrics.json").is_file():
        models = {
            "stitched": distil(reward, False, seed, steps),
            "vae_stitch": distil(reward, True, baseline_seed, steps),
        }
        stitchvm(
            *("test", "--config", f"configs/eval_{NAMES[reward]}.yaml"),
            *("--trainer.default_root_dir", root, "--model.seed", str(seed)),
            *("--data.num_images", str(images), "--data.seed", str(seed)),
            *("--model.truth_images", str(truth[0]), "--model.truth_rollouts", str(truth[1])),
            *(f"--model.init_args.estimators.stitched.init_args.path={models['stitched']}",),
            *(f"--model.init_args.estimators.vae_stitch.init_args.path={models['vae_stitch']}",),
        )
    return json.loads((root / "metrics.json").read_text())["records"]


def over_seeds(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns one record per cell: the mean over seeds, `std` over them, and the seeds' values."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for records in runs:
        for record in records:
            cells[record["metric"], record["estimator"], record["sigma"]].append(record)
    answer = []
    for same in cells.values():
        values = [r["value"] for r in same if r["value"] is not None]
        if not values:
            continue
        std = statistics.stdev(values) if len(values) > 1 else None
        stderr = std / len(values) ** 0.5 if std is not None else same[0].get("stderr")
        answer.append(
            {
                **same[0],
                "value": statistics.mean(values),
                "stderr": stderr,
                "std": std,
                "values": values,
            }
        )
    return answer


def retention(records: list[dict[str, Any]], metrics: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns value ÷ clean value for every estimator and noise level, averaged over `metrics`."""
    clean = {r["metric"]: r["value"] for r in records if r["sigma"] is None}
    cells: dict[tuple[str, float], list[float]] = defaultdict(list)
    for r in records:
        if r["metric"] in metrics and r["sigma"] is not None:
            cells[r["estimator"], r["sigma"]].append(r["value"] / clean[r["metric"]])
    return [
        {
            "metric": "retention",
            "estimator": name,
            "sigma": sigma,
            "value": statistics.mean(values),
        }
        for (name, sigma), values in cells.items()
    ]


def main() -> None:
    """Runs what is missing and writes the results of every reward."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewards", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--vae-seeds",
        nargs="+",
        type=int,
        help="training seeds of the VAE stitch, taken in turn; those of --seeds by default",
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument(
        "--truth",
        nargs=2,
        type=int,
        default=[0, 32],
        help="images and roll-outs of Monte Carlo truth",
    )
    parser.add_argument(
        "--train-only", action="store_true", help="leave the evaluation to a later call"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["stitched", "vae_stitch"],
        choices=["stitched", "vae_stitch"],
        help="which to train with --train-only",
    )
    args = parser.parse_args()
    for reward in args.rewards:
        if args.train_only:
            for seed in args.seeds:
                for model in args.models:
                    distil(reward, model == "vae_stitch", seed, args.steps)
            continue
        vae_seeds = args.vae_seeds or args.seeds
        pairs = [(seed, vae_seeds[k % len(vae_seeds)]) for k, seed in enumerate(args.seeds)]
        runs = [evaluate(reward, *pair, args) for pair in pairs]
        records = over_seeds(runs)
        kept = retention(records, METRICS[reward])
        write_results(
            Path(f"results/world/values_{reward}.json"),
            [*records, *kept],
            command=" ".join(["python benchmarks/world_values.py", *sys.argv[1:]]),
            extra={"seeds": args.seeds, "vae_seeds": vae_seeds, "steps": args.steps},
            overwrite=True,
        )
        retention_curves(records, Path(f"docs/images/world_{reward}.png"))
        print(records_to_text([r for r in records if r["metric"] in METRICS[reward]]))
        print(records_to_text(kept))


if __name__ == "__main__":
    main()
