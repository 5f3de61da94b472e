r"""Worlds with closed forms: the flow, the posterior and the values are known exactly.

The data are a mixture of K isotropic Gaussians, p(z_0) = Σ_k w_k N(m_k, s_k² I) in d dimensions
of any shape. With

    v_k(t) = (1 − t)² s_k² + t²,   δ_k = z_t − (1 − t) m_k,   γ_k ∝ w_k N(z_t; (1 − t) m_k, v_k I)

everything on the path of Eq. (1) is a sum over the components:

    ∇ log p_t(z_t) = −Σ γ_k δ_k / v_k
    u_t(z_t)       = E[ε − z_0 | z_t] = Σ γ_k [ (t − (1 − t) s_k²) δ_k / v_k − m_k ]
    p(z_τ | z_t)   = Σ γ_k N( (1 − τ) m_k + ᾱ v_k(τ)/v_k(t) δ_k,  v_k(τ) σ̄²/v_k(t) I )

with ᾱ, σ̄ of Eq. (74) and without a division by t, so at both end points too. For the rewards of
`KnownReward` (linear, quadratic and their sum) E[r | z_t] and log E[exp λr | z_t] (3, 46) are sums
over the posterior's components, and the tilted distribution p·exp(λr)/Z (2) is a mixture of the
same kind: its velocity is the exact guided velocity.

Arithmetic is in float32 or better (`working_dtype` of the latents); for tests take float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stitchvm.path import FlowPath, expand_level, working_dtype


@dataclass(frozen=True, eq=False)
class KnownReward:
    """The reward r(z) = −(k/2)·‖z − y‖² + a·z + b, whose Gaussian expectations are known.

    Attributes:
        k: The curvature k ≥ 0; 0 for a linear reward.
        y: The centre, with the latent's shape (without batch).
        a: The slope, likewise.
        b: The offset.
    """

    k: float
    y: Tensor
    a: Tensor
    b: float = 0.0

    @classmethod
    def linear(cls, a: Tensor, b: float = 0.0) -> KnownReward:
        """Returns r(z) = a·z + b."""
        return cls(0.0, torch.zeros_like(a), a, b)

    @classmethod
    def quadratic(cls, y: Tensor, k: float = 1.0) -> KnownReward:
        """Returns r(z) = −(k/2)·‖z − y‖²."""
        return cls(k, y, torch.zeros_like(y), 0.0)

    def __call__(self, z: Tensor) -> Tensor:
        """Returns r(z) with shape (B,) for latents (B, ...), differentiable."""
        return self.expect(z, z.new_zeros((), dtype=working_dtype(z)))

    def expect(self, c: Tensor, q: Tensor) -> Tensor:
        """Returns E[r(z)] for z ~ N(c, q I) with shape (...), for c (..., *event) and q (...)."""
        y, a, events = self._prepare(c)
        w = c.to(y.dtype) - y
        squares = w.square().sum(events) + y.numel() * q
        return -0.5 * self.k * squares + (a * w).sum(events) + (a * y).sum() + self.b

    def variance(self, c: Tensor, q: Tensor) -> Tensor:
        """Returns Var[r(z)] for z ~ N(c, q I), shapes as in `expect`."""
        y, a, events = self._prepare(c)
        slope = a - self.k * (c.to(y.dtype) - y)
        return q * slope.square().sum(events) + 0.5 * y.numel() * (self.k * q) ** 2

    def log_expect_exp(self, c: Tensor, q: Tensor, lam: float) -> Tensor:
        """Returns log E[exp(λ r(z))] for z ~ N(c, q I), shapes as in `expect`.

        Raises:
            ValueError: If λk < 0: the expectation of the exponential of a convex reward may be
                infinite.
        """
        if lam * self.k < 0:
            raise ValueError(
                f"lam·k = {lam * self.k}: expected lam·k ≥ 0, else E[exp r] may be infinite."
            )
        y, a, events = self._prepare(c)
        w = c.to(y.dtype) - y
        kappa, a = lam * self.k, lam * a
        shrink = 1 + kappa * q
        exponent = (
            (a * w).sum(events) + 0.5 * q * a.square().sum() - 0.5 * kappa * w.square().sum(events)
        )
        constant = (a * y).sum() + lam * self.b
        return constant + exponent / shrink - 0.5 * y.numel() * shrink.log()

    def _prepare(self, c: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        if c.shape[c.ndim - self.y.ndim :] != self.y.shape:
            raise ValueError(
                f"latents have shape {tuple(c.shape)}, this reward's y has {tuple(self.y.shape)}: "
                f"expected the same trailing axes."
            )
        dtype = working_dtype(c)
        events = list(range(c.ndim - self.y.ndim, c.ndim))
        return self.y.to(c.device, dtype), self.a.to(c.device, dtype), events


@dataclass(frozen=True, eq=False)
class Posterior:
    """A mixture of isotropic Gaussians per sample: p(z_τ | z_t).

    Attributes:
        log_weights: log γ_k, with shape (B, K).
        means: The components' means, with shape (B, K, *event).
        variances: The components' variances, with shape (B, K).
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor

    def mean(self) -> Tensor:
        """Returns the mean with shape (B, *event)."""
        return _average(self.log_weights, self.means)

    def variance(self) -> Tensor:
        """Returns the elementwise variance with shape (B, *event)."""
        spread = (self.means - self.mean()[:, None]).square()
        return _average(self.log_weights, spread + _event(self.variances, spread.ndim - 2))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Returns n independent draws for each sample, with shape (n, B, *event)."""
        batch = torch.arange(len(self.log_weights), device=self.means.device)
        component = torch.multinomial(
            self.log_weights.exp(), n, replacement=True, generator=generator
        ).T
        means = self.means[batch, component]
        std = self.variances[batch, component].sqrt()
        noise = torch.empty_like(means).normal_(generator=generator)
        return means + _event(std, means.ndim - 2) * noise


class MixtureWorld:
    """Data that are a mixture of K isotropic Gaussians of any event shape, (d,) or (C, H, W).

    Arguments:
        weights: The weights w_k, with shape (K,), normalised here.
        means: The means m_k, with shape (K, *event).
        variances: The variances s_k² ≥ 0 per element, with shape (K,). A point mass (0) has no
            density at t = 0, where its scores and weights are not finite.

    Raises:
        ValueError: If the shapes do not agree or a weight or variance is negative.
    """

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor) -> None:
        if means.ndim < 2 or not weights.shape == variances.shape == means.shape[:1]:
            raise ValueError(
                f"weights {tuple(weights.shape)}, means {tuple(means.shape)} and variances "
                f"{tuple(variances.shape)}: expected (K,), (K, *event) and (K,)."
            )
        if (weights < 0).any() or weights.sum() <= 0 or (variances < 0).any():
            raise ValueError("weights and variances must not be negative, nor all weights zero.")
        self.log_weights = (weights.double() / weights.double().sum()).log()
        self.means = means.double()
        self.variances = variances.double()
        self.event = tuple(means.shape[1:])

    def velocity(self, z_t: Tensor, t: Tensor | float) -> Tensor:
        """Returns u_t(z_t) = E[ε − z_0 | z_t] with the shape (B, *event) of `z_t`, Eq. (14)."""
        t, delta, v, m, s2 = self._components(z_t, t)
        slope = (t - (1 - t) * s2) / v
        return _average(
            self._responsibilities(delta, v), _event(slope, len(self.event)) * delta - m
        )

    def denoise(self, z_t: Tensor, t: Tensor | float) -> Tensor:
        """Returns D_t(z_t) = E[z_0 | z_t] with the shape of `z_t`, Eq. (17)."""
        return self.posterior(z_t, t).mean()

    def score(self, z_t: Tensor, t: Tensor | float) -> Tensor:
        """Returns ∇ log p_t(z_t) with the shape of `z_t`."""
        _, delta, v, _, _ = self._components(z_t, t)
        return -_average(self._responsibilities(delta, v), delta / _event(v, len(self.event)))

    def log_prob(self, z_t: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Returns log p_t(z_t) with shape (B,), in nats; the data's own at t = 0."""
        _, delta, v, _, _ = self._components(z_t, t)
        return self._joint(delta, v).logsumexp(1)

    def sample(self, n: int, generator: torch.Generator | None = None, t: float = 0.0) -> Tensor:
        """Returns n draws of p_t, float64 with shape (n, *event); of the data at t = 0."""
        component = torch.multinomial(
            self.log_weights.exp(), n, replacement=True, generator=generator
        )
        std = ((1 - t) ** 2 * self.variances[component] + t**2).sqrt()
        noise = torch.empty(n, *self.event, dtype=torch.float64).normal_(generator=generator)
        return (1 - t) * self.means[component] + _event(std, len(self.event)) * noise

    def posterior(self, z_t: Tensor, t: Tensor | float, tau: Tensor | float = 0.0) -> Posterior:
        """Returns p(z_τ | z_t), exactly, as a mixture per sample; p(z_0 | z_t) for τ = 0.

        Arguments:
            z_t: The noisy latents, with shape (B, *event).
            t: Their level.
            tau: The lower level τ ≤ t, τ < 1, a number or a tensor with shape () or (B,).
        """
        # in the latents' precision, which may be better than that of the levels
        dtype = working_dtype(z_t)
        bridge = FlowPath.bridge(
            tau.to(dtype) if isinstance(tau, Tensor) else tau,
            t.to(dtype) if isinstance(t, Tensor) else t,
        )
        tau = expand_level(bridge.tau, z_t, "tau").reshape(-1, 1)
        ratio = expand_level(bridge.alpha, z_t).reshape(-1, 1)
        noise = expand_level(bridge.sigma, z_t).reshape(-1, 1)
        t, delta, v, m, s2 = self._components(z_t, t)
        v_tau = (1 - tau) ** 2 * s2 + tau**2
        dims = len(self.event)
        means = _event((1 - tau).expand_as(v), dims) * m + _event(ratio * v_tau / v, dims) * delta
        return Posterior(self._responsibilities(delta, v), means, v_tau * noise**2 / v)

    def value(self, z_t: Tensor, t: Tensor | float, reward: KnownReward) -> Tensor:
        """Returns Ṽ_t(z_t) = E[r(z_0) | z_t] with shape (B,), Eq. (46, 49), differentiable."""
        p = self.posterior(z_t, t)
        return _average(p.log_weights, reward.expect(p.means, p.variances))

    def value_variance(self, z_t: Tensor, t: Tensor | float, reward: KnownReward) -> Tensor:
        """Returns Var[r(z_0) | z_t] with shape (B,): the next term of Eq. (54)."""
        p = self.posterior(z_t, t)
        each = reward.expect(p.means, p.variances)
        spread = (each - _average(p.log_weights, each)[:, None]).square()
        return _average(p.log_weights, reward.variance(p.means, p.variances) + spread)

    def soft_value(
        self, z_t: Tensor, t: Tensor | float, reward: KnownReward, lam: float = 1.0
    ) -> Tensor:
        """Returns V_t(z_t) = log E[exp(λ r(z_0)) | z_t], (B,), Eq. (3), differentiable."""
        p = self.posterior(z_t, t)
        return (p.log_weights + reward.log_expect_exp(p.means, p.variances, lam)).logsumexp(1)

    def tweedie_value(self, z_t: Tensor, t: Tensor | float, reward: KnownReward) -> Tensor:
        """Returns r(D_t(z_t)) with shape (B,): the Tweedie estimate, differentiable."""
        return reward(self.denoise(z_t, t))

    def log_normaliser(self, reward: KnownReward, lam: float = 1.0) -> float:
        """Returns log Z = log E[exp(λ r(z_0))] of Eq. (2)."""
        each = reward.log_expect_exp(self.means, self.variances, lam)
        return float((self.log_weights + each).logsumexp(0))

    def tilt(self, reward: KnownReward, lam: float = 1.0) -> MixtureWorld:
        """Returns the world of p*(z_0) = p(z_0)·exp(λ r(z_0))/Z, Eq. (2), again a mixture.

        Its `velocity` is the exact guided velocity, its `sample` and `log_prob` the exact target.
        """
        log_weights = self.log_weights + reward.log_expect_exp(self.means, self.variances, lam)
        shrink = _event(1 + lam * reward.k * self.variances, len(self.event))
        s2 = _event(self.variances, len(self.event))
        y, a = reward.y.to(self.means), reward.a.to(self.means)
        means = y + (self.means - y + s2 * lam * a) / shrink
        variances = self.variances / (1 + lam * reward.k * self.variances)
        return MixtureWorld(log_weights.softmax(0), means, variances)

    def _components(
        self, z_t: Tensor, t: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns t (B or 1, 1), δ (B, K, *event), v (B or 1, K), m (K, *event) and s² (K,)."""
        if z_t.ndim != len(self.event) + 1 or tuple(z_t.shape[1:]) != self.event:
            raise ValueError(
                f"latents have shape {tuple(z_t.shape)}, this world needs (B, *{self.event})."
            )
        dtype = working_dtype(z_t)
        m, s2 = self.means.to(z_t.device, dtype), self.variances.to(z_t.device, dtype)
        t = expand_level(t, z_t).reshape(-1, 1)
        v = (1 - t) ** 2 * s2 + t**2
        delta = z_t.to(dtype)[:, None] - _event(1 - t, len(self.event)) * m
        return t, delta, v.expand(len(z_t), -1), m, s2

    def _joint(self, delta: Tensor, v: Tensor) -> Tensor:
        """Returns log w_k + log N(z_t; (1 − t) m_k, v_k I) with shape (B, K)."""
        squares = delta.flatten(2).square().sum(2)
        d = math.prod(self.event)
        log_weights = self.log_weights.to(delta.device, delta.dtype)
        return log_weights - 0.5 * (squares / v + d * (2 * math.pi * v).log())

    def _responsibilities(self, delta: Tensor, v: Tensor) -> Tensor:
        return self._joint(delta, v).log_softmax(1)


class GaussianWorld(MixtureWorld):
    """Data N(m, s² I): the mixture with one component, of which samplers are affine maps.

    Arguments:
        mean: The mean m, with shape *event.
        variance: The variance s² of every element.
    """

    def __init__(self, mean: Tensor, variance: float) -> None:
        super().__init__(torch.ones(1), mean[None], torch.tensor([variance], dtype=torch.float64))

    def sampler_moments(
        self,
        sigmas: Tensor,
        nu_squared: Callable[[float], float] | None = None,
        guide: Callable[[float], tuple[float, Tensor]] | None = None,
    ) -> tuple[Tensor, float]:
        """Returns the exact mean and elementwise variance after Euler–Maruyama steps on (26).

        The drift is affine in z, so the moments of the law follow a recursion, without sampling:
        with drift κz + c and a step dt = σ_{i+1} − σ_i < 0, mean' = mean + (κ·mean + c)·dt and
        var' = var·(1 + κ·dt)² + ν²·|dt|. A sampler's empirical moments must match these; the
        data's own, m and s², are reached to O(dt).

        Arguments:
            sigmas: The grid from 1 to 0, with shape (N + 1,).
            nu_squared: ν² as a function of t, or None for the ODE.
            guide: An affine addition to the drift, t ↦ (κ, c) with c of shape *event (or a
                scalar), or None.

        Returns:
            The mean, float64 with shape *event, and the variance. The start is N(0, I).
        """
        mean, variance = torch.zeros(self.event, dtype=torch.float64), 1.0
        m, s2 = self.means[0], float(self.variances[0])
        levels = sigmas.double().tolist()
        for t, t_next in pairwise(levels):
            dt = t_next - t
            v = (1 - t) ** 2 * s2 + t**2
            nu2 = nu_squared(t) if nu_squared is not None else 0.0
            slope = (t - (1 - t) * s2) / v + 0.5 * nu2 / v
            offset = -m - slope * (1 - t) * m
            if guide is not None:
                extra_slope, extra_offset = guide(t)
                slope, offset = slope + extra_slope, offset + extra_offset
            mean = mean + (slope * mean + offset) * dt
            variance = variance * (1 + slope * dt) ** 2 + nu2 * abs(dt)
        return mean, variance


def _event(x: Tensor, dims: int) -> Tensor:
    """Returns x with `dims` axes of size 1 appended."""
    return x.reshape(*x.shape, *[1] * dims)


def _average(log_weights: Tensor, x: Tensor) -> Tensor:
    """Returns the average of x (B, K, ...) over its second axis under weights (B, K)."""
    return (_event(log_weights.exp(), x.ndim - 2) * x).sum(1)
