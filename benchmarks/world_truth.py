"""What a value's error against the truth is made of: estimators against three truths on the embedded world.

    python benchmarks/world_truth.py --images 128

| images                         | truth E[r(z_0) | z_t]                                                       |
|--------------------------------|-----------------------------------------------------------------------------|
| drawn by the grammar           | "posterior": Metropolis chains over scenes, the law of the data itself      |
| drawn by the grammar           | "rollouts": roll-outs of the generator, what `stitchvm test` calls truth    |
| made by the generator ("null") | "rollouts": no mismatch between images and generator                        |

A stitched value is distilled on drawn scenes: the first row is what its loss aims at. Tweedie and Monte Carlo use the
generator: the third row is theirs. For each: R², R² after the best affine map, bias, the truth's own noise. Rewards
with text score every image for its own caption and for another image's. Beside it the aesthetic SRCC with the true
score, of the estimators and of both truths: the posterior's is what distilling this reward aims at, the ceiling.
Writes results/world/truth.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from stitchvm.generator import Generator
from stitchvm.metrics.correlation import SpearmanCorrelation
from stitchvm.metrics.truth import TruthError
from stitchvm.path import FlowPath
from stitchvm.results import write_results
from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.rewards.base import Reward
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.hpsv2 import HPSv2Reward
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import Value
from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.tweedie import TweedieValue
from stitchvm.world.checker import read
from stitchvm.world.posterior import annealing, posterior_scenes
from stitchvm.world.render import render
from stitchvm.world.scenes import Scene, sample_scenes
from stitchvm.world.scores import aesthetic_score

REWARDS = {
    "aesthetic": lambda: AestheticReward("world:aesthetic"),
    "clip": lambda: CLIPReward("world:clip"),
    "hps": lambda: HPSv2Reward("world:hps"),
}
ROWS = 256  # latents at a time


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Returns the scenes as 8-bit pictures in [0, 1], as the data modules give them."""
    return torch.from_numpy((np.rint(np.asarray(render(scenes)) * 255) / 255).astype(np.float32))


def in_parts(function: Any, *columns: Any) -> Tensor:
    """Returns a function of rows, computed in parts."""
    n = len(columns[0])
    return torch.cat([function(*(c[k : k + ROWS] for c in columns)) for k in range(0, n, ROWS)])


class Study:
    """The networks, and for each reward the texts that images are scored for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.generator = Generator("world:sd3", text_tokens=1)
        self.vae = self.generator.vae
        self.rewards: dict[str, Reward] = {name: REWARDS[name]() for name in args.rewards}
        self.estimators: dict[str, dict[str, Value]] = {}
        for name, reward in self.rewards.items():
            values: dict[str, Value] = {}
            for kind, pattern in (("stitched", args.stitched), ("vae_stitch", args.vae_stitch)):
                path = pattern.format(reward=name)
                if path.startswith("world:") or Path(path).is_dir():
                    model = StitchedValueModel.from_pretrained(path, reward=reward)
                    values[kind] = StitchedValue(model)
            self.estimators[name] = values | {"tweedie": TweedieValue(self.generator, reward)}
        self.monte_carlo = MonteCarloValue(
            self.generator, next(iter(self.rewards.values())), steps=args.rollout_steps
        )
        self.clean: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(args.seed)
        self.rng = np.random.default_rng([args.seed, 77])

    def rollouts(self, z_t: Tensor, t: float) -> dict[str, Tensor]:
        """Returns unit embeddings (n, B, E) of roll-outs from each latent, per reward."""

        def decoded(z: Tensor) -> Tensor:
            levels = torch.full((len(z),), t)
            z_0 = self.monte_carlo.rollout(z, levels, self.generator.null, self.random)
            return self.vae.decode(z_0)

        n = self.args.rollouts
        pixels = in_parts(decoded, z_t.repeat(n, 1, 1, 1))
        return {name: self.embed(r, pixels, n) for name, r in self.rewards.items()}

    def posterior(self, scenes: list[Scene], z_t: Tensor, t: float) -> dict[str, Tensor]:
        """Returns unit embeddings (2 m, B, E) of the states of two chains per image, one after the other.

        The first starts at the image's own scene, an exact draw; the second at another scene, annealed. Their
        difference is the truth's noise, slow mixing included.
        """
        B, steps = len(scenes), self.args.chain_steps
        betas = np.ones((2 * steps, 2 * B))
        betas[:steps, B:] = annealing(steps, B)
        walk = posterior_scenes(
            [*scenes, *scenes[1:], scenes[0]],
            z_t.repeat(2, 1, 1, 1),
            t,
            self.vae.encode,
            steps=2 * steps,
            thin=self.args.thin,
            betas=betas,
            rng=self.rng,
        )
        kept = [pixels_of(states) for states in walk]
        kept = kept[len(kept) // 2 :]
        stacked = torch.stack(kept).unflatten(1, (2, B)).transpose(0, 1).flatten(0, 2)
        return {name: self.embed(r, stacked, 2 * len(kept)) for name, r in self.rewards.items()}

    def embed(self, reward: Reward, pixels: Tensor, n: int) -> Tensor:
        """Returns unit embeddings (n, B, E) of pixels (n B, 3, H, W)."""
        e = in_parts(lambda x: normalize(reward.embed(x).image.float(), dim=-1), pixels)
        return e.unflatten(0, (n, len(pixels) // n))

    def generated(self, n: int) -> Tensor:
        """Returns latents z_0 that the generator makes under null text: exact roll-outs from pure noise."""
        whole = MonteCarloValue(self.generator, self.monte_carlo.reward, steps=40)

        def run(z: Tensor) -> Tensor:
            return whole.rollout(z, torch.ones(len(z)), self.generator.null, self.random)

        return in_parts(run, torch.randn(n, 4, 16, 16, generator=self.random))


def scores(reward: Reward, e: Tensor, text: Tensor | None) -> Tensor:
    """Returns scores (n, B) of unit embeddings (n, B, E) for texts (B, E)."""
    lines = None if text is None else text.repeat(len(e), 1)
    return reward.score(e.flatten(0, 1), lines).float().unflatten(0, e.shape[:2])


def compare(
    study: Study,
    truths: dict[str, dict[str, Tensor]],
    z_t: Tensor,
    t: float,
    captions: list[str],
    about: dict[str, Any],
    true_scores: Tensor | None,
) -> list[dict[str, Any]]:
    """Returns the records of all estimators against all truths at one level."""
    records = []
    index = torch.arange(len(z_t))
    for name, reward in study.rewards.items():
        found = {
            kind: in_parts(
                lambda z, value=value: value.embed(z, torch.full((len(z),), t)).float(), z_t
            )
            for kind, value in study.estimators[name].items()
        }
        found = {kind: normalize(e, dim=-1) for kind, e in found.items()}
        texts: dict[str, Tensor | None] = {"none": None}
        if reward.uses_text:
            own = reward.encode_text(captions)
            texts = {"own": own, "other": own.roll(1, 0)}
        for which, text in texts.items():
            means = {k: scores(reward, e[name], text) for k, e in truths.items()}
            values = {k: scores(reward, e[None], text)[0] for k, e in found.items()}
            if "posterior" in means and "rollouts" in means:
                values["monte_carlo"] = means["rollouts"].mean(0)
            shared = {"reward": name, "text": which, "sigma": t, **about}
            for truth, each in means.items():
                half_a, half_b = (half.mean(0) for half in each.chunk(2))
                for kind, value in values.items():
                    if kind == "monte_carlo" and truth == "rollouts":
                        continue
                    metric = TruthError()
                    metric.update(value, half_a, half_b, index)
                    records += [
                        {
                            "metric": f"truth/{what}",
                            "truth": truth,
                            "estimator": kind,
                            **shared,
                            "value": float(estimate.value),
                            "stderr": float(estimate.stderr),
                            "n": len(index),
                        }
                        for what, estimate in metric.compute().items()
                    ]
            if name == "aesthetic" and true_scores is not None:
                ranked = {k: v for k, v in values.items() if k != "monte_carlo"}
                ranked |= {f"truth: {k}": each.mean(0) for k, each in means.items()}
                ranked["clean"] = scores(reward, study.clean[name][None], text)[0]
                for kind, value in ranked.items():
                    correlation = SpearmanCorrelation()
                    correlation.update(value, true_scores, index)
                    estimate = correlation.compute()["srcc"]
                    records.append(
                        {
                            "metric": "aesthetic/srcc",
                            "estimator": kind,
                            **shared,
                            "value": float(estimate.value),
                            "stderr": float(estimate.stderr),
                            "n": len(index),
                        }
                    )
    return records


@torch.no_grad()
def main() -> None:
    """Measures all truths at all levels, writes after each level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS))
    parser.add_argument("--sigmas", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--rollout-steps", type=int, default=10)
    parser.add_argument(
        "--chain-steps", type=int, default=400, help="to anneal, and as many to keep"
    )
    parser.add_argument("--thin", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stitched", default="world:value_{reward}")
    parser.add_argument(
        "--vae-stitch", default="runs/world_values/{reward}/vae_stitch/value_model"
    )
    parser.add_argument("--output", type=Path, default=Path("results/world/truth.json"))
    args = parser.parse_args()
    study = Study(args)

    drawn = sample_scenes("train", args.images, [args.seed, 76])
    study.clean = {n: study.embed(r, pixels_of(drawn), 1)[0] for n, r in study.rewards.items()}
    true_scores = torch.tensor([float(aesthetic_score(s)) for s in drawn])
    z_drawn = in_parts(study.vae.encode, pixels_of(drawn))
    z_null = study.generated(args.images)
    seen = [read(x)[0] for x in study.vae.decode(z_null, clamp=True).numpy()]
    print(f"the checker reads {sum(s is not None for s in seen)} of {len(seen)} null-text samples")
    # an image that cannot be read is scored for a drawn scene's caption
    null_captions = [(s or d).caption for s, d in zip(seen, drawn, strict=True)]

    records: list[dict[str, Any]] = []
    for t in args.sigmas:
        start = time.perf_counter()
        for source, z_0, captions in (
            ("drawn", z_drawn, [s.caption for s in drawn]),
            ("null", z_null, null_captions),
        ):
            eps = torch.randn(z_0.shape, generator=study.random)
            z_t = FlowPath.interpolate(z_0, eps, torch.full((len(z_0),), t))
            truths = {"rollouts": study.rollouts(z_t, t)}
            if source == "drawn":
                truths["posterior"] = study.posterior(drawn, z_t, t)
            known = true_scores if source == "drawn" else None
            about = {"images": source}
            records += compare(study, truths, z_t, t, captions, about, known)
        write_results(
            args.output,
            records,
            command=" ".join(["python benchmarks/world_truth.py", *sys.argv[1:]]),
            overwrite=True,
        )
        here = [r for r in records if r["sigma"] == t]
        keep = ("truth/r2", "truth/r2_calibrated", "truth/bias", "aesthetic/srcc")
        print(f"sigma = {t}: {time.perf_counter() - start:.0f} s")
        for r in here:
            if r["metric"] in keep:
                label = " ".join(str(r.get(k, "")) for k in ("images", "reward", "text", "truth"))
                print(f"  {label:<32}{r['estimator']:<18}{r['metric']:<22}{r['value']:+.3f}")


if __name__ == "__main__":
    main()
