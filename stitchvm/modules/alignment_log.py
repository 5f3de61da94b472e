"""What an alignment run writes into progress bar and logs.

train/…      means over the images of an update: rewards, their terms, losses; gradient norm, skipped updates, and the
             distances ‖default − copy‖
seconds/…    of the stages of an update: rollout, value, update
val/…        means over the held-out prompts: clean rewards, checker/…, image/… (signs of reward hacking)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from stitchvm.modules.held_out import picture_grid
from stitchvm.modules.ranks import all_mean

if TYPE_CHECKING:
    from stitchvm.modules.alignment import Alignment

__all__ = ["log_evaluation", "report"]


def report(module: Alignment, means: Mapping[str, Tensor], rate: float) -> None:
    """Logs an update; all ranks must call it.

    Arguments:
        module: The module.
        means: Scalars of this rank by name.
        rate: Images per second, of all ranks.
    """
    found = {f"train/{name}": x for name, x in all_mean(means).items()}
    found["train/skipped"] = float(module.skipped)
    for name in module.policy.copies:
        if name in ("old", "ema"):
            found[f"train/distance_{name}"] = float(module.policy.distance(name))
    found |= {f"seconds/{name}": x for name, x in module.stages.seconds().items()}
    module.log_dict(found)
    if "train/reward" in found:
        module.log("reward", found["train/reward"], prog_bar=True, logger=False)
    module.log("samples/s", rate, prog_bar=True)


def log_evaluation(module: Alignment, means: dict[str, float], images: list[Tensor]) -> None:
    """Logs an evaluation's means, on all ranks, and draws its images into TensorBoard.

    Lightning logs nothing of its check before training. Here that is the model before training, and belongs into the
    curves: `trainer.num_sanity_val_steps: -1` has all its prompts.
    """
    trainer = module.trainer
    named = {f"val/{name}": x for name, x in means.items()}
    if trainer.sanity_checking:
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)
    else:
        module.log_dict(named)
    if images and trainer.is_global_zero:
        picture = picture_grid(images)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/samples", picture, trainer.global_step)
