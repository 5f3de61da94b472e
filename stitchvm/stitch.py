r"""The stitching layer s_ψ from a backbone's features to a reward model's blocks, Eq. (57, 58).

    s(h) = Up(F(h)) + G(Up(F(h))),      G = Conv1×1 ∘ SiLU ∘ Conv1×1 ∘ SiLU

F is a 1×1 convolution that stage 1 initialises in closed form (62), Up the bilinear resampling to
the reward model's patch grid, and G a bottleneck of ratio 1:8 whose last convolution starts at
zero: at the start s is Up ∘ F exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def up(h: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resamples features (B, D, h, w) bilinearly to the grid (gh, gw): the Up of Eq. (57).

    It is linear in `h`, keeps constants, acts on channels alike (so it commutes with every 1×1
    convolution, bias included) and aligns the corners of the outer cells, not their centres.
    """
    if h.shape[-2:] == tuple(grid):
        return h
    # Plain bilinear interpolation reads 2×2 cells for each output. When shrinking (64×64 backbone
    # tokens of a 1024² image to 24×24 patches) it would skip whole cells: information is lost,
    # and what is kept aliases. `antialias` widens the triangle to the output's cell, so every
    # cell counts. Growing, the two agree and the plain kernel is faster.
    shrinks = h.shape[-2] > grid[0] or h.shape[-1] > grid[1]
    # in float32: the CPU has no antialiased kernel for lower precisions
    resampled = functional.interpolate(
        h.to(torch.promote_types(h.dtype, torch.float32)),
        size=tuple(grid),
        mode="bilinear",
        align_corners=False,
        antialias=shrinks,
    )
    return resampled.to(h.dtype)


class ResidualMLP(nn.Module):
    """G = Conv1×1 ∘ SiLU ∘ Conv1×1 ∘ SiLU of Eq. (58) on (B, D, h, w), zero at the start."""

    def __init__(self, width: int, bottleneck: int = 8) -> None:
        super().__init__()
        inner = max(1, width // bottleneck)
        self.reduce = nn.Conv2d(width, inner, kernel_size=1)
        self.expand = nn.Conv2d(inner, width, kernel_size=1)
        self.reset()

    def reset(self) -> None:
        """Zeroes the last convolution, so that G ≡ 0."""
        for parameter in self.expand.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(functional.silu(self.reduce(functional.silu(x))))


class StitchLayer(nn.Module):
    """The stitching layer s_ψ: features (B, D_in, h, w) → patch features (B, D_out, gh, gw).

    Its parameters are float32; under autocast the convolutions run in its dtype, otherwise
    features of a lower precision are raised to float32.

    Arguments:
        in_width: The backbone's width D_in (the latent's channels for the VAE stitch).
        out_width: The reward model's width D_out.
        grid: The reward model's patch grid (gh, gw).
        bottleneck: The ratio 1:r of G; the paper has 8 throughout.
    """

    def __init__(
        self, in_width: int, out_width: int, grid: tuple[int, int], bottleneck: int = 8
    ) -> None:
        super().__init__()
        if min(in_width, out_width, bottleneck, *grid) < 1 or len(grid) != 2:
            raise ValueError(
                f"in_width = {in_width}, out_width = {out_width}, grid = {grid}, bottleneck = "
                f"{bottleneck}: expected positive widths and ratio and a grid (height, width)."
            )
        self.in_width = in_width
        self.out_width = out_width
        self.grid = (int(grid[0]), int(grid[1]))
        self.F = nn.Conv2d(in_width, out_width, kernel_size=1)
        self.G = ResidualMLP(out_width, bottleneck)

    @torch.no_grad()
    def init_closed_form(self, W: Tensor, b: Tensor | None = None) -> None:
        """Initialises F with the least-squares map of stage 1, Eq. (62), and G ≡ 0.

        Arguments:
            W: The map W*, with shape (D_out, D_in), any floating dtype.
            b: The intercept, with shape (D_out,), or None for a fit without one (the paper's):
                zero.

        Raises:
            ValueError: If a shape does not fit the layer or a value is not finite.
        """
        expected = (self.out_width, self.in_width)
        if W.shape != expected:
            hint = " It looks transposed: pass W.T." if W.shape == expected[::-1] else ""
            raise ValueError(
                f"W has shape {tuple(W.shape)}, this layer needs (D_out, D_in) = {expected}."
                f"{hint} Check that the search was run for this backbone depth and reward block."
            )
        if b is not None and b.shape != (self.out_width,):
            raise ValueError(
                f"b has shape {tuple(b.shape)}, expected (D_out,) = ({self.out_width},)."
            )
        if not all(torch.isfinite(x).all() for x in (W, b) if x is not None):
            raise ValueError("W or b has entries that are not finite: was the fit singular?")
        self.F.weight.copy_(W[:, :, None, None])
        assert self.F.bias is not None
        self.F.bias.copy_(torch.zeros_like(self.F.bias) if b is None else b)
        self.G.reset()

    def forward(self, h: Tensor) -> Tensor:
        """Maps features (B, D_in, h, w) to the reward model's patch features (B, D_out, gh, gw).

        Raises:
            ValueError: If `h` does not have the layer's width.
        """
        if h.ndim != 4 or h.shape[1] != self.in_width:
            raise ValueError(
                f"features have shape {tuple(h.shape)}, this stitch needs (B, {self.in_width}, "
                f"h, w). Does it belong to another backbone or depth?"
            )
        if not torch.is_autocast_enabled(h.device.type):
            h = h.to(self.F.weight.dtype)
        # Up and F commute, so F, which costs D_out per cell and channel, runs on whichever grid
        # has fewer cells (Up itself costs a few multiply-adds per cell and channel)
        if h.shape[-2] * h.shape[-1] >= self.grid[0] * self.grid[1]:
            h = self.F(up(h, self.grid))
        else:
            h = up(self.F(h), self.grid)
        return h + self.G(h)

    def flops(self, size: tuple[int, int]) -> int:
        """Returns the FLOPs (2 per multiply-add) per sample of features (h, w), without Up."""
        cells = self.grid[0] * self.grid[1]
        linear = self.F.weight.numel() * min(cells, size[0] * size[1])
        return 2 * (linear + cells * 2 * self.G.reduce.weight.numel())
