"""On-disk cache of training latents: what every generator is trained on, latents and captions only."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from stitchvm.world.render import render
from stitchvm.world.scenes import sample_scenes
from stitchvm.world.train.common import runs_folder, save_atomic, weights_folder

COUNT = 30_000


def load_vae() -> AutoencoderKL:
    """Returns the trained VAE in float32, frozen.

    Raises:
        FileNotFoundError: the vae stage has not been run.
    """
    places = (runs_folder() / "vae" / "export", weights_folder() / "sd3" / "vae")
    for place in places:
        if (place / "config.json").exists():
            vae = AutoencoderKL.from_pretrained(place, dtype=torch.float32)
            return vae.requires_grad_(False).eval()
    raise FileNotFoundError(
        f"no VAE in {places[0]} or {places[1]}: run `python -m stitchvm.world.train --stage vae` first"
    )


def to_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Returns z_0 = (mean - shift) * scaling of pixels (B, 3, H, W) in [0, 1]."""
    mean = vae.encode(2 * pixels - 1).latent_dist.mean
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


def to_pixels(vae: AutoencoderKL, z_0: Tensor) -> Tensor:
    """Returns pixels in [0, 1] (clamped) of latents."""
    out = vae.decode(z_0 / vae.config.scaling_factor + vae.config.shift_factor).sample
    return ((out + 1) / 2).clamp(0, 1)


@torch.no_grad()
def cached_latents(count: int = COUNT, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Returns (float16 latents (N, 4, 16, 16), captions) of N training scenes, made once per VAE."""
    vae = load_vae()
    folder = runs_folder() / "latents"
    mark = float(sum(p.double().abs().sum() for p in vae.parameters()))
    path: Path = folder / f"train_{count}_{seed}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["mark"] == mark:
            return saved["latents"], json.loads(saved["captions"])
    scenes = sample_scenes("train", count, [seed, 5])
    parts = []
    for start in range(0, count, 500):
        pixels = torch.from_numpy(render(scenes[start : start + 500]))
        parts.append(to_latents(vae, pixels).half())
    latents, captions = torch.cat(parts), [s.caption for s in scenes]
    save_atomic({"mark": mark, "latents": latents, "captions": json.dumps(captions)}, path)
    return latents, captions
