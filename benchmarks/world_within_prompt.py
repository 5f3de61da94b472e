"""What steering lives on: how well a value on the way tells apart the samples of ONE prompt, level by level.

    python benchmarks/world_within_prompt.py --reward hps --prompts 20 --particles 8

Plain samples of the SDE, several for each caption of the split "tune". At every few steps each estimator's values of
the latents are compared with the clean reward of what they became: the correlation within prompts (both centred on
their prompt's mean). Retrieval and pair accuracy on drawn images say little about it: there, images differ far more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitchvm.data.world_prompts import world_captions
from stitchvm.generator import Generator
from stitchvm.results import command_line, write_results
from stitchvm.samplers.base import Record, Run
from stitchvm.samplers.plain import PlainSampler
from stitchvm.spec import build
from stitchvm.tables import records_to_text
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieValue

REWARDS = {
    "clip": "stitchvm.rewards.clip.CLIPReward",
    "hps": "stitchvm.rewards.hpsv2.HPSv2Reward",
    "aesthetic": "stitchvm.rewards.aesthetic.AestheticReward",
}


class Kept(PlainSampler):
    """Plain sampling that keeps the latents of every few steps."""

    every = 4

    def advance(self, run: Run, k: int) -> Record:
        """Takes one step."""
        if k and k % self.every == 0:
            self.kept[float(run.sigmas[k])] = run.z.clone()
        return super().advance(run, k)

    def begin(self, run: Run) -> None:
        """Forgets what it kept."""
        super().begin(run)
        self.kept: dict[float, Tensor] = {}


def correlation(x: Tensor, y: Tensor) -> float:
    """Returns the correlation of two tables (P, N) within rows."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return float((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-12))


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one record for each estimator and level."""
    generator = Generator("world:sd3", text_tokens=1, guidance_scale=4.5)
    reward = build(
        {"class_path": REWARDS[args.reward], "init_args": {"model": f"world:{args.reward}"}}
    )
    path = args.value or f"world:value_{args.reward}"
    values = {
        "stitched": StitchedValue.from_pretrained(path, generator=generator, reward=reward),
        **{
            f"tweedie, {v}": TweedieValue(generator, reward, velocity=v)
            for v in ("null", "prompt", "cfg")
        },
    }
    captions = world_captions("tune", args.prompts, 1)
    prompts = [caption for caption in captions for _ in range(args.particles)]
    sampler = Kept(num_steps=args.steps, nu="linear_sde")
    samples = sampler(generator, prompts, seeds=0)
    clean = TerminalValue(generator.vae, reward).bind(prompts)(samples.latents, torch.zeros(1))
    clean = clean.view(args.prompts, args.particles)
    found = []
    for sigma, z in sampler.kept.items():
        for name, value in values.items():
            v = value.bind(prompts)(z, torch.tensor([sigma])).view_as(clean)
            record = {
                "metric": f"within_prompt/{args.reward}",
                "estimator": name,
                "sigma": round(sigma, 3),
            }
            found.append(record | {"value": correlation(v, clean), "n": len(prompts)})
    spread = float(clean.std(1).mean())
    return [
        *found,
        {"metric": "spread_within_prompt", "estimator": "clean", "sigma": None, "value": spread},
    ]


def main() -> None:
    """Measures one reward."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward", choices=list(REWARDS), default="hps")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--value", help="another value model than the shipped one")
    parser.add_argument("--output", type=Path, help="results/world/within_prompt_REWARD.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = measure(args)
    path = args.output or Path(f"results/world/within_prompt_{args.reward}.json")
    command = command_line().replace("python ", "python benchmarks/", 1)
    write_results(path, records, command=command, overwrite=True)
    print(records_to_text(records[:-1], rows=("estimator",), column="sigma", digits=2))


if __name__ == "__main__":
    main()
