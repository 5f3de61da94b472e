"""The progress bar of sampling: samples, the step of the batch under way, the running mean of every reward."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from stitchvm.modules.sample_store import Line

__all__ = ["SamplingBar"]


class SamplingBar(TQDMProgressBar):
    """Counts this device's samples instead of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, float] = {}
        self.count = 0
        self.text = ""

    def init_predict_tqdm(self) -> Tqdm:
        """Returns a bar of samples."""
        return Tqdm(
            desc="sampling",
            unit="sample",
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )

    def begin(self, total: int | None) -> None:
        """Shows the bar, and how many samples there will be; None if that is not known."""
        self.predict_progress_bar = self.init_predict_tqdm()
        self.predict_progress_bar.reset(total)

    def step(self, step: int, steps: int) -> None:
        """Shows the step of the batch under way."""
        self.predict_progress_bar.set_postfix_str(f"{self.text}step {step}/{steps}")

    def add(self, line: Line) -> None:
        """Counts a sample."""
        self.count += 1
        for name, reward in line["rewards"].items():
            self.sums[name] = self.sums.get(name, 0.0) + reward
        if "checker" in line:
            self.sums["right"] = self.sums.get("right", 0.0) + line["checker"]["whole"]
        means = [f"{name} {total / self.count:.3f}" for name, total in self.sums.items()]
        self.text = ", ".join(means) + (", " if means else "")
        self.predict_progress_bar.update(1)
        self.predict_progress_bar.set_postfix_str(self.text.removesuffix(", "))

    def on_predict_start(self, *_: Any) -> None:
        """Does nothing: networks are loaded first, and print bars of their own."""

    def on_exception(self, *_: Any) -> None:
        """Ends the bar, so that what went wrong stands on a line of its own."""
        if self._predict_progress_bar is not None:
            self.predict_progress_bar.close()

    def on_predict_batch_start(self, *_: Any) -> None:
        """Does nothing: batches are not counted."""

    def on_predict_batch_end(self, *_: Any) -> None:
        """Does nothing: batches are not counted."""
