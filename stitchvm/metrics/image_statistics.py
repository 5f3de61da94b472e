r"""Statistics of images that betray reward hacking: a reward that rises while they drift away from the base model's.

    saturation      mean of max − min over the channels (HSV's chroma), in [0, 1]
    edge_density    share of pixels whose luminance gradient is longer than 0.1 per pixel, in [0, 1]
    colour_entropy  entropy in bits of the histogram over 8 × 8 × 8 colours, from 0 (one colour) to 9
    brightness      mean luminance, in [0, 1]
    contrast        standard deviation of the luminance

Fine-tuning on one reward ends in garish colours (saturation), grid artefacts (edge density) or flat posters (colour
entropy) long before the reward stops to rise.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["image_statistics"]

LUMA = (0.299, 0.587, 0.114)
EDGE = 0.1
BINS = 8


@torch.no_grad()
def image_statistics(pixels: Tensor) -> dict[str, Tensor]:
    """Returns each statistic by name, float32 with shape (B,).

    Arguments:
        pixels: Images with shape (B, 3, H, W), in [0, 1] or uint8.

    Raises:
        ValueError: If they have another shape.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < 2:
        raise ValueError(
            f"images have shape {tuple(pixels.shape)}: expected (B, 3, H, W), at least 2 pixels high and wide."
        )
    x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float().clamp(0, 1)
    luma = (x * x.new_tensor(LUMA)[:, None, None]).sum(1)
    dx, dy = luma[:, :-1, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, :-1]
    edges = (dx.square() + dy.square()).sqrt() > EDGE
    return {
        "saturation": (x.amax(1) - x.amin(1)).mean((1, 2)),
        "edge_density": edges.float().mean((1, 2)),
        "colour_entropy": _entropy(x),
        "brightness": luma.mean((1, 2)),
        "contrast": luma.flatten(1).std(1, correction=0),
    }


def _entropy(x: Tensor) -> Tensor:
    level = (x * BINS).long().clamp_max(BINS - 1)
    colour = ((level[:, 0] * BINS + level[:, 1]) * BINS + level[:, 2]).flatten(1)
    counts = x.new_zeros(len(x), BINS**3).scatter_add_(1, colour, torch.ones_like(colour).float())
    share = counts / colour.shape[1]
    return torch.special.entr(share).sum(1) / torch.log(x.new_tensor(2.0))
