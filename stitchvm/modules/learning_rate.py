"""The learning rate of a distillation: a linear warm-up, and what follows it."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["DECAYS", "check_decay", "rates"]

DECAYS = ("none", "linear")


def check_decay(trainer: Trainer, decay: str) -> None:
    """Raises ValueError if a rate is to fall to 0 at an end that nothing tells."""
    if decay == "linear" and trainer.max_steps < 0 and (trainer.max_epochs or -1) < 0:
        raise ValueError(
            'decay = "linear" falls to 0 at the end of the training, which nothing tells: give trainer.max_steps or '
            'trainer.max_epochs, or take decay "none".'
        )


def rates(
    trainer: Trainer | None, optimizer: torch.optim.Optimizer, warmup_steps: int, decay: str
) -> LambdaLR:
    """Returns the schedule min(1, (s + 1)/warm-up), times 1 − s/total if `decay` is "linear", of steps s.

    Arguments:
        trainer: Tells the total; may be None if it is not needed.
        optimizer: The optimiser.
        warmup_steps: The steps of the warm-up.
        decay: One of `DECAYS`.
    """
    total = math.inf
    if decay == "linear":
        assert trainer is not None
        total = float(trainer.estimated_stepping_batches)

    def rate(step: int) -> float:
        left = 1.0 if math.isinf(total) else max(0.0, 1 - step / max(1.0, total))
        return min(1.0, (step + 1) / max(1, warmup_steps)) * left

    return LambdaLR(optimizer, rate)
