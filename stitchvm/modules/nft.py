r"""DiffusionNFT (65–71), with a terminal reward or with value-anchored regression (72–77), over any value.

    old policy:  z_{σ_0} → … → z_{σ_k} = z_τ, Euler steps without noise         the roll-out, k calls
    value:       R = V(z_τ) → advantage within its prompt's group → r in [0, 1]
    regression:  t ∈ {σ_0, …, σ_{k−1}}, z_t on the bridge from z_τ,
                 L = loss(u_θ, u_old; z_t, z_τ, r) + λ·mean (u_θ − u_ref)²
    after it:    θ_old ← ρ·θ_old + (1 − ρ)·θ                                    (71), and the average that is evaluated

With `stop` = [12, 17] the number of calls k is drawn for each update from {12, …, 17}, one for all prompts and ranks,
and V is any value that is defined at τ = σ_k. Without, k = N, τ = 0, z_τ = z_0, the bridge is the flow, and all of this
is plain DiffusionNFT: one implementation, equal to the reference's loss bit for bit there (`objectives.nft`).

`form` says in which space is regressed:

    "self_normalised"    the anchor's, each error over its own size; at τ = 0 the reference's, in the clean latent's
    "velocity"           the paper's formula (65, 77); for τ > 0 the one or two levels next to τ dominate it
    "weighted_velocity"  the same times σ̄², which is finite as t → τ

Each sample takes part with `fraction` of the levels above τ, others for each. Forward passes of a sample: k for the
roll-out and 3 (2 for λ = 0) and a backward pass for each of its levels.
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
    inner_parts,
    log_histogram,
    not_finite,
    own_rows,
    stop_window,
)
from stitchvm.modules.rows import Rows
from stitchvm.objectives.nft import (
    anchored_nft_loss,
    old_decay,
    optimality,
    velocity_nft_loss,
)
from stitchvm.objectives.regulariser import output_regulariser
from stitchvm.objectives.stopping import training_levels
from stitchvm.path import FlowPath

__all__ = ["DiffusionNFT", "NFTRollout"]

FORMS = ("self_normalised", "velocity", "weighted_velocity")


@dataclass(frozen=True, eq=False)
class NFTRollout:
    """What an update learns from; rows are the images of this device.

    Attributes:
        z_tau: Where the old policy's roll-outs stopped, float32 with shape (B, C, H, W).
        tau: Their level, a scalar on the CPU.
        levels: The levels t > τ at which each is regressed, with shape (B, n).
        r: Their optimality, with shape (B,); None if a reward of any rank was not finite.
    """

    z_tau: Tensor
    tau: Tensor
    levels: Tensor
    r: Tensor | None


class DiffusionNFT(Alignment):
    """DiffusionNFT with a terminal reward, or with a value stopping point.

    Arguments:
        group_size: The images K of a prompt in an update.
        stop: The stopping window [low, high] in network calls, both included; None to go to the end, τ = 0.
        form: "self_normalised", "velocity" or "weighted_velocity" (see above).
        beta: β of the two contrasted velocities.
        adv_clip: A_max: advantages beyond it teach no more.
        mode: Which advantages teach: "all", "positive_only", "negative_only", "one_only" or "binary".
        std: What advantages are divided by: the spread of all rewards ("global") or of the prompt's ("group").
        normalise: How the terms of a sum of rewards are standardised first: "none", "global" or "group".
        fraction: The share of the levels above τ that each sample is regressed at.
        lam: The weight λ of the regulariser, the reference's "KL"; 0 spares the frozen model's calls.
        decay_type: How the old policy follows: 0 at once, 1 with ρ rising to 0.5, 2 at once for 75 steps and then with
            ρ rising to 0.999.
        inner_steps: The optimiser steps of an update, each with a part of every prompt's images.
        rollout_batch: The images of one call without gradients; `micro_batch` by default.
        kwargs: As for `Alignment`.

    Raises:
        ValueError: If a number is out of its range, or the window lies outside of the schedule.
    """

    copies = ("old", "ema")

    def __init__(
        self,
        group_size: int = 24,
        stop: list[int] | None = None,
        form: str = "self_normalised",
        beta: float = 0.1,
        adv_clip: float = 5.0,
        mode: str = "all",
        std: str = "global",
        normalise: str = "none",
        fraction: float = 0.99,
        lam: float = 1e-4,
        decay_type: int = 1,
        inner_steps: int = 1,
        rollout_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(group_size=group_size, **kwargs)
        check_groups(group_size, inner_steps)
        if form not in FORMS:
            raise ValueError(f'model.form = "{form}": expected one of {FORMS}.')
        if not (beta > 0 and lam >= 0 and 0 < fraction <= 1):
            raise ValueError(
                f"model.beta = {beta}, lam = {lam}, fraction = {fraction}: expected beta > 0, lam ≥ 0 and a fraction "
                "in (0, 1]."
            )
        if rollout_batch is not None and rollout_batch < 1:
            raise ValueError(f"model.rollout_batch = {rollout_batch}: expected at least 1.")
        optimality(torch.zeros(1), adv_clip, mode)  # raises for what it does not know
        old_decay(1, decay_type)
        self.window = stop_window(stop, self.num_steps)
        self.grouping = Grouping(std, normalise)
        self.form, self.beta, self.lam, self.fraction = form, beta, lam, fraction
        self.adv_clip, self.mode = adv_clip, mode
        self.decay_type, self.inner_steps = decay_type, inner_steps
        self.rollout_batch = rollout_batch or self.micro_batch
        self.needs_frozen = lam > 0
        self._last_step = True

    def check_parts(self) -> None:
        """Raises ValueError if the value cannot be asked where roll-outs stop."""
        check_value(self, self.window.low)

    @torch.no_grad()
    def rollout(self, rows: Rows) -> NFTRollout:
        """Returns roll-outs of the old policy with their optimality; all ranks must call it."""
        stop = self.window.draw(self.seed, rows.update)
        tau = self.sigmas[stop]
        with self.stage("rollout"), self.policy.use("old"):
            parts = rows.split(self.rollout_batch)
            z = torch.cat([self.walk(self.noise(p), self.conditions(p), 0, stop) for p in parts])
        everyone = self.grouping.advantages(self, rows, z, tau, self.rollout_batch)
        r = None
        if everyone is not None:
            r_of_all = optimality(everyone, self.adv_clip, self.mode)
            log_histogram(self, "r", r_of_all)
            r = own_rows(self, rows, r_of_all)
            self.note("r", r)
            self.note("adv_clipped", (everyone.abs() > self.adv_clip).float())
        self.note("tau", tau)
        levels = [
            training_levels(
                self.sigmas, stop, 1, fraction=self.fraction, key=(self.seed, rows.update, i, n)
            )
            for i, n in zip(rows.index, rows.number, strict=True)
        ]
        return NFTRollout(z, tau, torch.cat(levels).to(z.device), r)

    def micro_steps(self, rows: Rows, rolled: NFTRollout) -> Iterator[Tensor | None]:
        """Yields the loss of each micro-batch at each of its levels."""
        if rolled.r is None:
            yield not_finite(self)
            return
        number = rolled.levels.shape[1]
        for step, images in enumerate(inner_parts(rows, self.inner_steps)):
            if step:
                yield None
            self._last_step = step == self.inner_steps - 1
            for part in images.split(self.micro_batch):
                cond = self.conditions(part)
                for n in range(number):
                    with self.stage("update"):
                        loss = self.losses(part, cond, rolled, n).sum() / (len(images) * number)
                    yield loss

    def losses(self, rows: Rows, cond: Any, rolled: NFTRollout, n: int) -> Tensor:
        """Returns L with shape (B,) of some images, each at the n-th of its levels.

        Arguments:
            rows: The images.
            cond: Their prompts' conditions.
            rolled: What `rollout` returned for all images of this device.
            n: Which of the levels.
        """
        assert rolled.r is not None
        at = rows.positions
        z_tau, t, r = rolled.z_tau[at], rolled.levels[at, n], rolled.r[at]
        bridge = FlowPath.bridge(torch.full_like(t, float(rolled.tau)), t)
        eps = rows.normal("eps", tuple(z_tau.shape[1:]), n)
        z_t = bridge.interpolate(z_tau, eps)
        u_ref = None
        # the policy's own call is the last: full fine-tuning exchanges weights for the others
        with torch.no_grad():
            if self.lam > 0:
                with self.policy.off():
                    u_ref = self.velocity(z_t, t, cond)
            with self.policy.use("old"):
                u_old = self.velocity(z_t, t, cond)
        u = self.velocity(z_t, t, cond)
        if self.form == "self_normalised":
            found = anchored_nft_loss(
                u, u_old, z_t, z_tau, bridge, r, beta=self.beta, adv_clip=self.adv_clip
            )
        elif self.form == "velocity":
            target = bridge.velocity_target(z_tau, eps)
            found = velocity_nft_loss(u, u_old, target, r, beta=self.beta)
        else:
            target = bridge.scaled_velocity_target(z_tau, eps)
            found = velocity_nft_loss(u, u_old, target, r, beta=self.beta, scale=bridge.sigma)
        loss = found["loss"]
        for name in ("positive", "negative"):
            self.note(name, found[name])
        if u_ref is not None:
            R = output_regulariser(u, u_ref)
            self.note("regulariser", R)
            loss = loss + self.lam * R
        return loss

    def after_step(self, step: int) -> None:
        """Moves the old policy after an update's last step, by ρ of the optimiser steps made so far."""
        if self._last_step:
            self.policy.decay_old(old_decay(step, self.decay_type))
