"""How well stage 1's criteria rank the cells: every (i, j) of the world is distilled and measured.

    python benchmarks/search_study.py --steps 100 --depths 1 2 4 6 8 --js 1 2 3 4 5 6 --minutes 60

Stage 1 measures all cells; then each is distilled for the same number of steps and its retrieval R@1 (both ways, mean
over the noise levels) is measured on the tuning split. Prints Spearman's rank correlation of each criterion with the
final quality, over the whole grid and inside the paper's region j ≤ 4. Cells that are done are kept in the output file,
so that a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from scipy.stats import spearmanr

from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.data.world import World, WorldRetrieval
from stitchvm.modules.distillation import StitchDistillation
from stitchvm.modules.evaluation import ValueEvaluation
from stitchvm.results import write_results
from stitchvm.rewards.clip import CLIPReward
from stitchvm.vae import VAE
from stitchvm.values.stitched import StitchedFactory

BACKBONE = partial(SD3Backbone, "world:sd3", dtype="float32", null_tokens=1)
REWARD, VAE_ = partial(CLIPReward, "world:clip"), partial(VAE, "world:sd3")
CRITERIA = ("feature_loss", "unexplained", "embedding_error")
REGION = 4


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    """Returns a quiet CPU trainer."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )


def distillation(steps: int, **settings: Any) -> StitchDistillation:
    """Returns the distillation of configs/distill_world.yaml, at twice its rate: the runs are short."""
    return StitchDistillation(
        BACKBONE,
        REWARD,
        VAE_,
        lambda_tok=0.1,
        noise_levels=4,
        lr=7e-4,
        stitch_lr_factor=3.0,
        warmup_steps=min(50, steps // 3),
        decay="linear",
        **settings,
    )


def quality(i: int, j: int, steps: int, images: int, folder: Path) -> float:
    """Returns the mean R@1 over directions and noise levels of a value model distilled at (i, j)."""
    data = World(batch_size=16, val_size=512)
    module = distillation(steps, stitch_point=[i, j])
    trainer(folder, max_steps=steps, limit_val_batches=0, num_sanity_val_steps=0).fit(module, data)
    evaluation = ValueEvaluation(
        {"stitched": StitchedFactory(str(folder / "value_model"))},
        reward=REWARD,
        vae=VAE_,
        clean=False,
        overwrite=True,
        plot=False,
    )
    trainer(folder).test(
        evaluation, WorldRetrieval(num_images=images, split="tune"), verbose=False
    )
    values = [r["value"] for r in evaluation.records if r["metric"].endswith("_to_text_r1")]
    values += [r["value"] for r in evaluation.records if r["metric"].endswith("_to_image_r1")]
    return sum(values) / len(values)


def measure(js: list[int], folder: Path) -> list[dict[str, Any]]:
    """Returns stage 1's records of all cells."""
    module, data = (
        distillation(1, search_js=js, num_end_depths=None),
        World(batch_size=16, val_size=512),
    )
    run = trainer(folder)
    run.strategy.connect(module)
    data.setup("fit")
    return module.stage_one.run(data, run.strategy.root_device).records


def correlations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns Spearman's ρ of each criterion with the final quality (positive: the criterion ranks well)."""
    answer = []
    measured = [r for r in records if r.get("quality") is not None]
    ranked = sorted(measured, key=lambda r: -r["quality"])
    regions = {
        "whole grid": measured,
        f"j <= {REGION}": [r for r in measured if r["j"] <= REGION],
        "better half": ranked[: (len(ranked) + 1) // 2],
    }
    for name, cells in regions.items():
        if len(cells) < 3:
            continue
        for criterion in CRITERIA:
            rho, p = spearmanr([-r[criterion] for r in cells], [r["quality"] for r in cells])
            best = min(cells, key=lambda r: r[criterion])
            answer.append(
                {
                    "benchmark": "search_study",
                    "region": name,
                    "criterion": criterion,
                    "spearman": float(rho),
                    "p": float(p),
                    "cells": len(cells),
                    "chosen": [best["i"], best["j"]],
                    "quality_of_chosen": best["quality"],
                    "best_quality": max(r["quality"] for r in cells),
                }
            )
    return answer


def write(args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Writes cells and correlations."""
    write_results(
        args.output,
        [*records, *correlations(records)],
        command=" ".join(["python benchmarks/search_study.py", *sys.argv[1:]]),
        extra={"steps": args.steps, "images": args.images},
        overwrite=True,
    )


def main() -> None:
    """Measures what is missing, cell by cell, and writes after each."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=512, help="of the tuning split, measured on")
    parser.add_argument(
        "--depths", type=int, nargs="+", help="distil these i only; all by default"
    )
    parser.add_argument("--js", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop after so long; go on later"
    )
    parser.add_argument("--output", type=Path, default=Path("results/world/search_study.json"))
    args = parser.parse_args()
    folder = Path("runs/search_study")
    start = time.monotonic()
    kept = json.loads(args.output.read_text()) if args.output.is_file() else None
    if kept is not None and kept["steps"] != args.steps:
        raise SystemExit(
            f"{args.output} is of {kept['steps']} steps: give --steps {kept['steps']} or another --output"
        )
    records = kept["records"] if kept is not None else measure(args.js, folder)
    records = [r for r in records if "i" in r]
    # spread over the grid, so that a part of it is a fair sample
    order = sorted(records, key=lambda r: (r["i"] * 5 + r["j"] * 3) % 7)
    for record in order:
        if record.get("quality") is not None or record["i"] not in (args.depths or [record["i"]]):
            continue
        if time.monotonic() - start > 60 * args.minutes:
            break
        record["quality"] = quality(record["i"], record["j"], args.steps, args.images, folder)
        print(f"(i, j) = ({record['i']}, {record['j']}): {record['quality']:.3f}", flush=True)
        write(args, records)
    write(args, records)
    for r in correlations(records):
        print(
            f"{r['region']:<11}{r['criterion']:<16} rho {r['spearman']:+.2f} over {r['cells']} cells; "
            f"chooses {tuple(r['chosen'])}: {r['quality_of_chosen']:.3f} of {r['best_quality']:.3f}"
        )


if __name__ == "__main__":
    main()
