r"""DiffusionNFT: regression towards good samples and away from bad ones, plain and anchored at a value.

A sample of the old policy has the advantage A. Its *optimality* and the two contrasted velocities are (65–70)

    r = ½ + ½·clip(A/A_max, −1, 1)
    u⁺ = (1 − β)·u_old + β·u_θ,     u⁻ = (1 + β)·u_old − β·u_θ

**Velocity form**, the paper's: L = r·‖u⁺ − u*‖² + (1 − r)·‖u⁻ − u*‖² with u* the conditional velocity, and norms that
are means over the entries.

**Self-normalised form**, the reference's, in the space of the clean latent x^± = z_t − t·u^±:

    L = (A_max/β)·[ r·‖x⁺ − z_0‖²/w⁺ + (1 − r)·‖x⁻ − z_0‖²/w⁻ ],   w^± = sg max(mean |x^± − z_0|, 1e-5)

At u_θ = u_old its gradient in u_θ is −(2t·A/(D·w))·(x_old − z_0), D the number of entries: neither β nor A_max matters,
and its ℓ1 norm is 2t·|A|. The loss's *value* says nothing about r there; its gradient is proportional to A.

**Value-anchored form** (72–77): the roll-out stops at z_τ, A comes from V_ω(z_τ), and z_t, t > τ, is drawn on the
bridge from z_τ. The same loss in the space of the anchor ẑ_τ(u) = a·z_t − b·u (`Bridge.anchor`) instead of x. The
bridge's velocity target explodes as t → τ, so that a velocity loss would be a loss of the one or two levels next to τ;
in the anchor's space the error is b·(u − u*), b = σ̄²(1 − τ)/t → 0, and everything stays finite at t = τ. On-policy the
gradient's ℓ1 norm is 2b·|A|. At τ = 0 it is the plain form, bit for bit. In the velocity form both have the same
minimiser, since E[u_{t|τ} | z_t] = u_t(z_t) and V is the conditional mean of the reward.

After each update the old policy follows, θ_old ← ρ·θ_old + (1 − ρ)·θ (71), with ρ = `old_decay(step)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stitchvm.objectives.regulariser import mean_over_entries
from stitchvm.path import Bridge, FlowPath, expand_level, working_dtype

__all__ = [
    "anchored_nft_loss",
    "contrast",
    "ema_decay",
    "nft_loss",
    "old_decay",
    "optimality",
    "velocity_nft_loss",
]

MIN_WEIGHT = 1e-5
MODES = ("all", "positive_only", "negative_only", "one_only", "binary")


def optimality(advantages: Tensor, adv_clip: float = 5.0, mode: str = "all") -> Tensor:
    """Returns r = ½ + ½·clip(A/A_max, −1, 1) in [0, 1], with the shape (B,) of the advantages.

    Arguments:
        advantages: The advantages A, with shape (B,).
        adv_clip: A_max; the reference has 5.
        mode: The reference's variants: "all"; "positive_only" and "negative_only" set the others to 0; "one_only" makes
            them 1 where A > 0, else 0; "binary" takes the sign. (±1 is not ±A_max: r is 0.6 and 0.4 then, not 1 and 0.)

    Raises:
        ValueError: If `adv_clip` is not positive or the mode unknown.
    """
    if not adv_clip > 0 or mode not in MODES:
        raise ValueError(
            f'adv_clip = {adv_clip}, mode = "{mode}": expected adv_clip > 0 and one of {MODES}.'
        )
    a = advantages.clamp(-adv_clip, adv_clip)
    if mode == "positive_only":
        a = a.clamp_min(0)
    elif mode == "negative_only":
        a = a.clamp_max(0)
    elif mode == "one_only":
        a = (a > 0).to(a.dtype)
    elif mode == "binary":
        a = a.sign()
    return (a / adv_clip / 2 + 0.5).clamp(0, 1)


def contrast(u: Tensor, u_old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Returns u⁺ = βu + (1 − β)u_old and u⁻ = (1 + β)u_old − βu, in float32 or better; u⁺ + u⁻ = 2u_old.

    Arguments:
        u: The policy's velocity u_θ, with shape (B, ...).
        u_old: The old policy's, with the same shape; it gets no gradient.
        beta: β > 0.

    Raises:
        ValueError: If β is not positive or the shapes differ.
    """
    if not beta > 0:
        raise ValueError(f"beta = {beta}: expected a positive number (the paper has 0.1 and 1).")
    if u.shape != u_old.shape:
        raise ValueError(
            f"u and u_old must have one shape, got {tuple(u.shape)} and {tuple(u_old.shape)}."
        )
    dtype = working_dtype(u, u_old)
    u, u_old = u.to(dtype), u_old.detach().to(dtype)
    return beta * u + (1 - beta) * u_old, (1 + beta) * u_old - beta * u


def nft_loss(
    u: Tensor,
    u_old: Tensor,
    z_t: Tensor,
    z_0: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    beta: float,
    adv_clip: float = 5.0,
) -> dict[str, Tensor]:
    """Returns the self-normalised loss in the space of the clean latent, per sample.

    Arguments:
        u: The policy's velocity at (z_t, t), with shape (B, ...).
        u_old: The old policy's there.
        z_t: The noised sample (1 − t)·z_0 + t·ε.
        z_0: The clean sample of the old policy.
        t: The noise levels, with shape (B,).
        r: The optimality, with shape (B,).
        beta: β.
        adv_clip: A_max, the reference's factor in front.

    Returns:
        "loss", and its parts without weights: "positive" and "negative" (‖x^± − z_0‖²/w^±); each (B,).

    Raises:
        ValueError: If shapes differ or β is not positive.
    """
    plus, minus = contrast(u, u_old, beta)
    predictions = FlowPath.denoise(z_t, plus, t), FlowPath.denoise(z_t, minus, t)
    return _self_normalised(*predictions, z_0, r, beta, adv_clip)


def anchored_nft_loss(
    u: Tensor,
    u_old: Tensor,
    z_t: Tensor,
    z_tau: Tensor,
    bridge: Bridge,
    r: Tensor,
    *,
    beta: float,
    adv_clip: float = 5.0,
) -> dict[str, Tensor]:
    """Returns the self-normalised loss in the space of the anchor z_τ, per sample; finite for every t ≥ τ.

    Arguments:
        u: The policy's velocity at (z_t, t), with shape (B, ...).
        u_old: The old policy's there.
        z_t: A point of the bridge, `bridge.interpolate(z_tau, eps)`.
        z_tau: The latent where the old policy's roll-out stopped.
        bridge: `FlowPath.bridge(tau, t)`, in float32 or better.
        r: The optimality from V_ω(z_τ), with shape (B,).
        beta: β.
        adv_clip: A_max.

    Returns:
        As `nft_loss`, which it equals bit for bit at τ = 0.

    Raises:
        ValueError: If shapes differ or β is not positive.
    """
    plus, minus = contrast(u, u_old, beta)
    predictions = bridge.anchor(z_t, plus), bridge.anchor(z_t, minus)
    return _self_normalised(*predictions, z_tau, r, beta, adv_clip)


def velocity_nft_loss(
    u: Tensor,
    u_old: Tensor,
    target: Tensor,
    r: Tensor,
    *,
    beta: float,
    scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns the paper's r·‖u⁺ − u*‖² + (1 − r)·‖u⁻ − u*‖² per sample, norms as means over the entries.

    Arguments:
        u: The policy's velocity at (z_t, t), with shape (B, ...).
        u_old: The old policy's there.
        target: u*: `FlowPath.velocity_target(z_0, eps)`, or on a bridge `bridge.velocity_target(z_tau, eps)`, which is
            not finite at t = τ.
        r: The optimality, with shape (B,).
        beta: β.
        scale: A factor s of the velocities, with shape () or (B,), if `target` is already s·u*: with s = σ̄ and
            `bridge.scaled_velocity_target(z_tau, eps)` this is the σ̄²-weighted loss, finite for every t ≥ τ.

    Returns:
        "loss", and its parts "positive" and "negative"; each (B,).

    Raises:
        ValueError: If shapes differ or β is not positive.
    """
    plus, minus = contrast(u, u_old, beta)
    if scale is not None:
        scale = expand_level(scale, plus, "scale")
        plus, minus = scale * plus, scale * minus
    _check(plus, target, r)
    positive = mean_over_entries((plus - target.detach()).square())
    negative = mean_over_entries((minus - target.detach()).square())
    r = r.to(positive.dtype)
    return {
        "loss": r * positive + (1 - r) * negative,
        "positive": positive,
        "negative": negative,
    }


def _self_normalised(
    plus: Tensor, minus: Tensor, target: Tensor, r: Tensor, beta: float, adv_clip: float
) -> dict[str, Tensor]:
    _check(plus, target, r)
    target = target.detach().to(plus.dtype)
    parts = []
    for prediction in (plus, minus):
        error = prediction - target
        w = error.detach().abs().flatten(1).mean(1, dtype=torch.float64).clamp_min(MIN_WEIGHT)
        parts.append(mean_over_entries(error.square()) / w.to(error.dtype))
    positive, negative = parts
    r = r.to(positive.dtype)
    loss = adv_clip * (r * positive / beta + (1 - r) * negative / beta)
    return {"loss": loss, "positive": positive, "negative": negative}


def _check(prediction: Tensor, target: Tensor, r: Tensor) -> None:
    if prediction.shape != target.shape or r.shape != prediction.shape[:1]:
        raise ValueError(
            f"predictions {tuple(prediction.shape)}, target {tuple(target.shape)} and r {tuple(r.shape)}: expected "
            "(B, ...), the same, and (B,)."
        )


def old_decay(step: int, kind: int = 1) -> float:
    """Returns ρ of the old policy's update after optimiser step `step` (counted from 1), as the reference codes it.

    Arguments:
        step: The number of optimiser steps done.
        kind: 0: always 0 (the old policy is the policy); 1: min(0.001·step, 0.5); 2: 0 before step 75, then
            min(0.0075·(step − 75), 0.999).

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind == 0:
        return 0.0
    if kind == 1:
        return min(0.001 * step, 0.5)
    if kind == 2:
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    raise ValueError(f"decay kind {kind}: expected 0 (none), 1 (to 0.5) or 2 (to 0.999).")


def ema_decay(step: int, limit: float = 0.9) -> float:
    """Returns min((1 + step)/(10 + step), limit), the decay of the average that is evaluated and exported."""
    return min((1 + step) / (10 + step), limit)
