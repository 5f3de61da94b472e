"""The learning rate: a linear warm-up, and what follows it."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["DECAYS", "check_decay", "rates", "total_steps"]

DECAYS = ("none", "linear")


def check_decay(trainer: Trainer, decay: str) -> None:
    """Raises ValueError if a rate is to fall to 0 at an end that nothing tells."""
    if decay == "linear" and trainer.max_steps < 0 and (trainer.max_epochs or -1) < 0:
        raise ValueError(
            'decay = "linear" falls to 0 at the end of the training, which nothing tells: give trainer.max_steps or '
            'trainer.max_epochs, or take decay "none".'
        )


def total_steps(trainer: Trainer | None, decay: str) -> float:
    """Returns the optimiser steps over which a rate falls to 0; infinity, which needs no trainer, if it does not."""
    if decay == "none":
        return math.inf
    assert trainer is not None
    return float(trainer.estimated_stepping_batches)


def rates(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total: float = math.inf
) -> LambdaLR:
    """Returns the schedule min(1, (s + 1)/warm-up)·max(0, 1 − s/total) of steps s.

    Arguments:
        optimizer: The optimiser.
        warmup_steps: The steps of the warm-up.
        total: The steps after which the rate is 0.
    """

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup_steps)) * max(0.0, 1 - step / max(1.0, total))

    return LambdaLR(optimizer, rate)
