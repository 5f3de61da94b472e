r"""Flow-GRPO and Flow-GRPO-Fast: policy gradients over the steps of a stochastic sampler.

A step from σ to σ' < σ, dt = σ' − σ, is Gaussian around a mean μ that the velocity determines.

"sde", the Euler step of the sampling SDE (26) with ν² = s²:

    s = noise_level·sqrt(σ/(1 − σ))           (at σ = 1 the denominator takes the next level)
    μ = z·(1 + s²/(2σ)·dt) + u·(1 + s²(1 − σ)/(2σ))·dt,    z' = μ + s·sqrt(−dt)·ε
    log p = mean over the entries of −(z' − μ)²/(2s²·(−dt)) − log(s·sqrt(−dt)) − log sqrt(2π)

"cps", which keeps the coefficients of the flow (and, at a large noise level on all steps, not its marginals):

    s = σ'·sin(noise_level·π/2),   μ = (1 − σ')·(z − σu) + sqrt(σ'² − s²)·(z + (1 − σ)u),   z' = μ + s·ε
    "log p" = mean over the entries of −(z' − μ)²

With noise_level = 0 both are the Euler step. What is as the reference codes it, on purpose, and worth knowing:

- log p is the *mean* over the D entries: clipping a ratio of means at 1e-5 allows 0.66 nats at D = 65,536;
- cps drops all constants, 1/(2s²) too: its gradient is not scaled like a likelihood's;
- the KL to the frozen model is mean (μ − μ_ref)²/(2s²). For "sde" the dt is missing (with it late steps count too
  little, says the reference's author) and the sum is a mean: it is −dt/D of the true divergence. For "cps", whose
  variance is s², it is 1/D of it.

The loss is PPO's, L = max(−A·ρ, −A·clip(ρ, 1 ± clip)) with ρ = exp(log p − log p_old) and A clamped to ±adv_clip.
"Fast" makes only a window of early steps stochastic, and trains on those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stitchvm.objectives.regulariser import mean_over_entries
from stitchvm.path import expand_level, working_dtype
from stitchvm.randomness import keyed_generator

__all__ = ["Transition", "grpo_loss", "kl_to_reference", "sde_window", "transition"]


@dataclass(frozen=True, eq=False)
class Transition:
    """The Gaussian step of a sampler, N(mean, (scale·ε)²).

    Attributes:
        mean: μ with shape (B, ...), differentiable in the velocity.
        std: s with shape () or (B, 1, ..., 1): what the reference returns, and the KL divides by.
        scale: The standard deviation of the step, s·sqrt(−dt) for "sde" and s for "cps"; 0 without noise.
        kind: "sde" or "cps".
    """

    mean: Tensor
    std: Tensor
    scale: Tensor
    kind: str

    def sample(self, eps: Tensor) -> Tensor:
        """Returns z' = μ + scale·ε with the shape of `eps` (B, ...)."""
        return self.mean + self.scale * eps

    def log_prob(self, z_next: Tensor) -> Tensor:
        """Returns "log p" of a step that was made, with shape (B,); not finite for "sde" without noise."""
        square = (z_next.detach().to(self.mean.dtype) - self.mean).square()
        if self.kind == "cps":
            return mean_over_entries(-square)
        constant = self.scale.log() + 0.5 * math.log(2 * math.pi)
        return mean_over_entries(-square / (2 * self.scale.square()) - constant)


def transition(
    z: Tensor,
    u: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    noise_level: float,
    kind: str = "sde",
    sigma_max: float | None = None,
) -> Transition:
    """Returns the step from σ to σ' that a velocity determines, in float32 or better.

    Arguments:
        z: The latents at σ, with shape (B, ...).
        u: The velocity there, with the same shape.
        sigma: σ, a number or a tensor with shape () or (B,).
        sigma_next: σ' < σ, likewise.
        noise_level: How much noise; 0 is the Euler step. The references have 0.7 ("sde") and 0.8 ("cps").
        kind: "sde" or "cps".
        sigma_max: The second level of the schedule, which stands for σ = 1 in 1 − σ ("sde" only; a σ that is a number
            below 1 does without).

    Raises:
        ValueError: If the kind is unknown, the noise level out of its range, shapes differ, or `sigma_max` is
            missing.
    """
    if kind not in ("sde", "cps") or not noise_level >= 0 or (kind == "cps" and noise_level > 1):
        raise ValueError(
            f'kind = "{kind}", noise_level = {noise_level}: expected "sde" with a level ≥ 0 or "cps" with one in '
            "[0, 1]."
        )
    if z.shape != u.shape:
        raise ValueError(
            f"z and u must have one shape, got {tuple(z.shape)} and {tuple(u.shape)}."
        )
    dtype = working_dtype(z, u)
    z, u = z.to(dtype), u.to(dtype)
    if kind == "sde" and sigma_max is None and (isinstance(sigma, Tensor) or sigma == 1):
        raise ValueError(
            "a step that may start at σ = 1 needs sigma_max, the second level of the schedule: sqrt(σ/(1 − σ)) is "
            "infinite there."
        )
    s, s_next = expand_level(sigma, z, "sigma"), expand_level(sigma_next, z, "sigma_next")
    if kind == "cps":
        std = s_next * math.sin(noise_level * math.pi / 2)
        clean, noise = z - s * u, z + (1 - s) * u
        mean = (1 - s_next) * clean + (s_next.square() - std.square()).clamp_min(0).sqrt() * noise
        return Transition(mean, std, std, kind)
    dt = s_next - s
    below_one = s if sigma_max is None else torch.where(s == 1, sigma_max, s)
    std = noise_level * (s / (1 - below_one)).sqrt() if noise_level else torch.zeros_like(s)
    half = std.square() / (2 * s)
    mean = z * (1 + half * dt) + u * (1 + half * (1 - s)) * dt
    return Transition(mean, std, std * (-dt).sqrt(), kind)


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    adv_clip: float = 5.0,
) -> dict[str, Tensor]:
    """Returns the clipped policy-gradient loss max(−A·ρ, −A·clip(ρ, 1 ± clip)) of each sample at one step.

    Arguments:
        log_prob: log p under the policy, with shape (B,), of `Transition.log_prob`.
        old_log_prob: log p when the step was made, with shape (B,); no gradient goes into it.
        advantages: A with shape (B,).
        clip: How far ρ may go from 1; the references have 1e-5 ("cps", Fast) and 1e-4.
        adv_clip: Advantages are clamped to ±adv_clip.

    Returns:
        "loss" and "ratio" with shape (B,); without gradient and as scalars, "clip_fraction" (|ρ − 1| > clip),
        "clip_fraction_high" and "clip_fraction_low" (those whose gradient is cut: A > 0 above, A < 0 below), and
        "approx_kl", ½·mean (log p − log p_old)².

    Raises:
        ValueError: If shapes differ or a bound is not positive.
    """
    if not log_prob.shape == old_log_prob.shape == advantages.shape or log_prob.ndim != 1:
        raise ValueError(
            f"log_prob {tuple(log_prob.shape)}, old_log_prob {tuple(old_log_prob.shape)}, advantages "
            f"{tuple(advantages.shape)}: expected one shape (B,)."
        )
    if not (clip > 0 and adv_clip > 0):
        raise ValueError(f"clip = {clip}, adv_clip = {adv_clip}: expected positive numbers.")
    a = advantages.detach().clamp(-adv_clip, adv_clip)
    log_ratio = log_prob - old_log_prob.detach()
    ratio = log_ratio.exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))
    fixed = ratio.detach()
    return {
        "loss": loss,
        "ratio": ratio,
        "clip_fraction": ((fixed - 1).abs() > clip).double().mean(),
        "clip_fraction_high": ((fixed > 1 + clip) & (a > 0)).double().mean(),
        "clip_fraction_low": ((fixed < 1 - clip) & (a < 0)).double().mean(),
        "approx_kl": 0.5 * log_ratio.detach().square().mean(),
    }


def kl_to_reference(policy: Transition, reference: Transition, *, as_coded: bool = True) -> Tensor:
    """Returns the divergence between the policy's step and the frozen model's at one state, with shape (B,).

    Arguments:
        policy: The policy's step.
        reference: The frozen model's, of the same kind and noise; no gradient goes into it.
        as_coded: mean (μ − μ_ref)²/(2s²), the reference's, without dt and divided by D; else the true divergence of
            the two Gaussians in nats.
    """
    square = (policy.mean - reference.mean.detach()).square()
    if as_coded:
        return mean_over_entries(square / (2 * policy.std.square()))
    return (square / (2 * policy.scale.square())).flatten(1).sum(1)


def sde_window(
    num_steps: int,
    size: int | None,
    bounds: tuple[int, int] = (0, 5),
    *,
    key: tuple[int | str, ...],
) -> range:
    """Returns the steps that are stochastic and trained: a window drawn for a key, the same on all ranks.

    Arguments:
        num_steps: The steps N of the schedule.
        size: The window's size; None for plain Flow-GRPO: all steps but the last, whose Gaussian is too narrow.
        bounds: The window lies within the steps bounds[0] … bounds[1] − 1; the reference's Fast has (0, 5) and size 3.
        key: What the draw depends on, such as (seed, update), or with the prompt's key. (The reference draws per rank
            and batch, which mixes windows within a prompt's group.)

    Raises:
        ValueError: If the window does not fit the bounds, or these the schedule.
    """
    if size is None:
        if num_steps < 2:
            raise ValueError(
                f"num_steps = {num_steps}: expected at least 2, the last is not trained."
            )
        return range(num_steps - 1)
    low, high = bounds
    if not (low >= 0 and 1 <= size <= high - low and high <= num_steps):
        raise ValueError(
            f"a window of {size} steps within [{low}, {high}) of a schedule of {num_steps} steps: expected 1 ≤ size ≤ "
            f"{high - low} and bounds within [0, {num_steps})."
        )
    generator = keyed_generator("window", *key)
    start = int(torch.randint(low, high - size + 1, (), generator=generator))
    return range(start, start + size)
