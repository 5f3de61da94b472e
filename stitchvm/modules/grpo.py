r"""Flow-GRPO and Flow-GRPO-Fast: policy gradients over the stochastic steps of a roll-out, over any value.

    policy:   z_{σ_0} → … → z_{σ_N}, with noise at the steps of a window and Euler steps elsewhere; kept at the window's
              steps: z_k, z_{k+1} and log p_old(z_{k+1} | z_k)
    value:    R = V → advantage A within its prompt's group
    loss:     the mean over the window of  max(−A·ρ, −A·clip(ρ, 1 ± c)) + kl·KL,   ρ = exp(log p_θ − log p_old)

"Fast" has a window of 3 steps, drawn for each update among the first half of the steps, the same for all images on all
ranks; `window` = null is plain Flow-GRPO, all steps but the last. At an update's first optimiser step θ is the policy
that has sampled, and ρ is exactly 1: roll-out and loss run the same micro-batches. So with `inner_steps` = 1 nothing is
ever clipped. That is so for a generator that is not compiled: a compiled one rounds otherwise with gradients than
without, which a narrow `ratio_clip` notices.

With `stop` the roll-out ends at z_τ and V is a value that is defined there: the policy gradient of a value function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stitchvm.modules.alignment import Alignment
from stitchvm.modules.groups import (
    Grouping,
    check_groups,
    check_value,
    in_order,
    inner_parts,
    not_finite,
    own_rows,
    stop_window,
)
from stitchvm.modules.rows import Rows
from stitchvm.objectives.grpo import Transition, grpo_loss, kl_to_reference, sde_window, transition

__all__ = ["FlowGRPO", "GRPORollout"]


@dataclass(frozen=True, eq=False)
class GRPORollout:
    """What an update learns from; rows are the images of this device, W the steps of the window.

    Attributes:
        window: The stochastic steps.
        z: The latents before, between and after them, float32 with shape (B, W + 1, C, H, W).
        log_prob: log p_old of each step, with shape (B, W).
        advantages: A, with shape (B,); None if a reward of any rank was not finite.
    """

    window: range
    z: Tensor
    log_prob: Tensor
    advantages: Tensor | None


class FlowGRPO(Alignment):
    """Flow-GRPO-Fast, and Flow-GRPO.

    Arguments:
        group_size: The images K of a prompt in an update.
        window: The number of stochastic steps; None for all but the last.
        bounds: The window lies within the steps bounds[0] … bounds[1] − 1.
        kind: "cps" or "sde", see `objectives.grpo`.
        noise_level: How much noise, above 0; the references have 0.8 (cps) and 0.7 (sde).
        ratio_clip: How far ρ may go from 1.
        adv_clip: Advantages are clamped to ±adv_clip.
        kl: The weight of the divergence from the frozen model; 0 spares its calls.
        std: What advantages are divided by: the spread of all rewards ("global") or of the prompt's ("group").
        normalise: How the terms of a sum of rewards are standardised first: "none", "global" or "group".
        stop: The stopping window [low, high] in network calls, both included; None to go to the end, τ = 0.
        inner_steps: The optimiser steps of an update, each with a part of every prompt's images.
        kwargs: As for `Alignment`.

    Raises:
        ValueError: If a number is out of its range, or a window lies outside of the schedule.
    """

    def __init__(
        self,
        group_size: int = 24,
        window: int | None = 3,
        bounds: list[int] | None = None,
        kind: str = "cps",
        noise_level: float = 0.8,
        ratio_clip: float = 1e-5,
        adv_clip: float = 5.0,
        kl: float = 0.0,
        std: str = "global",
        normalise: str = "none",
        stop: list[int] | None = None,
        inner_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(group_size=group_size, **kwargs)
        check_groups(group_size, inner_steps)
        if not (noise_level > 0 and ratio_clip > 0 and adv_clip > 0 and kl >= 0):
            raise ValueError(
                f"model.noise_level = {noise_level}, ratio_clip = {ratio_clip}, adv_clip = {adv_clip}, kl = {kl}: "
                "expected numbers above 0, and kl ≥ 0. (Without noise there is nothing to learn from.)"
            )
        if bounds is not None and len(bounds) != 2:
            raise ValueError(f"model.bounds = {bounds}: expected [low, high], such as [0, 5].")
        one = torch.zeros(1)
        transition(one, one, 0.5, 0.4, noise_level=noise_level, kind=kind)  # raises for its kind
        self.stops = stop_window(stop, self.num_steps)
        self.window, self.bounds = window, (bounds[0], bounds[1]) if bounds else (0, 5)
        sde_window(self.stops.low, window, self.bounds, key=())  # fits the shortest roll-out
        if kind == "cps" and window is not None and self.bounds[1] == self.num_steps:
            raise ValueError(
                f"model.bounds = {list(self.bounds)} of {self.num_steps} steps: the last goes to σ = 0, where "
                'kind "cps" has no noise, so that nothing is learnt from it and its divergence is 0/0. Lower the '
                'second bound, or take kind "sde".'
            )
        self.kind, self.noise_level = kind, noise_level
        self.ratio_clip, self.adv_clip, self.kl = ratio_clip, adv_clip, kl
        self.grouping, self.inner_steps = Grouping(std, normalise), inner_steps
        self.needs_frozen = kl > 0

    def check_parts(self) -> None:
        """Raises ValueError if the value cannot be asked where roll-outs stop."""
        check_value(self, self.stops.low)

    @torch.no_grad()
    def rollout(self, rows: Rows) -> GRPORollout:
        """Returns roll-outs of the policy with their advantages; all ranks must call it."""
        stop = self.stops.draw(self.seed, rows.update)
        key = (self.seed, rows.update)
        window = sde_window(stop, self.window, self.bounds, key=key)
        parts = self._micro_batches(rows)
        with self.stage("rollout"):
            found = [self._sample(part, window, stop) for part in parts]
        z, log_prob, ends = (in_order(parts, each) for each in zip(*found, strict=True))
        tau = self.sigmas[stop]
        everyone = self.grouping.advantages(self, rows, ends, tau, self.micro_batch)
        self.note("window_start", torch.tensor(window.start))
        self.note("tau", tau)
        own = None if everyone is None else own_rows(self, rows, everyone)
        if everyone is not None:
            self.note("adv_clipped", (everyone.abs() > self.adv_clip).float())
        return GRPORollout(window, z, log_prob, own)

    def micro_steps(self, rows: Rows, rolled: GRPORollout) -> Iterator[Tensor | None]:
        """Yields the loss of each micro-batch at each step of the window."""
        if rolled.advantages is None:
            yield not_finite(self)
            return
        for step, images in enumerate(inner_parts(rows, self.inner_steps)):
            if step:
                yield None
            for part in images.split(self.micro_batch):
                cond = self.conditions(part)
                for w in range(len(rolled.window)):
                    with self.stage("update"):
                        share = len(images) * len(rolled.window)
                        loss = self.losses(part, cond, rolled, w).sum() / share
                    yield loss

    def losses(self, rows: Rows, cond: Any, rolled: GRPORollout, w: int) -> Tensor:
        """Returns the loss with shape (B,) of some images at the w-th step of the window.

        Arguments:
            rows: The images.
            cond: Their prompts' conditions.
            rolled: What `rollout` returned for all images of this device.
            w: Which of the window's steps.
        """
        assert rolled.advantages is not None
        at, k = rows.positions, rolled.window[w]
        z, z_next = rolled.z[at, w], rolled.z[at, w + 1]
        reference = None
        if self.kl > 0:  # before the policy's own call: full fine-tuning exchanges weights
            with torch.no_grad(), self.policy.off():
                reference = self._transition(z, cond, k)
        step = self._transition(z, cond, k)
        found = grpo_loss(
            step.log_prob(z_next),
            rolled.log_prob[at, w],
            rolled.advantages[at],
            clip=self.ratio_clip,
            adv_clip=self.adv_clip,
        )
        self.note("ratio", found["ratio"])
        self.note("ratio_deviation", (found["ratio"] - 1).abs())
        for name in ("clip_fraction", "clip_fraction_high", "clip_fraction_low", "approx_kl"):
            self.note(name, found[name].expand(len(rows)))
        loss = found["loss"]
        if reference is not None:
            divergence = kl_to_reference(step, reference)
            self.note("kl", divergence)
            loss = loss + self.kl * divergence
        return loss

    def _micro_batches(self, rows: Rows) -> list[Rows]:
        """The same in roll-out and loss: other batches would round otherwise, and ρ would not be 1."""
        steps = inner_parts(rows, self.inner_steps)
        return [part for images in steps for part in images.split(self.micro_batch)]

    def _sample(self, rows: Rows, window: range, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns z (B, W + 1, C, H, W) and log p_old (B, W) of the window's steps, and z_τ."""
        cond = self.conditions(rows)
        z = self.walk(self.noise(rows), cond, 0, window.start)
        kept, log_probs = [z], []
        for k in window:
            step = self._transition(z, cond, k)
            z = step.sample(rows.normal("step", tuple(z.shape[1:]), k))
            kept.append(z)
            log_probs.append(step.log_prob(z))
        z = self.walk(z, cond, window.stop, stop)
        return torch.stack(kept, dim=1), torch.stack(log_probs, dim=1), z

    def _transition(self, z: Tensor, cond: Any, k: int) -> Transition:
        """Returns the active policy's step from σ_k to σ_{k+1}."""
        return transition(
            z,
            self.velocity(z, self.sigmas[k], cond),
            float(self.sigmas[k]),
            float(self.sigmas[k + 1]),
            noise_level=self.noise_level,
            kind=self.kind,
            sigma_max=float(self.sigmas[1]),
        )
