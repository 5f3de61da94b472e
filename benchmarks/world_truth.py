"""What a value's error against the truth is made of: estimators against several truths on the embedded world.

    python benchmarks/world_truth.py

| truth       | what it is                                                                                          |
|-------------|-----------------------------------------------------------------------------------------------------|
| "draw"      | r of the very image that was noised: one exact draw of r | z_t under the law of the images           |
| "posterior" | E[r | z_t] under the grammar, importance sampling from scenes (only where enough of them count)      |
| "rollouts"  | the mean over roll-outs of the generator: what `stitchvm test` calls truth                           |

| images      | drawn by the grammar, or made by the generator from pure noise under null text                       |

For any estimator V, E(V − draw)² = E(V − E[r | z_t])² + E Var[r | z_t], and the last term is the same for all of them:
the draw ranks estimators by their error against the exact truth, without one roll-out, and cannot favour a generator.
A stitched value is distilled on drawn images; Tweedie and Monte Carlo know the generator's law only. That holds for a
text chosen without the image ("other"); an image's own caption knows the image, so "own" says nothing about the draw.

For each: R², R² after the best affine map of the estimate, bias, the truth's own noise. Rewards with text score every
image for its own caption and for another's. Beside it SRCC of the aesthetic estimates, and of the Monte Carlo truths
themselves, with the true score. Writes results/world/truth.json.
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
from stitchvm.rewards.average import score_of_average
from stitchvm.rewards.base import Reward
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.hpsv2 import HPSv2Reward
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import Value
from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.tweedie import TweedieValue
from stitchvm.world.checker import read
from stitchvm.world.render import render
from stitchvm.world.scenes import Scene, sample_scenes
from stitchvm.world.scores import aesthetic_score

REWARDS = {
    "aesthetic": lambda: AestheticReward("world:aesthetic"),
    "clip": lambda: CLIPReward("world:clip"),
    "hps": lambda: HPSv2Reward("world:hps"),
}
ROWS = 256  # latents at a time
ENOUGH = 50  # effective draws of the prior, below which importance sampling says nothing
Embeddings = dict[str, Tensor]


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Returns the scenes as 8-bit pictures in [0, 1], as the data modules give them."""
    return torch.from_numpy((np.rint(np.asarray(render(scenes)) * 255) / 255).astype(np.float32))


def in_parts(function: Any, rows: Tensor) -> Tensor:
    """Returns a function of rows, computed in parts."""
    return torch.cat([function(part) for part in rows.split(ROWS)])


class Study:
    """The networks, and draws of the prior for importance sampling."""

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
        first = next(iter(self.rewards.values()))
        self.roll = MonteCarloValue(self.generator, first, steps=args.rollout_steps)
        self.whole = MonteCarloValue(self.generator, first, steps=40)
        self.random = torch.Generator().manual_seed(args.seed)
        prior = pixels_of(sample_scenes("train", args.prior, [args.seed, 78]))
        self.prior_z = in_parts(self.vae.encode, prior)
        self.prior_e = self.embed(prior, 1)

    def embed(self, pixels: Tensor, n: int) -> Embeddings:
        """Returns unit embeddings (n, B, E) of pixels (n B, 3, H, W), per reward."""

        def unit(reward: Reward) -> Tensor:
            e = in_parts(lambda x: normalize(reward.embed(x).image.float(), dim=-1), pixels)
            return e.unflatten(0, (n, len(pixels) // n))

        return {name: unit(reward) for name, reward in self.rewards.items()}

    def rollouts(self, z_t: Tensor, t: float) -> Embeddings:
        """Returns unit embeddings (n, B, E) of roll-outs from each latent."""

        def decoded(z: Tensor) -> Tensor:
            levels = torch.full((len(z),), t)
            return self.vae.decode(self.roll.rollout(z, levels, self.generator.null, self.random))

        n = self.args.rollouts
        return self.embed(in_parts(decoded, z_t.repeat(n, 1, 1, 1)), n)

    def generated(self, n: int) -> Tensor:
        """Returns latents z_0 that the generator makes of pure noise under null text."""

        def run(z: Tensor) -> Tensor:
            return self.whole.rollout(z, torch.ones(len(z)), self.generator.null, self.random)

        return in_parts(run, torch.randn(n, 4, 16, 16, generator=self.random))

    def posterior(self, z_t: Tensor, t: float) -> tuple[Embeddings, float]:
        """Returns mean embeddings (2, B, E) of either half of the prior's draws, and the median effective number."""
        x, y = z_t.double().flatten(1), (1 - t) * self.prior_z.double().flatten(1)
        energy = torch.cdist(x, y).square() / (2 * t**2)  # (B, M)
        w = torch.softmax(-energy, 1)
        effective = float((1 / w.square().sum(1)).median())
        halves = [torch.softmax(-part, 1).float() for part in energy.chunk(2, dim=1)]

        def means(e: Tensor) -> Tensor:
            parts = e[0].chunk(2)
            return torch.stack([weight @ part for weight, part in zip(halves, parts, strict=True)])

        return {name: means(e) for name, e in self.prior_e.items()}, effective


def scores(reward: Reward, e: Tensor, text: Tensor | None) -> Tensor:
    """Returns scores (n, B) of embeddings or their averages (n, B, E) for texts (B, E)."""
    return torch.stack([score_of_average(reward, one, text).float() for one in e])


def compare(
    study: Study,
    truths: dict[str, Embeddings],
    z_t: Tensor,
    captions: list[str],
    about: dict[str, Any],
    true_scores: Tensor | None,
) -> list[dict[str, Any]]:
    """Returns the records of all estimators against all truths at one level."""
    records: list[dict[str, Any]] = []

    def add(metric: str, estimator: str, estimate: Any, **more: Any) -> None:
        record = {"metric": metric, "estimator": estimator, **about, **more}
        numbers = {"value": float(estimate.value), "stderr": float(estimate.stderr)}
        records.append(record | numbers | {"n": int(estimate.n)})

    for name, reward in study.rewards.items():
        found = {}
        for kind, value in study.estimators[name].items():

            def unit(z: Tensor, value: Value = value) -> Tensor:
                return normalize(value.embed(z, torch.full((len(z),), about["sigma"])), dim=-1)

            found[kind] = in_parts(unit, z_t)
        texts: dict[str, Tensor | None] = {"none": None}
        if reward.uses_text:
            own = reward.encode_text(captions)
            texts = {"own": own, "other": own.roll(1, 0)}
        for which, text in texts.items():
            values = {k: scores(reward, e[None], text)[0] for k, e in found.items()}
            for truth, e in truths.items():
                count = e[name].shape[1]  # of the images, the first ones
                lines = None if text is None else text[:count]
                each = scores(reward, e[name], lines)
                half_a, half_b = (
                    (h.mean(0) for h in each.chunk(2)) if len(each) > 1 else (each[0], each[0])
                )
                if truth == "rollouts":
                    values["monte_carlo"] = each.mean(0)
                if true_scores is not None and not reward.uses_text:
                    correlation = SpearmanCorrelation()
                    correlation.update(each.mean(0), true_scores[:count], torch.arange(count))
                    add("aesthetic/srcc", f"truth: {truth}", correlation.compute()["srcc"])
                for kind, value in values.items():
                    if kind == "monte_carlo" and truth == "rollouts":
                        continue
                    common = min(count, len(value))
                    metric = TruthError()
                    rows = torch.arange(common)
                    metric.update(value[:common], half_a[:common], half_b[:common], rows)
                    for what, estimate in metric.compute().items():
                        add(f"truth/{what}", kind, estimate, reward=name, text=which, truth=truth)
            if true_scores is not None and not reward.uses_text:
                subsets = {len(true_scores), study.args.rollout_images}
                for kind, value in values.items():
                    for count in subsets:
                        if count <= len(value):
                            correlation = SpearmanCorrelation()
                            rows = torch.arange(count)
                            correlation.update(value[:count], true_scores[:count], rows)
                            add("aesthetic/srcc", kind, correlation.compute()["srcc"])
    return records


@torch.no_grad()
def main() -> None:
    """Measures all truths at all levels, writes after each level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS))
    parser.add_argument("--sigmas", nargs="+", type=float, default=[0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--prior", type=int, default=8000, help="scenes of importance sampling")
    parser.add_argument("--rollout-images", type=int, default=96, help="the first of the images")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--rollout-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stitched", default="world:value_{reward}")
    parser.add_argument(
        "--vae-stitch", default="runs/world_values/{reward}/vae_stitch/value_model"
    )
    parser.add_argument("--output", type=Path, default=Path("results/world/truth.json"))
    args = parser.parse_args()
    study = Study(args)
    drawn = sample_scenes("train", args.images, [args.seed, 76])
    true_scores = torch.tensor([float(aesthetic_score(s)) for s in drawn])
    z_null = study.generated(args.images)
    made = in_parts(lambda z: study.vae.decode(z, clamp=True), z_null)
    seen = [read(x)[0] for x in made.numpy()]
    readable = sum(s is not None for s in seen)
    print(f"the checker finds a scene in {readable} of {len(seen)} null-text samples")
    # an image that cannot be read is scored for a drawn scene's caption
    null_captions = [(s or d).caption for s, d in zip(seen, drawn, strict=True)]
    pictures = {"drawn": pixels_of(drawn), "null": made}
    latents = {"drawn": in_parts(study.vae.encode, pictures["drawn"]), "null": z_null}
    captions = {"drawn": [s.caption for s in drawn], "null": null_captions}
    clean = {source: study.embed(x, 1) for source, x in pictures.items()}

    records: list[dict[str, Any]] = []
    for t in args.sigmas:
        start = time.perf_counter()
        for source, z_0 in latents.items():
            about: dict[str, Any] = {"images": source, "sigma": t}
            eps = torch.randn(z_0.shape, generator=study.random)
            z_t = FlowPath.interpolate(z_0, eps, torch.full((len(z_0),), t))
            truths = {"rollouts": study.rollouts(z_t[: args.rollout_images], t)}
            truths["draw"] = clean[source]
            if source == "drawn":
                posterior, effective = study.posterior(z_t, t)
                print(f"sigma = {t}: {effective:.1f} effective draws of the prior")
                about["effective_draws"] = effective
                if effective >= ENOUGH:
                    truths["posterior"] = posterior
            known = true_scores if source == "drawn" else None
            records += compare(study, truths, z_t, captions[source], about, known)
        write_results(
            args.output,
            records,
            command=" ".join(["python benchmarks/world_truth.py", *sys.argv[1:]]),
            overwrite=True,
        )
        print(f"sigma = {t}: {time.perf_counter() - start:.0f} s")
        keep = ("truth/r2", "truth/r2_calibrated", "truth/bias", "aesthetic/srcc")
        for r in records:
            if r["sigma"] == t and r["metric"] in keep:
                label = " ".join(str(r.get(k, "")) for k in ("images", "reward", "text", "truth"))
                print(f"  {label:<32}{r['estimator']:<18}{r['metric']:<22}{r['value']:+.3f}")


if __name__ == "__main__":
    main()
