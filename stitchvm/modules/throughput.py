"""Images per second in the progress bar and the logs."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["ImagesPerSecond"]


class ImagesPerSecond(Callback):
    """Logs `images/s` over all devices, measured between two logging steps, validation left out."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._images = 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts a batch; the first one after a pause only starts the clock."""
        now = time.perf_counter()
        if self._start is None:
            self._start, self._images = now, 0
            return
        self._images += len(batch["pixels"]) * trainer.world_size
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            rate = self._images / (now - self._start)
            pl_module.log("images/s", rate, prog_bar=True, rank_zero_only=True)
            self._start, self._images = now, 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._start = None
