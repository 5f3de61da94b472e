r"""What DiffusionNFT and Flow-GRPO share: the values of an update's images, and their advantages.

    images of this device → V(z_τ) → rewards of all ranks → A_n = (R_n − mean of its group)/(s + ε)

A group, the K images of a prompt, is on one device; s and the constants of `normalise` may be of all images, so every
rank gets the rewards of all, a few numbers. What is learned from is R = Σ_k w_k R_k, see `objectives.advantages`.

Values are asked without gradient, of the frozen networks: no value ever sees the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from stitchvm.adapters.full import BASE, PolicyWeights
from stitchvm.adapters.policy import Policy
from stitchvm.modules.ranks import gather
from stitchvm.modules.rows import Rows
from stitchvm.objectives.advantages import combine_rewards, group_advantages
from stitchvm.objectives.stopping import StopWindow
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.values.base import Value
from stitchvm.values.terminal import TerminalValue

if TYPE_CHECKING:
    from stitchvm.modules.alignment import Alignment

__all__ = [
    "Grouping",
    "check_groups",
    "check_value",
    "frozen",
    "in_order",
    "inner_parts",
    "log_histogram",
    "not_finite",
    "own_rows",
    "stop_window",
]


@dataclass(frozen=True)
class Grouping:
    """How rewards become advantages.

    Attributes:
        std: "global" or "group": the s of `group_advantages`.
        normalise: "none", "global" or "group": how the terms of a sum are standardised, see `combine_rewards`. With
            "none" R is the value as it is, with the constants of its own.

    Raises:
        ValueError: If one of them is unknown.
    """

    std: str = "global"
    normalise: str = "none"

    def __post_init__(self) -> None:
        if self.std not in ("global", "group") or self.normalise not in (
            "none",
            "global",
            "group",
        ):
            raise ValueError(
                f'model.std = "{self.std}", normalise = "{self.normalise}": expected "global" or "group", and "none", '
                '"global" or "group".'
            )

    @torch.no_grad()
    def advantages(
        self, module: Alignment, rows: Rows, z: Tensor, tau: Tensor, batch: int | None
    ) -> Tensor | None:
        """Returns the advantages of the images of all ranks, float32 with shape (N,), or None.

        None, on all ranks, if a reward of any rank is not finite. All ranks must call it. What a user wants to see of
        rewards and groups is noted.

        Arguments:
            module: The module, which scores.
            rows: All images of this rank, B of them.
            z: Their latents, in their order, with shape (B, C, H, W).
            tau: The latents' level, a scalar.
            batch: The images of one call of the value.
        """
        reward = getattr(module._built.value, "reward", None)
        weights = reward.weights if isinstance(reward, WeightedReward) else {}
        columns = []
        with frozen(module.policy):
            for part in rows.split(batch):
                scored = module.scored(part, z[part.positions], tau)
                missing = scored.value * torch.nan
                terms = [scored.terms.get(name, missing) for name in weights]
                columns.append(torch.stack([scored.value, *terms], dim=1).float())
        everything, groups = gather(torch.cat(columns)), gather(rows.groups)
        if not bool(everything.isfinite().all()):
            return None
        values = everything[:, 0]
        terms_of = dict(zip(weights, everything[:, 1:].unbind(1), strict=True))
        if self.normalise == "none":
            R = values.double()
        else:
            parts, w = (terms_of, weights) if terms_of else ({"reward": values}, {"reward": 1.0})
            R = combine_rewards(parts, w, normalise=self.normalise, groups=groups)
        found = group_advantages(R, groups.cpu(), std=self.std)
        for name in ("reward_std", "group_std", "zero_spread", "advantage_std"):
            module.note(name, torch.tensor(found.stats[name]))
        for name, each in terms_of.items():
            spread = group_advantages(each, groups).stats["group_std"]
            module.note(f"group_std/{name}", torch.tensor(spread))
        return found.values.to(values.device)


def own_rows(module: Alignment, rows: Rows, everyone: Tensor) -> Tensor:
    """Returns this rank's part of what `Grouping.advantages` returned."""
    first = module.global_rank * len(rows)
    return everyone[first : first + len(rows)]


def inner_parts(rows: Rows, steps: int) -> list[Rows]:
    """Returns the images of each optimiser step of an update: every steps-th image of every prompt."""
    return [
        rows.take(p for p, n in enumerate(rows.number) if n % steps == step)
        for step in range(steps)
    ]


def in_order(parts: Sequence[Rows], found: Sequence[Tensor]) -> Tensor:
    """Returns what was found for parts of the device's images, in the images' order."""
    order = [place for part in parts for place in part.place]
    joined = torch.cat(list(found))
    return joined[torch.tensor(order, device=joined.device).argsort()]


def frozen(policy: Policy) -> AbstractContextManager[None]:
    """Returns a context in which the transformer is the frozen model, if that is in memory."""
    there = not isinstance(policy, PolicyWeights) or BASE in policy.copies
    return policy.off() if there else nullcontext()


def not_finite(module: Alignment) -> Tensor:
    """Returns a loss that is not finite, for an update that must be skipped; it can be sent backwards."""
    return torch.full((), torch.nan, device=module.device, requires_grad=True)


def stop_window(stop: list[int] | None, num_steps: int) -> StopWindow:
    """Returns the stopping window of a setting, [N, N] for None.

    Raises:
        ValueError: If it has not two numbers, or lies outside of the schedule.
    """
    if stop is not None and len(stop) != 2:
        raise ValueError(f"model.stop = {stop}: expected [low, high], such as [12, 17], or null.")
    window = StopWindow(*(stop or (num_steps, num_steps)))
    window.check(num_steps)
    return window


def check_groups(group_size: int, inner_steps: int) -> None:
    """Raises ValueError if groups have one image, or fewer images than an update has optimiser steps."""
    if group_size < 2:
        raise ValueError(
            f"model.group_size = {group_size}: an advantage compares the images of a prompt, and would always be 0. "
            "Give at least 2, better 8 or more; the reference has 24."
        )
    if not 1 <= inner_steps <= group_size:
        raise ValueError(
            f"model.inner_steps = {inner_steps}: expected 1 … {group_size}, the images of a prompt, of which every "
            "step takes a part."
        )


def check_value(module: Alignment, low: int) -> None:
    """Raises ValueError if a value cannot be asked where roll-outs may stop, or would see the policy.

    Arguments:
        module: The module.
        low: The smallest number of network calls of a roll-out.
    """
    value, policy = module._built.value, module.policy
    if low < module.num_steps and any(isinstance(m, TerminalValue) for m in value.modules()):
        raise ValueError(
            f"roll-outs may stop after {low} of {module.num_steps} steps, where a terminal reward is not defined: set "
            "model.stop to null, or take a stitched or Tweedie value."
        )
    if BASE not in policy.copies:
        check_borrowed(value, policy)


def check_borrowed(value: Value, policy: Policy) -> None:
    """Raises ValueError if full fine-tuning would change a value that runs on the generator's transformer."""
    borrows = any(policy.transformer in (m, getattr(m, "network", None)) for m in value.modules())
    if borrows and isinstance(policy, PolicyWeights):
        raise ValueError(
            "full fine-tuning would change the value with the policy, since it runs on the generator's transformer: "
            "set share_generator to false, or take a value with a backbone of its own."
        )


def log_histogram(module: Alignment, name: str, x: Tensor) -> None:
    """Draws a histogram into TensorBoard, as often as the Trainer logs, at the optimiser steps made before it."""
    if module._trainer is None or not module.trainer.is_global_zero:
        return
    every = module.trainer.log_every_n_steps
    update = module.trainer.fit_loop.total_batch_idx
    for logger in module.trainer.loggers if every and (update + 1) % every == 0 else ():
        if isinstance(logger, TensorBoardLogger):
            step = module.trainer.global_step
            logger.experiment.add_histogram(f"train/{name}", x.float().cpu(), step)
