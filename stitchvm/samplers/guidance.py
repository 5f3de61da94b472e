r"""Guidance by the gradient of a value, Eq. (4): "DPS" with a Tweedie value, "DPS + StitchVM" with a stitched one.

The score of the tilted marginal is ∇ log p_t + ∇V_t (35). So the sampling SDE (26) of p* has the drift

    u_t − (ν_t²/2)·∇ log p_t − (t/(1 − t) + ν_t²/2)·∇V_t            (23, 39)

exactly, if V is the soft value (3): mode "exact", where `strength` multiplies ∇V. The coefficient is infinite at t = 1,
where ∇V of the true value vanishes but that of an estimate need not: there t is taken at the grid's second level. The
paper does not say how it scales the gradient; the literature has several ways, all added to z_{k+1} after the
step, without its length |dt|, with s the strength:

| mode         | added to z_{k+1}                                           |                                          |
|--------------|------------------------------------------------------------|------------------------------------------|
| "exact"      | (t/(1 − t) + ν²/2)·s·∇V·|dt|                               | the paper's Eq. (39)                     |
| "raw"        | s·∇V                                                       |                                          |
| "unit_norm"  | s·∇V/‖∇V‖                                                  | DPS, whose loss is a norm (2209.14687)   |
| "abs_reward" | s·∇V/|V|                                                   | TFG (2409.15761), Kim et al. (2503.19385)|
| "cfg_rms"    | as ∇V, with rms 0.2·s·g·rms(u(prompt) − u(∅))              | FreeDoM (2303.09833)                     |

Norms and rms are over one latent: a sample's guidance does not depend on the batch. A gradient of exactly 0 and a
value of exactly 0 (by which "abs_reward" would divide) move nothing; "abs_reward" is for rewards that stay away from 0,
near which its steps have no bound. Strengths of different modes and rewards have nothing in common (`stitchvm sweep`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stitchvm.samplers.base import Record, Run, Sampler

MODES = ("exact", "raw", "unit_norm", "abs_reward", "cfg_rms")
FREEDOM = 0.2  # the share of guidance that FreeDoM's released code takes for styles


def exact_coefficient(t: float, nu: float) -> float:
    """Returns −(t/(1 − t) + ν²/2), what ∇V is multiplied by in the drift, Eq. (39), for t < 1."""
    return -(t / (1 - t) + 0.5 * nu**2)


class GuidedSampler(Sampler):
    """Sampling that climbs a differentiable value.

    Arguments:
        strength: What the update is multiplied by; 0 is the plain sampler.
        mode: How the gradient is scaled, one of `MODES`.
        window: The first and last share of the steps in which guidance acts: (0.2, 0.8) of 100 is steps 20 … 79.
        levels: The lowest and highest noise level at which it acts.
        every: It acts at every so many of those steps.
        kwargs: As for `Sampler`. The paper has 100 steps of the "linear_sde" at g = 4.5.

    Raises:
        ValueError: If the mode is unknown, or a number is out of its range.
    """

    def __init__(
        self,
        strength: float = 1.0,
        mode: str = "exact",
        window: tuple[float, float] = (0.0, 1.0),
        levels: tuple[float, float] = (0.0, 1.0),
        every: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r}: expected one of {', '.join(MODES)}.")
        if not math.isfinite(strength):
            raise ValueError(f"strength = {strength}: expected a finite number.")
        for name, (low, high) in (("window", window), ("levels", levels)):
            if not 0 <= low < high <= 1:
                raise ValueError(f"{name} = {[low, high]}: expected two rising numbers in [0, 1].")
        if every < 1:
            raise ValueError(f"every = {every}: expected at least 1.")
        self.strength, self.mode = strength, mode
        self.window, self.levels, self.every = tuple(window), tuple(levels), every

    def begin(self, run: Run) -> None:
        """Sets at which steps guidance acts.

        Raises:
            ValueError: If at none.
        """
        super().begin(run)
        sigmas, n = run.sigmas.tolist(), len(run.sigmas) - 1
        first, last = (round(share * n) for share in self.window)
        low, high = self.levels
        steps = [k for k in range(first, last) if low <= sigmas[k] <= high]
        if not steps:
            raise ValueError(
                f"none of the {n} steps is within window {list(self.window)} and levels {list(self.levels)}: "
                "widen them, or take more steps."
            )
        run.memory["acts"] = set(steps[:: self.every]) if self.strength else set()

    def advance(self, run: Run, k: int) -> Record:
        """Takes one step; where guidance acts, with the value and its gradient at the level it starts from."""
        t = float(run.sigmas[k])
        if k not in run.memory["acts"]:
            u, _ = run.velocity(k)
            run.z = run.propose(self.kernel, k, u)[:, 0]
            return Record(k + 1, t)
        v, gradient, run.prefix = run.field.value_gradient(run.z, run.sigmas[k], run.row)
        u, direction = run.velocity(k)
        dt = t - float(run.sigmas[k + 1])
        drift = self._drift(gradient, k, run.sigmas) if self.mode == "exact" else None
        z = run.propose(self.kernel, k, u, drift=drift)[:, 0]
        if drift is not None:
            update = -dt * drift
        else:
            update = self._update(v, gradient, direction, run)
            z = z + update
        run.field.check(z.flatten(1), "latent", run.sigmas[k], run.row)
        run.z = z
        info = {"gradient_rms": rms(gradient), "update_rms": rms(update)}
        if direction is not None:
            # what classifier-free guidance moves the mean by: u stands in the score, too
            nu = self.kernel.nu_at(k, run.sigmas)
            gain = dt * run.field.scale * (1 + 0.5 * nu**2 * (1 - t) / t)
            info["cfg_rms"] = gain * rms(direction)
            info["update_to_cfg"] = _divided(info["update_rms"], info["cfg_rms"])
        return Record(k + 1, t, run.grouped(v), info)

    def update(
        self, run: Run, k: int, v: Tensor, gradient: Tensor, direction: Tensor | None = None
    ) -> Tensor:
        """Returns what guidance adds to z_{k+1}, with the shape of the gradient.

        Arguments:
            run: The run, whose levels and guidance scale are read.
            k: The step.
            v: The values at its beginning, with shape (R,).
            gradient: Their gradients, with shape (R, C, H, W).
            direction: u(prompt) − u(∅) there, which "cfg_rms" measures by.
        """
        if self.mode != "exact":
            return self._update(v, gradient, direction, run)
        dt = float(run.sigmas[k] - run.sigmas[k + 1])
        return -dt * self._drift(gradient, k, run.sigmas)

    def _drift(self, gradient: Tensor, k: int, sigmas: Tensor) -> Tensor:
        level = self.kernel.level(k, sigmas)
        if level == 1:
            raise ValueError(
                "the coefficient of the mode 'exact' is infinite at t = 1, and a grid of one step has no other level: "
                "take more steps, or another mode."
            )
        nu = self.kernel.nu_at(k, sigmas)
        return exact_coefficient(level, nu) * self.strength * gradient

    def _update(self, v: Tensor, gradient: Tensor, direction: Tensor | None, run: Run) -> Tensor:
        s = self.strength
        if self.mode == "raw":
            return s * gradient
        if self.mode == "unit_norm":
            return s * unit(gradient)
        if self.mode == "abs_reward":
            return s * _divided(gradient, _like(v.abs().to(gradient.dtype), gradient))
        if direction is None:
            raise ValueError(
                "the mode 'cfg_rms' measures guidance by u(prompt) − u(∅), but this generator runs one branch only "
                "(guidance_scale 1, or distilled guidance): raise guidance_scale above 1, or take another mode."
            )
        wanted = FREEDOM * s * run.field.scale * rms(direction)
        return _like(wanted, gradient) * unit(gradient) * math.sqrt(gradient[0].numel())


def rms(x: Tensor) -> Tensor:
    """Returns the root mean square of each sample, with shape (B,)."""
    return x.flatten(1).square().mean(dim=1).sqrt()


def unit(x: Tensor) -> Tensor:
    """Returns each sample divided by its Euclidean norm, 0 where it is 0, however small or large it is."""
    largest = x.flatten(1).abs().amax(dim=1)
    x = _divided(x, _like(largest, x))  # else its squares might underflow
    return _divided(x, _like(torch.linalg.vector_norm(x.flatten(1), dim=1), x))


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Returns one number per sample, shaped to broadcast over the samples."""
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """Returns x/by, 0 where `by` is 0."""
    return torch.where(by == 0, 0.0, x / torch.where(by == 0, 1.0, by))
