"""A sample as a line of samples.jsonl: its random stream, its trajectory, its 8-bit image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stitchvm.randomness import keyed_generator
from stitchvm.samplers.base import Samples

__all__ = ["decode", "sample_stream", "trajectories"]


def sample_stream(seed: int, index: int) -> int:
    """Returns the random stream of a sample, an integer below 2^53 (what every JSON reader takes exactly).

    Arguments:
        seed: The sample's seed.
        index: The index of its prompt.
    """
    return keyed_generator("sample", seed, index).initial_seed() % 2**53


def decode(
    vae: Any, latents: Tensor, prompts: Sequence[str], micro_batch: int | None = None
) -> Tensor:
    """Returns uint8 images with shape (B, 3, H, W), on the CPU.

    Arguments:
        vae: The VAE.
        latents: The latents, with shape (B, C, h, w).
        prompts: Their prompts, for the message.
        micro_batch: How many are decoded at a time; all by default.

    Raises:
        ValueError: If a latent is not finite.
    """
    finite = latents.flatten(1).isfinite().all(dim=1).tolist()
    if not all(finite):
        raise ValueError(
            f"the sample of {prompts[finite.index(False)]!r} is not finite (NaN or infinity): lower the guidance, or "
            "run the generator in bfloat16 or float32 (model.generator.dtype)."
        )
    images = []
    for part in latents.split(micro_batch or len(latents)):
        pixels = 255 * vae.decode(part, clamp=True).float()
        images.append(pixels.round().to("cpu", torch.uint8))
    return torch.cat(images)


def trajectories(samples: Samples) -> list[dict[str, Any]]:
    """Returns for every prompt the chosen particle's values, [[σ, value], …], and the sampler's other numbers.

    Where particles were resampled, the chosen one's ancestors are followed back.
    """
    at = samples.chosen.cpu()[:, None]
    values: list[tuple[float, list[float]]] = []
    info: dict[str, list[tuple[float, list[float]]]] = {}
    for record in reversed(samples.records):
        if record.values is not None:
            values.append((record.sigma, record.values.cpu().gather(1, at)[:, 0].tolist()))
        if record.ancestors is not None:
            at = record.ancestors.cpu().gather(1, at)
        for name, numbers in record.info.items():
            each = numbers.reshape(len(at), -1)[:, 0].tolist()
            info.setdefault(name, []).append((record.sigma, each))
    found: list[dict[str, Any]] = []
    for row in range(len(at)):
        found.append(
            {
                "values": points(values, row),
                "info": {name: points(series, row) for name, series in info.items()},
            }
        )
        if samples.final_values is not None:
            found[row]["final_value"] = float(samples.final_values[row, samples.chosen[row]])
    return found


def points(series: Sequence[tuple[float, list[float]]], row: int) -> list[list[float]]:
    """Returns a row's [[σ, number], …], in the order of sampling, with the digits that float32 has."""
    return [[float(f"{s:.7g}"), float(f"{each[row]:.7g}")] for s, each in reversed(series)]
