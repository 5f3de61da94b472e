r"""DRaFT: the value's gradient, back through the last K steps of a roll-out.

    L = −r(z_0) + λ·R(θ; θ_0)                                                              (63)
    L = −V_ω(z_τ) + λ·R(θ; θ_0)        with a value stopping point                          (64)

The terminal reward is the value at τ = 0, so that both are one loss. R is `output_regulariser` at the states that get a
gradient. With `ceiling` c the first term is max(c − V, 0): samples that are good enough teach nothing more.

**The last step.** With z_τ = z_t + (τ − t)·u_t(z_t), ∂z_τ/∂u = −(t − τ): DRaFT-1's gradient is proportional to the
last step's length. diffusers' own 10-step SD 3.5 schedule ends with .0089, the textbook's with .25, a factor of 28 that
also divides reward by regulariser: give the schedule explicitly.

**DRaFT-LV** draws the last step n times more. From a detached z_τ the bridge goes up to the step's level t again and
the step is repeated, z_τ' = z_t' + (τ − t)·u_t(z_t'); the value is averaged over the original and the n copies. With
n = 0 it is DRaFT-1. At τ = 0 it is z_t' = (1 − t)·sg(z_0) + t·ε, as in the literature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stitchvm.path import FlowPath

__all__ = ["draft_loss", "renoise"]


def draft_loss(
    value: Tensor,
    regulariser: Tensor | None = None,
    *,
    lam: float = 0.01,
    ceiling: float | None = None,
) -> dict[str, Tensor]:
    """Returns "loss" = −V + λR (or max(c − V, 0) + λR) with shape (B,), and "active", see below.

    Arguments:
        value: V_ω(z_τ) or the terminal reward, with shape (B,); for DRaFT-LV (1 + n, B), averaged here.
        regulariser: R with shape (B,); None for λ = 0, so that the frozen model need not run.
        lam: λ ≥ 0; the paper has 0.01.
        ceiling: c, or None.

    Returns:
        "loss" with shape (B,), and "active": the share of values below the ceiling, a scalar without gradient.

    Raises:
        ValueError: If λ is negative, the shapes differ, or λ > 0 without a regulariser.
    """
    if lam < 0 or (lam > 0 and regulariser is None):
        raise ValueError(
            f"lam = {lam} with {'no' if regulariser is None else 'a'} regulariser: expected lam ≥ 0, and R where it "
            "is positive. Pass lam=0 to go without."
        )
    if value.ndim not in (1, 2) or (
        regulariser is not None and regulariser.shape != value.shape[-1:]
    ):
        shape = None if regulariser is None else tuple(regulariser.shape)
        raise ValueError(
            f"values {tuple(value.shape)} and regulariser {shape}: expected (B,) or (1 + n, B), and (B,)."
        )
    value = value.float() if value.dtype != torch.float64 else value
    cost = -value if ceiling is None else (ceiling - value).clamp_min(0)
    below = torch.ones_like(value) if ceiling is None else (value < ceiling).to(value.dtype)
    loss = cost if cost.ndim == 1 else cost.mean(0)
    if regulariser is not None and lam > 0:
        loss = loss + lam * regulariser
    return {"loss": loss, "active": below.detach().mean()}


def renoise(z_tau: Tensor, tau: Tensor | float, t: Tensor | float, eps: Tensor) -> Tensor:
    """Returns a point z_t of the bridge from the *detached* z_τ, with its shape (B, ...): DRaFT-LV's other start.

    Arguments:
        z_tau: Where the roll-out stopped.
        tau: Its level τ.
        t: The level of the step before, t > τ.
        eps: Fresh noise, with the same shape.
    """
    return FlowPath.bridge(tau, t).interpolate(z_tau.detach(), eps)
