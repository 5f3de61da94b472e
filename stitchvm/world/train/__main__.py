"""`python -m stitchvm.world.train --stage NAME --minutes M --threads N`: trains one of the world's networks, or all."""

from __future__ import annotations

import argparse
import importlib
import os

STAGES = {
    "vae": "vae.VAEStage",
    "clip": "clip.CLIPStage",
    "aesthetic": "aesthetic.AestheticStage",
    "hps": "hps.HPSStage",
    "sd3": "sd3.SD3Stage",
    "sd3_large": "sd3_large.SD3LargeStage",
    "flux": "flux.FluxStage",
}


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(prog="python -m stitchvm.world.train", description=__doc__)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="wall-clock limit of each stage"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--workers", type=int, choices=(1, 2), default=1, help="generators: processes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-steps", type=int, default=None, help="stop at this step (resumes later)"
    )
    parser.add_argument("--evaluate-every", type=float, default=600.0, help="seconds")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    import torch

    from stitchvm.world.train.common import run

    torch.set_num_threads(arguments.threads)
    for name in STAGES if arguments.stage == "all" else (arguments.stage,):
        module, cls = STAGES[name].split(".")
        build = getattr(importlib.import_module(f"stitchvm.world.train.{module}"), cls)
        extra = {"workers": arguments.workers} if name in ("sd3", "sd3_large", "flux") else {}
        stage = build(arguments.seed, **extra)
        run(
            stage,
            arguments.minutes,
            max_steps=arguments.max_steps,
            evaluate_every=arguments.evaluate_every,
        )


if __name__ == "__main__":
    main()
