r"""DRaFT-K: the gradient of a value, back through the last K steps of a roll-out to z_0 (63) or to z_τ (64).

    no_grad: z_{σ_0} → … → z_{σ_{k−K}}        the prefix
    grad:    z_{σ_{k−K}} → … → z_{σ_k} = z_τ  the last K steps, and R at their states against the frozen model
    L = −V(z_τ) + λ·R

With `stop` = [3, 7] the number of calls k is drawn for each update from {3, …, 7}, the same on all ranks, and V is any
value that is defined at τ = σ_k; without, k = N, τ = 0, and V may be the terminal reward. DRaFT-1's gradient is
proportional to the last step's length, so the schedule is explicit: `grid: single` ends with .25 at 10 steps and shift
3, diffusers' own, `double`, with .0089 (`objectives.draft`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from stitchvm.adapters.full import PolicyWeights
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.modules.alignment import Alignment
from stitchvm.modules.groups import check_borrowed
from stitchvm.modules.rows import Rows
from stitchvm.objectives.draft import draft_loss, renoise
from stitchvm.objectives.regulariser import output_regulariser
from stitchvm.objectives.stopping import StopWindow, first_gradient_step
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieValue

__all__ = ["DRaFT"]


class DRaFT(Alignment):
    """DRaFT-K / AlignProp with a terminal reward, or with a value stopping point.

    Arguments:
        backprop_steps: The K of DRaFT-K: the last steps that get a gradient; None for all.
        stop: The stopping window [low, high] in network calls, both included; None to go to the end, τ = 0.
        lam: The weight λ of the regulariser; 0 spares the frozen model's calls.
        ceiling: A value from which on a sample teaches nothing more, or None.
        redraws: The n of DRaFT-LV: the last step is repeated from so many other noises; 0 is DRaFT-K.
        kwargs: As for `Alignment`.

    Raises:
        ValueError: If the window lies outside of the schedule, or K is larger than its smallest stop.
    """

    def __init__(
        self,
        backprop_steps: int | None = 1,
        stop: list[int] | None = None,
        lam: float = 0.01,
        ceiling: float | None = None,
        redraws: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if stop is not None and len(stop) != 2:
            raise ValueError(
                f"model.stop = {stop}: expected [low, high], such as [3, 7], or null."
            )
        if lam < 0 or redraws < 0:
            raise ValueError(f"model.lam = {lam}, redraws = {redraws}: expected numbers ≥ 0.")
        self.window = StopWindow(*(stop or (self.num_steps, self.num_steps)))
        self.window.check(self.num_steps, backprop_steps)
        self.backprop_steps, self.lam = backprop_steps, lam
        self.ceiling, self.redraws = ceiling, redraws
        self.needs_frozen = lam > 0

    def check_parts(self) -> None:
        """Raises ValueError if a terminal reward is asked before the end, or the frozen model is not there."""
        value, policy = self._built.value, self.policy
        terminal = any(isinstance(m, TerminalValue) for m in value.modules())
        if terminal and self.window.low < self.num_steps:
            raise ValueError(
                f"model.stop = [{self.window.low}, {self.window.high}] of {self.num_steps} steps with a terminal "
                "reward, which is defined at the end only: set stop to null, or take a stitched or Tweedie value."
            )
        check_borrowed(value, policy)
        several = self.backprop_steps != 1 or self.redraws > 0
        if self.lam > 0 and isinstance(policy, PolicyWeights) and several:
            raise ValueError(
                f"model.lam = {self.lam} with full fine-tuning, backprop_steps = {self.backprop_steps} and redraws = "
                f"{self.redraws}: the frozen model would be exchanged for the trained one inside of a graph. Set lam "
                "to 0, or backprop_steps to 1 and redraws to 0."
            )
        by_blocks = getattr(policy.transformer, "gradient_checkpointing", False)
        if not by_blocks and any(
            isinstance(m, TweedieValue) and m.checkpointing and m.generator is self.generator
            for m in value.modules()
        ):
            raise ValueError(
                "a Tweedie value with checkpointing would run the generator again when the policy is active, not the "
                "frozen model: set model.gradient_checkpointing to true, which does so block by block, or the value's "
                "checkpointing to false."
            )

    def micro_steps(self, rows: Rows, rolled: None) -> Iterator[Tensor]:
        """Yields the loss of each micro-batch."""
        stop = self.window.draw(self.seed, rows.update)
        for part in rows.split(self.micro_batch):
            yield self.losses(part, stop).sum() / len(rows)

    def losses(self, rows: Rows, stop: int) -> Tensor:
        """Returns L with shape (B,) of roll-outs that stop after `stop` calls.

        Arguments:
            rows: The images.
            stop: The number of calls k.
        """
        cond, tau = self.conditions(rows), self.sigmas[stop]
        first = first_gradient_step(stop, self.backprop_steps)
        us: list[Tensor] = []
        references: list[Tensor] = []

        def step(z: Tensor, k: int) -> Tensor:
            """Goes from σ_k to σ_{k+1}, with a gradient, and keeps what R compares."""
            if self.lam > 0:  # before the policy's own call: full fine-tuning exchanges weights
                with torch.no_grad(), self.policy.off():
                    references.append(self.velocity(z.detach(), self.sigmas[k], cond))
            us.append(self.velocity(z, self.sigmas[k], cond))
            return z + float(self.sigmas[k + 1] - self.sigmas[k]) * us[-1]

        with self.stage("rollout"):
            with torch.no_grad():
                z = self.walk(self.noise(rows), cond, 0, first)
            for k in range(first, stop):
                z = step(z, k)
            ends = [z]
            for n in range(self.redraws):
                eps = rows.normal("redraw", tuple(z.shape[1:]), n)
                ends.append(step(renoise(z, tau, self.sigmas[stop - 1], eps), stop - 1))
        lora = isinstance(self.policy, PolicyAdapters)
        with self.policy.off() if lora else nullcontext():  # a value on the transformer is frozen
            values = torch.stack([self.score(rows, end, tau) for end in ends])
        with self.stage("rollout"):
            R = output_regulariser(us, references) if self.lam > 0 else None
            found = draft_loss(
                values if self.redraws else values[0], R, lam=self.lam, ceiling=self.ceiling
            )
        if R is not None:
            self.note("regulariser", R)
        self.note("tau", tau)
        if self.ceiling is not None:
            self.note("active", found["active"])
        return found["loss"]
