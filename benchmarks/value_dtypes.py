"""What bfloat16 costs a value: its gradient and its value against float32, part by part, on the embedded world.

    python benchmarks/value_dtypes.py --prompts 32

A GPU runs bfloat16 products many times as fast as float32 ones, in half the memory; the question is which part of a
value can do with 8 bits of mantissa. For every noise level and part, against the same value all in float32:

- `cosine`: of the two gradients, the mean and the lowest over samples: what guidance follows;
- `relative`: ‖∇V − ∇V_32‖/‖∇V_32‖, the mean over samples;
- `value`: the rms error of values, as a share of their spread over latents of one prompt: what FK steering weighs
  and best-of-N chooses by.

FlowPath's arithmetic is float32 everywhere, and so are scores and the interfaces of VAE and reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from stitchvm.data.world_prompts import world_captions
from stitchvm.generator import Generator
from stitchvm.path import FlowPath
from stitchvm.results import write_results
from stitchvm.rewards.hpsv2 import HPSv2Reward
from stitchvm.tables import records_to_text
from stitchvm.values.base import Value
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.tweedie import TweedieValue

__all__ = ["STITCHED", "TWEEDIE", "Dtypes", "compare", "latents"]


@dataclass(frozen=True)
class Dtypes:
    """The dtype of every part of a value.

    Attributes:
        generator: The transformer.
        tail: Stitch and tail of a stitched value.
        vae: The VAE's decoder of a Tweedie value.
        reward: Its reward model.
    """

    generator: str = "float32"
    tail: str = "float32"
    vae: str = "float32"
    reward: str = "float32"


B = "bfloat16"
STITCHED = {
    "generator": Dtypes(generator=B),
    "tail": Dtypes(tail=B),
    "generator, tail": Dtypes(generator=B, tail=B),
}
TWEEDIE = {
    "generator": Dtypes(generator=B),
    "VAE": Dtypes(vae=B),
    "reward": Dtypes(reward=B),
    "generator, reward": Dtypes(generator=B, reward=B),
    "generator, VAE, reward": Dtypes(generator=B, vae=B, reward=B),
}


def stitched(dtypes: Dtypes) -> Value:
    """Returns the world's stitched preference value on its generator."""
    generator = _generator(dtypes)
    return StitchedValue.from_pretrained("world:value_hps", generator, dtype=dtypes.tail)


def tweedie(dtypes: Dtypes) -> Value:
    """Returns the Tweedie value of the world's preference reward, under the sampler's own velocity."""
    reward = HPSv2Reward(model="world:hps", dtype=dtypes.reward)
    return TweedieValue(_generator(dtypes), reward, velocity="cfg")


def _generator(dtypes: Dtypes) -> Generator:
    return Generator(
        "world:sd3",
        dtype=dtypes.generator,
        vae_dtype=dtypes.vae,
        text_tokens=1,
        guidance_scale=4.5,
    )


def latents(
    prompts: int, draws: int, sigmas: Sequence[float]
) -> tuple[list[str], dict[float, Tensor]]:
    """Returns prompts, each repeated, and for every level latents of images of them, (prompts·draws, C, H, W)."""
    from stitchvm.world.render import render
    from stitchvm.world.scenes import parse

    captions = world_captions("test", prompts, 0)
    pixels = torch.from_numpy(render([parse(caption) for caption in captions]))
    with torch.no_grad():
        z_0 = _generator(Dtypes()).vae.encode(pixels).repeat_interleave(draws, dim=0)
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
    noisy = {sigma: FlowPath.interpolate(z_0, noise, sigma) for sigma in sigmas}
    return [caption for caption in captions for _ in range(draws)], noisy


def compare(
    build: Callable[[Dtypes], Value],
    variants: Mapping[str, Dtypes],
    prompts: list[str],
    noisy: Mapping[float, Tensor],
    draws: int,
) -> Iterator[dict[str, Any]]:
    """Gives a record for every variant and level: how far its values and gradients are from float32.

    Arguments:
        build: Builds a value of dtypes.
        variants: The dtypes, by name.
        prompts: One prompt per latent.
        noisy: The latents by level, `draws` for each distinct prompt one after the other.
        draws: The latents of each prompt.
    """
    full = build(Dtypes())
    wanted = {sigma: value_gradient(full, prompts, z_t, sigma) for sigma, z_t in noisy.items()}
    for name, dtypes in variants.items():
        value = build(dtypes)
        for sigma, z_t in noisy.items():
            (v_32, g_32), (v, g) = wanted[sigma], value_gradient(value, prompts, z_t, sigma)
            spread = v_32.unflatten(0, (-1, draws)).var(dim=1).mean().sqrt()
            cosine = cosine_similarity(g, g_32)
            yield {
                "bfloat16": name,
                "sigma": sigma,
                "cosine": float(cosine.mean()),
                "lowest": float(cosine.min()),
                "relative": float(((g - g_32).norm(dim=1) / g_32.norm(dim=1)).mean()),
                "value": float((v - v_32).square().mean().sqrt() / spread),
                "n": len(v),
            }


def value_gradient(
    value: Value, prompts: list[str], z_t: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """Returns values (B,) and flat gradients (B, C·H·W), float64."""
    leaf = z_t.clone().requires_grad_()
    v = value.bind(prompts)(leaf, torch.tensor([sigma]))
    (gradient,) = torch.autograd.grad(v.sum(), leaf)
    return v.detach().double(), gradient.flatten(1).double()


def main() -> None:
    """Prints, and with --out writes, what every part costs at every noise level."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--draws", type=int, default=4, help="latents of each prompt")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.25, 0.5, 0.9])
    parser.add_argument("--out", help="a JSON file for the records")
    args = parser.parse_args()
    prompts, noisy = latents(args.prompts, args.draws, args.sigmas)
    records = []
    for name, build, variants in (("stitched", stitched, STITCHED), ("tweedie", tweedie, TWEEDIE)):
        for record in compare(build, variants, prompts, noisy, args.draws):
            records.append({"benchmark": "value_dtypes", "estimator": name} | record)
            print(".", end="", flush=True)
    columns = ("estimator", "bfloat16", "sigma", "cosine", "lowest", "relative", "value")
    print(f"\n{records_to_text(records, rows=columns, column=None)}")
    if args.out:
        print(f"wrote {write_results(args.out, records, overwrite=True)}")


if __name__ == "__main__":
    main()
