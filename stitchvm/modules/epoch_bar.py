"""The progress bar of a run without a last epoch, which Lightning counts as `Epoch 3/-2`."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar

__all__ = ["EpochBar", "name_epochs"]


class EpochBar(RichProgressBar):
    """Lightning's bar, whose epochs have an end only where the run has: `max_epochs` -1 is none."""

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        if self.trainer.max_epochs != -1:
            return description
        plain = description.replace("/-2", "").rstrip()
        return f"{plain:{len(self.validation_description)}}"  # of even lengths, as Lightning's


def name_epochs(trainer: Trainer) -> None:
    """Puts this bar in the place of Lightning's own; others stay."""
    for k, callback in enumerate(trainer.callbacks):
        if type(callback) is RichProgressBar:
            trainer.callbacks[k] = EpochBar(callback.refresh_rate, callback._leave, callback.theme)
