"""`make demo`: the main job on the embedded world, through the command line's own code.

Stage 1 over all stitch points, stage 2 for the stitched model and for the VAE-stitch baseline, retrieval at
several noise levels against both baselines and Monte Carlo truth, and the pictures.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path("configs")


def step(title: str, *arguments: str) -> float:
    """Runs `stitchvm ARGUMENTS` in a process of its own and returns its seconds; a failure ends the demo."""
    print(f"\n=== {title}\n    stitchvm {' '.join(arguments)}\n", flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "stitchvm", *arguments], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Runs the demo in `runs/demo`."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--folder", default="runs/demo", help="where everything is written")
    parser.add_argument(
        "--steps", type=int, default=500, help="optimiser steps of each distillation"
    )
    args = parser.parse_args()
    if not (CONFIGS / "distill_world.yaml").is_file():
        raise SystemExit("the demo runs from the repository's folder: configs/ is not here")
    folder = Path(args.folder)
    if folder.exists():
        earlier = folder.with_name(f"{folder.name}_{time.strftime('%Y%m%d_%H%M%S')}")
        shutil.move(folder, earlier)
        print(f"an earlier demo was moved to {earlier}")

    def config(name: str) -> list[str]:
        return ["--config", str(CONFIGS / f"{name}.yaml")]

    stitched, baseline = folder / "stitched", folder / "vae_stitch"
    steps = ["--trainer.max_steps", str(args.steps)]
    estimators = "--model.init_args.estimators"
    seconds = {
        "search": step(
            "stage 1: where to stitch",
            *("search", *config("distill_world"), "--trainer.default_root_dir", str(stitched)),
        ),
        "distil": step(
            "stage 2: distil the stitched value model",
            *(
                "fit",
                *config("distill_world"),
                "--trainer.default_root_dir",
                str(stitched),
                *steps,
            ),
        ),
        "baseline": step(
            "stage 2 for the baseline without a diffusion backbone",
            *(
                "fit",
                *config("distill_vae_world"),
                "--trainer.default_root_dir",
                str(baseline),
                *steps,
            ),
        ),
        "test": step(
            "retrieval at several noise levels",
            *("test", *config("eval_world"), "--trainer.default_root_dir", str(folder)),
            *(f"{estimators}.stitched.init_args.path", str(stitched / "value_model")),
            *(f"{estimators}.vae_stitch.init_args.path", str(baseline / "value_model")),
        ),
    }
    print(f"\n=== done in {sum(seconds.values()):.0f} s: ", end="")
    print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(f"look at   {stitched / 'search.png'}   stage 1's grid (Figure 6)")
    for picture in sorted(folder.glob("*.png")):
        print(f"          {picture}   the metric against the noise level (Figure 2)")
    print(f"numbers   {folder / 'metrics.json'}")
    print(f"logs      tensorboard --logdir {folder}")
    print("next      stitchvm fit --config configs/distill_world_aesthetic.yaml    another reward")
    print(
        "          configs/distill_sd35m_clip.yaml    the same with SD 3.5 Medium and OpenAI CLIP"
    )


if __name__ == "__main__":
    main()
