"""What an alignment run writes into progress bar and logs.

train/…      means over the images of an update: rewards, their terms, losses; gradient norm, skipped updates, and the
             distances ‖default − copy‖
seconds/…    of the stages of an update: rollout, value, update
cost/…       what all updates so far have taken (see `modules/spent.py`), also beside every val/…
val/…        means over the held-out prompts: clean rewards, checker/…, image/… (signs of reward hacking)

The step of an entry is the number of optimiser steps made by then, that of the checkpoint with the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from stitchvm.modules.held_out import picture_grid
from stitchvm.modules.ranks import all_mean, world_size

if TYPE_CHECKING:
    from stitchvm.modules.alignment import Alignment

__all__ = ["log_evaluation", "report"]


def report(module: Alignment, means: Mapping[str, Tensor], images: int) -> None:
    """Ends an update's clock and logs the update; all ranks must call it.

    Arguments:
        module: The module.
        means: Scalars of this rank by name.
        images: The images of this rank.
    """
    took = module.spent.stop(module.device)
    exact = {name: torch.tensor(x, dtype=torch.float64) for name, x in took.items()}
    everyone = all_mean(exact | {f"train/{name}": x.cpu() for name, x in means.items()})
    took = {name: everyone.pop(name) for name in took}
    module.spent.add(**took, samples=images, ranks=world_size())
    found = everyone | module.spent.scalars() | at_step(module)
    found["train/skipped"] = float(module.skipped)
    for name in module.policy.copies:
        if name in ("old", "ema"):
            found[f"train/distance_{name}"] = float(module.policy.distance(name))
    found |= {f"seconds/{name}": x for name, x in module.stages.seconds().items()}
    module.log_dict(found)
    if "train/reward" in found:
        module.log("reward", found["train/reward"], prog_bar=True, logger=False)
    module.log("samples/s", images * world_size() / took["seconds"], prog_bar=True)


def log_evaluation(module: Alignment, means: dict[str, float], images: list[Tensor]) -> None:
    """Logs an evaluation's means, on all ranks, and draws its images into TensorBoard.

    Lightning logs nothing of its check before training. Here that is the model before training, and belongs into the
    curves: `trainer.num_sanity_val_steps: -1` has all its prompts.
    """
    trainer = module.trainer
    named = {f"val/{name}": x for name, x in means.items()}
    if trainer.state.fn == TrainerFn.FITTING:
        named |= module.spent.scalars()
    if trainer.sanity_checking:
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)
    elif trainer.state.fn == TrainerFn.FITTING:
        module.log_dict(named | at_step(module))
    else:
        module.log_dict(named)
    if images and trainer.is_global_zero:
        picture = picture_grid(images)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/samples", picture, trainer.global_step)


def at_step(module: Alignment) -> dict[str, float]:
    """Returns what makes Lightning log at the optimiser's step; by itself it counts batches, the present one left out.

    Then an evaluation before training and one after the first update would both be at 0.
    """
    return {"step": float(module.trainer.global_step)}
