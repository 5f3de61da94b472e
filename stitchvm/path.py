r"""The flow's path between data and noise, its reparametrisations, the bridge between levels.

`t = 0` is clean data, `t = 1` Gaussian noise, and the noise level is σ_t = t (Eq. 1, 66, 67):

    z_t = α_t z_0 + σ_t ε,   α_t = 1 − t,   σ_t = t
    u_t(z_t | z_0) = α̇_t z_0 + σ̇_t ε = ε − z_0

With the marginal velocity u = E[ε − z_0 | z_t], every other description of the flow is affine in
(z_t, u):

    E[z_0 | z_t] = D = z_t − t·u                     denoiser, "Tweedie" (22), inverse (16)
    E[ε | z_t]       = z_t + (1 − t)·u               noise
    ∇ log p_t(z_t)   = −((1 − t)·u + z_t) / t        score (25), inverse (24); to the denoiser (18)

**End points.** Formulas without a division hold at t = 0 and t = 1 as they stand: D = z_t and
E[ε] = z_t + u at 0; D = z_t − u and E[ε] = z_t at 1; the score is −z_t at 1. Where a formula
divides by zero, the finite limit is returned if it is a function of the arguments (the velocity
from a denoiser or a score at t = 0 is −z_t). Otherwise the argument does not determine the answer
and the result is not finite, on purpose rather than clipped: the score at t = 0, the velocity
from a score or a noise at t = 1, the denoiser from a score at t = 1.

**Arithmetic** is done, and returned, in float32 or better whatever the networks' dtype: bfloat16
and float16 come back as float32, float64 stays float64. `t` is a number, a scalar tensor or has
shape (B,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns the dtype of the flow's arithmetic: float32, or float64 if a tensor has it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def levels(t: Tensor | float, z: Tensor) -> Tensor:
    """Returns a level as float32 with shape (B,), where the latents are; a number on the CPU makes no GPU wait."""
    if isinstance(t, Tensor) and t.ndim:
        return t.to(z.device, torch.float32)
    return torch.full((len(z),), float(t), dtype=torch.float32, device=z.device)


def expand_level(t: Tensor | float, z: Tensor, name: str = "t") -> Tensor:
    """Returns noise levels, shaped to broadcast over `z` and in the dtype of its arithmetic.

    Arguments:
        t: The levels, a number or a tensor with shape () or (B,).
        z: The latents, with shape (B, ...).
        name: What to call `t` in an error.

    Returns:
        The levels with shape (B, 1, ..., 1), or () for a scalar.

    Raises:
        ValueError: If `t` is a number outside [0, 1] or a tensor of another shape. (The values of
            a tensor are not looked at, since that would make a GPU wait.)
    """
    dtype = working_dtype(z)
    if not isinstance(t, Tensor):
        if not 0.0 <= t <= 1.0:
            raise ValueError(
                f"{name} = {t} is not a noise level: expected a number in [0, 1], 0 clean and 1 "
                f"noise. (Networks take 1000·t, everything here takes t.)"
            )
        return torch.full((), t, dtype=dtype, device=z.device)
    if t.ndim == 0:
        if t.device.type == "cpu" != z.device.type:  # to be copied it would wait for the GPU
            return torch.full((), t.item(), dtype=dtype, device=z.device)
        return t.to(device=z.device, dtype=dtype)
    if z.ndim == 0 or t.shape != z.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(t.shape)} beside latents of shape {tuple(z.shape)}: "
            f"expected a scalar or ({z.shape[0] if z.ndim else 'B'},), one level per latent. Pass "
            f"`{name}.reshape(-1)` or `{name}.expand(batch)`."
        )
    return t.to(device=z.device, dtype=dtype).reshape(-1, *[1] * (z.ndim - 1))


def _same_shape(z: Tensor, other: Tensor, names: str) -> tuple[Tensor, Tensor]:
    """Returns both tensors in their working dtype; a ValueError when their shapes differ."""
    if z.shape != other.shape:
        raise ValueError(
            f"{names} must have one shape, got {tuple(z.shape)} and {tuple(other.shape)}: a "
            f"silent broadcast would mix samples. Expand one of them."
        )
    dtype = working_dtype(z, other)
    return z.to(dtype), other.to(dtype)


@dataclass(frozen=True, eq=False)
class Bridge:
    r"""The coefficients of the bridge from a stopped latent z_τ to a noisier z_t, t ≥ τ.

    z_t = ᾱ z_τ + σ̄ ε (75), u_{t|τ}(z_t | z_τ) = ᾱ̇ z_τ + σ̄̇ ε (76). With τ = 0 it is the flow.

    Its marginal velocity is the flow's own, E[u_{t|τ} | z_t] = u_t(z_t), so u_{t|τ} is a valid
    regression target; but σ̄ → 0 and σ̄̇ → ∞ as t → τ, where its variance explodes. Two
    targets with the same minimiser stay finite:

    - *anchor space*: solving (75, 76) for the anchor gives ẑ_τ(u) = a·z_t − b·u, the same map for
      every u, with a = (1 − τ) + (1 − t)τ²/(t(1 − τ)) and b = σ̄²(1 − τ)/t. Hence
      ẑ_τ(u_{t|τ}) = z_τ, ẑ_τ(u_t(z_t)) = E[z_τ | z_t], and ‖ẑ_τ(u) − z_τ‖² = b²·‖u − u_{t|τ}‖²
      for every u (`anchor`, `anchor_weight`). With τ = 0 this is the denoiser, b = t;
    - *σ̄-weighted velocity*: σ̄·u against σ̄·u_{t|τ} = σ̄ᾱ̇ z_τ + (σ̄σ̄̇) ε, weight σ̄²
      (`scaled_velocity_target`).

    Attributes:
        alpha: ᾱ = α_t/α_τ, with shape () or (B,).
        sigma: σ̄ = sqrt(σ_t² − ᾱ²σ_τ²), 0 at t = τ.
        d_alpha: ᾱ̇ = −1/(1 − τ).
        d_sigma: σ̄̇ = (t + (1 − t)τ²/(1 − τ)²)/σ̄, infinite at t = τ > 0.
        tau: The anchor's level τ in [0, 1).
        t: The level t in [τ, 1].
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    tau: Tensor
    t: Tensor

    @property
    def sigma_d_sigma(self) -> Tensor:
        """The product σ̄σ̄̇ = t + (1 − t)τ²/(1 − τ)², finite for every t ≥ τ."""
        return self.t + (1 - self.t) * (self.tau / (1 - self.tau)) ** 2

    @property
    def anchor_weight(self) -> Tensor:
        """The weight b = σ̄²(1 − τ)/t with ẑ_τ(u) − z_τ = −b·(u − u_{t|τ}), 0 at t = τ."""
        return (self.t - self.tau) * (1 + self._ratio() - 2 * self.tau) / (1 - self.tau)

    def interpolate(self, z_tau: Tensor, eps: Tensor) -> Tensor:
        """Returns z_t = ᾱ z_τ + σ̄ ε, Eq. (75), with the shape (B, ...) of `z_tau` and `eps`."""
        z_tau, eps = _same_shape(z_tau, eps, "z_tau and eps")
        return _like(self.alpha, z_tau) * z_tau + _like(self.sigma, z_tau) * eps

    def velocity_target(self, z_tau: Tensor, eps: Tensor) -> Tensor:
        """Returns u_{t|τ}(z_t | z_τ) = ᾱ̇ z_τ + σ̄̇ ε, Eq. (76); not finite at t = τ > 0."""
        z_tau, eps = _same_shape(z_tau, eps, "z_tau and eps")
        return _like(self.d_alpha, z_tau) * z_tau + _like(self.d_sigma, z_tau) * eps

    def scaled_velocity_target(self, z_tau: Tensor, eps: Tensor) -> Tensor:
        """Returns σ̄·u_{t|τ} = σ̄ᾱ̇ z_τ + σ̄σ̄̇ ε, finite for every t ≥ τ."""
        z_tau, eps = _same_shape(z_tau, eps, "z_tau and eps")
        on_anchor = _like(self.sigma * self.d_alpha, z_tau)
        return on_anchor * z_tau + _like(self.sigma_d_sigma, z_tau) * eps

    def anchor(self, z_t: Tensor, u: Tensor) -> Tensor:
        """Returns ẑ_τ(u) = a·z_t − b·u, the anchor z_τ that a velocity at t predicts.

        Finite for every t ≥ τ: z_t itself at t = τ, (1 − τ)·(z_t − u) at t = 1.

        Arguments:
            z_t: The noisier latents, with shape (B, ...).
            u: A velocity at (z_t, t), with the same shape.
        """
        z_t, u = _same_shape(z_t, u, "z_t and u")
        tau = self.tau
        a = (1 - tau) + (1 - self.t) * tau * self._ratio() / (1 - tau)
        return _like(a, z_t) * z_t - _like(self.anchor_weight, z_t) * u

    def _ratio(self) -> Tensor:
        # τ/t, the only division by t; at t = τ = 0 any value does, since the factors beside it
        # vanish
        positive = self.t > 0
        return torch.where(positive, self.tau / torch.where(positive, self.t, 1.0), 1.0)


def _like(coefficient: Tensor, z: Tensor) -> Tensor:
    return expand_level(coefficient, z, "the bridge's level")


class FlowPath:
    """Pure functions of the linear path; latents are (B, ...), `t` is a number, () or (B,)."""

    @staticmethod
    def alpha(t: Tensor) -> Tensor:
        """Returns α_t = 1 − t."""
        return 1 - t

    @staticmethod
    def sigma(t: Tensor) -> Tensor:
        """Returns σ_t = t."""
        return t

    @staticmethod
    def d_alpha(t: Tensor) -> Tensor:
        """Returns α̇_t = −1."""
        return -torch.ones_like(t)

    @staticmethod
    def d_sigma(t: Tensor) -> Tensor:
        """Returns σ̇_t = 1."""
        return torch.ones_like(t)

    @staticmethod
    def score_coupling(t: Tensor) -> Tensor:
        """Returns ν̃_t²/2 = σ_t²·d/dt log(α_t/σ_t) = −t/(1 − t), Eq. (20, 23); −∞ at t = 1."""
        return -t / (1 - t)

    @staticmethod
    def interpolate(z_0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """Returns z_t = (1 − t) z_0 + t ε, Eq. (1, 66)."""
        z_0, eps = _same_shape(z_0, eps, "z_0 and eps")
        t = expand_level(t, z_0)
        return (1 - t) * z_0 + t * eps

    @staticmethod
    def velocity_target(z_0: Tensor, eps: Tensor) -> Tensor:
        """Returns the conditional velocity u_t(z_t | z_0) = ε − z_0, Eq. (67)."""
        z_0, eps = _same_shape(z_0, eps, "z_0 and eps")
        return eps - z_0

    @staticmethod
    def denoise(z_t: Tensor, u: Tensor, t: Tensor | float) -> Tensor:
        """Returns the denoiser D_t(z_t) = E[z_0 | z_t] = z_t − t·u, Eq. (22)."""
        z_t, u = _same_shape(z_t, u, "z_t and u")
        return z_t - expand_level(t, z_t) * u

    @staticmethod
    def noise(z_t: Tensor, u: Tensor, t: Tensor | float) -> Tensor:
        """Returns the predicted noise E[ε | z_t] = z_t + (1 − t)·u, from Eq. (1, 67)."""
        z_t, u = _same_shape(z_t, u, "z_t and u")
        return z_t + (1 - expand_level(t, z_t)) * u

    @staticmethod
    def score(z_t: Tensor, u: Tensor, t: Tensor | float) -> Tensor:
        """Returns ∇ log p_t(z_t) = −((1 − t)·u + z_t)/t, Eq. (25); not finite at t = 0."""
        z_t, u = _same_shape(z_t, u, "z_t and u")
        t = expand_level(t, z_t)
        return -((1 - t) * u + z_t) / t

    @staticmethod
    def velocity_from_denoised(z_t: Tensor, d: Tensor, t: Tensor | float) -> Tensor:
        """Returns u = (z_t − D)/t, Eq. (16, 22), and its limit −z_t at t = 0.

        The limit is that of the marginal velocity: at t = 0 nothing is known of ε, E[ε | z_0] = 0.
        """
        z_t, d = _same_shape(z_t, d, "z_t and d")
        t = expand_level(t, z_t)
        noisy = t > 0
        # the inner where keeps the gradient of the branch not taken finite
        return torch.where(noisy, (z_t - d) / torch.where(noisy, t, 1.0), -z_t)

    @staticmethod
    def velocity_from_noise(z_t: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """Returns u = (E[ε | z_t] − z_t)/(1 − t); not finite at t = 1."""
        z_t, eps = _same_shape(z_t, eps, "z_t and eps")
        return (eps - z_t) / (1 - expand_level(t, z_t))

    @staticmethod
    def velocity_from_score(z_t: Tensor, score: Tensor, t: Tensor | float) -> Tensor:
        """Returns u = −(z_t + t·∇ log p_t)/(1 − t), Eq. (24); not finite at t = 1."""
        z_t, score = _same_shape(z_t, score, "z_t and score")
        t = expand_level(t, z_t)
        return -(z_t + t * score) / (1 - t)

    @staticmethod
    def denoise_from_score(z_t: Tensor, score: Tensor, t: Tensor | float) -> Tensor:
        """Returns D = (z_t + t²·∇ log p_t)/(1 − t), Tweedie (18); not finite at t = 1."""
        z_t, score = _same_shape(z_t, score, "z_t and score")
        t = expand_level(t, z_t)
        return (z_t + t**2 * score) / (1 - t)

    @staticmethod
    def score_from_denoised(z_t: Tensor, d: Tensor, t: Tensor | float) -> Tensor:
        """Returns ∇ log p_t = ((1 − t)·D − z_t)/t², Eq. (18); not finite at t = 0."""
        z_t, d = _same_shape(z_t, d, "z_t and d")
        t = expand_level(t, z_t)
        return ((1 - t) * d - z_t) / t**2

    @staticmethod
    def bridge(tau: Tensor | float, t: Tensor | float) -> Bridge:
        """Returns the coefficients of the bridge from level τ to level t ≥ τ, Eq. (74).

        Arguments:
            tau: The anchor's level τ in [0, 1), a number or a tensor with shape () or (B,).
            t: The level t in [τ, 1], likewise.

        Raises:
            ValueError: If the shapes differ, or for numbers if not 0 ≤ τ ≤ t ≤ 1 and τ < 1.
                (Tensors that break it give NaN, not an error: looking would make a GPU wait.)
        """
        tau, t = _levels(tau, t)
        # σ_t² − ᾱ²σ_τ² as a product: no cancellation near t = τ, exactly 0 at t = τ
        sigma = ((t - tau) * (t + tau - 2 * t * tau)).sqrt() / (1 - tau)
        # σ̄̇ = 1 for τ = 0, also at t = 0 where the quotient would be 0/0
        sigma_d_sigma = t + (1 - t) * (tau / (1 - tau)) ** 2
        d_sigma = torch.where(tau == 0, torch.ones_like(sigma), sigma_d_sigma / sigma)
        d_alpha = -1 / (1 - tau) * torch.ones_like(t)
        return Bridge((1 - t) / (1 - tau), sigma, d_alpha, d_sigma, tau, t)


def _levels(tau: Tensor | float, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """Returns τ and t as tensors of one dtype, checked as far as it costs nothing."""
    tensors = [level for level in (tau, t) if isinstance(level, Tensor)]
    low = 0.0 if isinstance(tau, Tensor) else tau
    high = 1.0 if isinstance(t, Tensor) else t
    if not 0.0 <= low <= high <= 1.0 or low == 1.0:
        raise ValueError(
            f"the bridge needs 0 ≤ tau ≤ t ≤ 1 and tau < 1, got tau = {tau} and t = {t}: it goes "
            f"from the stopped latent (tau) to a noisier one (t). Are they swapped?"
        )
    shapes = {tuple(level.shape) for level in tensors if level.ndim}
    if len(shapes) > 1 or any(len(shape) > 1 for shape in shapes):
        raise ValueError(
            f"tau and t must be scalars or have one shape (B,), got {sorted(shapes)}: "
            f"pass one level per latent and let the bridge broadcast."
        )
    dtype = working_dtype(*tensors) if tensors else torch.float64
    device = tensors[0].device if tensors else None
    return (
        torch.as_tensor(tau, dtype=dtype, device=device),
        torch.as_tensor(t, dtype=dtype, device=device),
    )
