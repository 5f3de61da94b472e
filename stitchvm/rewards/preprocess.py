"""Pixels in [0, 1] to the input of a CLIP tower, on tensors and differentiable.

Resampling is bicubic with antialiasing (a = −1/2, as PIL's), by one of five rules:

    shortest   the shorter side → the tower's size, then a centre crop               OpenAI CLIP, ImageReward
    processor  the same, but the crop's corner is rounded down, as in transformers   PickScore
    squash     both sides → the tower's size, the aspect ratio is lost               DFN-CLIP
    longest    the longer side → the tower's size, the rest is black; clamped        open_clip
    pad        the same as longest, rounded and padded as HPSv2 does, not clamped    HPSv2

The padding is black *before* the normalisation (x − mean)/std. PIL works on bytes: it clips the overshoot of the
bicubic kernel after either of its two passes, and so do the first four rules here. HPSv2 resamples a float
tensor and does not. An image that already has the right size is not touched.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RESIZE_MODES", "Preprocess"]

RESIZE_MODES = ("shortest", "processor", "squash", "longest", "pad")


class Preprocess(nn.Module):
    """Resize, crop or pad, and normalise.

    Arguments:
        size: The tower's input (height, width) in pixels.
        mode: One of `RESIZE_MODES`.
        mean: The channel means that are subtracted.
        std: The channel deviations that are divided by.
        interpolation: "bicubic" or "bilinear".

    Raises:
        ValueError: If the mode or the interpolation is unknown.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mode: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        if mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode {mode!r}: expected one of {', '.join(RESIZE_MODES)}")
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation {interpolation!r}: expected 'bicubic' or 'bilinear'")
        self.size, self.mode, self.interpolation = size, mode, interpolation
        self.mean, self.std = tuple(mean), tuple(std)
        # not buffers: `.to(bfloat16)` of the tower must not round them
        self._moments: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the tower's input (B, 3, *size), float32.

        Arguments:
            pixels: RGB in [0, 1], with shape (B, 3, H, W), any floating dtype.

        Raises:
            ValueError: If pixels are not a batch of floating RGB images.
        """
        x = self.resize(pixels)
        if x.device not in self._moments:
            shape = (3, 1, 1)
            with torch.inference_mode(False):  # they are kept, for gradients too
                mean, std = (
                    torch.tensor(m, device=x.device).view(shape) for m in (self.mean, self.std)
                )
            self._moments[x.device] = mean, std
        mean, std = self._moments[x.device]
        return (x - mean) / std

    def resize(self, pixels: Tensor) -> Tensor:
        """Returns pixels in [0, 1] at the tower's size, float32, before normalisation."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"expected RGB pixels in [0, 1] with shape (B, 3, H, W), floating; got {pixels.dtype} "
                f"{tuple(pixels.shape)} (divide bytes by 255, drop an alpha channel)"
            )
        x = pixels.float()
        if tuple(x.shape[-2:]) == self.size:
            return x
        height, width = self._new_size(*x.shape[-2:])
        if self.mode == "pad":
            return self._crop_or_pad(self._resample(x, height, width))
        # PIL's order: rows first, and bytes (so a clip) after each pass
        x = self._resample(x, x.shape[-2], width).clamp(0, 1)
        x = self._resample(x, height, width).clamp(0, 1)
        return self._crop_or_pad(x)

    def _new_size(self, height: int, width: int) -> tuple[int, int]:
        h, w = self.size
        if self.mode == "squash":
            return self.size
        if self.mode in ("shortest", "processor") and h == w:
            # torchvision's Resize(int): the longer side is truncated, not rounded
            short, long = min(height, width), max(height, width)
            other = int(h * long / short)
            return (h, other) if height <= width else (other, h)
        if self.mode == "pad":
            scale = min(h, w) / max(height, width)
            return round(height * scale), round(width * scale)
        ratios = height / h, width / w
        ratio = min(ratios) if self.mode in ("shortest", "processor") else max(ratios)
        return round(height / ratio), round(width / ratio)

    def _resample(self, x: Tensor, height: int, width: int) -> Tensor:
        if tuple(x.shape[-2:]) == (height, width):
            return x
        size = max(height, 1), max(width, 1)
        return F.interpolate(x, size, mode=self.interpolation, align_corners=False, antialias=True)

    def _crop_or_pad(self, x: Tensor) -> Tensor:
        (h, w), (height, width) = self.size, x.shape[-2:]
        down, right = max(h - height, 0), max(w - width, 0)
        if down or right:
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
            height, width = x.shape[-2:]
        whole = math.floor if self.mode == "processor" else round
        top, left = whole((height - h) / 2), whole((width - w) / 2)
        return x[..., top : top + h, left : left + w]
