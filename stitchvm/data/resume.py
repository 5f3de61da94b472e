"""The position in the stream of training batches, and how a resume finds it.

The stream is epoch after epoch in the order that (seed, epoch) fixes. The Trainer counts batches
(`fit_loop.epoch_loop.batch_progress`) and restores the count from a checkpoint. The training loader reads epoch and
count when its first batch is wanted, and the sampler begins there: no batch is drawn to be thrown away, and a module
has to do nothing for it. A checkpoint holds, under the data module's class name, what Lightning does not know:

- the position of the last batch handed over. If the run was interrupted in that batch or after it, and its step was
  not made, it is handed over again, with those accumulated for the same step. A run that ended in the middle of an
  epoch by `max_steps` is recorded by Lightning as having finished that epoch; when it is taken up with more steps, the
  epoch's remaining batches come first, and later epochs of the data are one behind Lightning's (`shift`; a batch's
  `epoch` is that of the data).
- the global batch B·W. With another one, Lightning's count of batches is converted, so that the run goes on at the
  same sample, rounded down to a whole global batch.
- seed and length of the data set: if they differ, the order cannot be continued and a warning says so.

- whether an evaluation that follows the last batch was not made to its end: it begins again. (Lightning would make as
  many batches as were left, the first ones, or none, if the checkpoint was written between the batch and it.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus


class Stream:
    """The position in the training batches of one run.

    Arguments:
        seed: The seed of the order.
        num_samples: The length of the training set.
        global_batch: Samples per step on all devices, B·W.
    """

    def __init__(self, seed: int, num_samples: int, global_batch: int) -> None:
        self.seed = seed
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.position = (0, 0)
        self.shift = 0
        self._begun = 0
        self._resumed: tuple[int, int] | None = None
        self._made: tuple[int, int] | None = None

    def record(self, trainer: Trainer | None, epoch: int, batch: int) -> None:
        """Notes that batches up to `batch` of `epoch` have been handed over."""
        self.position = epoch, batch
        self._made = None if trainer is None else made(trainer)

    def start(self, trainer: Trainer) -> tuple[int, int]:
        """Returns the (epoch, batch) to begin at; to be called when the Trainer wants an iteration's first batch."""
        if trainer.overfit_batches:  # always the same batches
            return 0, 0
        loop = trainer.fit_loop
        epoch, batch = trainer.current_epoch, loop.epoch_loop.batch_progress.current.ready
        resumed, self._resumed = self._resumed, None
        if resumed is not None and 0 < resumed[1] < loop.max_batches:
            self.shift = resumed[0] - epoch
            self._begun = resumed[1]
            return resumed
        self._begun = batch
        return epoch + self.shift, batch

    def state_dict(self, trainer: Trainer | None = None) -> dict[str, Any]:
        """Returns the position and what it depends on, as plain integers."""
        again = self.again(trainer)
        return {
            "epoch": self.position[0],
            "batch": self.position[1] - again,
            "again": again,
            "evaluation": not again and evaluation_left(trainer),
            "shift": self.shift,
            "seed": self.seed,
            "num_samples": self.num_samples,
            "global_batch": self.global_batch,
        }

    def again(self, trainer: Trainer | None) -> int:
        """Returns how many batches are to be handed over again: of a step that an interrupted run did not make."""
        if trainer is None or self._made is None:
            return 0
        progress, (steps, ended) = trainer.fit_loop.epoch_loop.batch_progress, made(trainer)
        accumulated: int = progress.current.processed % trainer.accumulate_grad_batches
        # of a run that accumulates otherwise than the one before: none of that one's
        accumulated = min(accumulated, self.position[1] - self._begun - (ended == self._made[1]))
        if ended == self._made[1]:  # in the batch, before its step or after it
            return accumulated + 1 if steps == self._made[0] else 0
        # an epoch's last batch makes a step, whatever is accumulated
        return 0 if progress.is_last_batch else accumulated

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a position, in batches of the present size; warns if it is one in another order."""
        if (state["seed"], state["num_samples"]) != (self.seed, self.num_samples):
            warnings.warn(
                f"The checkpoint was written with seed {state['seed']} and {state['num_samples']} training images,"
                f" this run has seed {self.seed} and {self.num_samples}: the order of the images is a new one.",
                stacklevel=2,
            )
            return
        self.shift = state["shift"]
        self.position = self._resumed = state["epoch"], self.convert(state["batch"], state)

    def convert(self, batches: int, state: dict[str, Any]) -> int:
        """Returns how many present batches are the `batches` of an epoch consumed by the run of `state`."""
        if (
            batches >= state["num_samples"] // state["global_batch"]
        ):  # a whole epoch, whose tails may differ
            return self.num_samples // self.global_batch
        return batches * state["global_batch"] // self.global_batch


def made(trainer: Trainer) -> tuple[int, int]:
    """Returns the optimiser steps and the training batches that have been ended."""
    return trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.total.processed


def evaluation_left(trainer: Trainer | None) -> bool:
    """Returns whether an evaluation that follows the last batch is not made to its end, if the batch is."""
    if trainer is None:
        return False
    if trainer.validating:
        return trainer.state.status == TrainerStatus.INTERRUPTED
    loop = trainer.fit_loop.epoch_loop
    between = loop.batch_progress.total.completed < loop.batch_progress.total.ready
    fetcher: Any = trainer.fit_loop._data_fetcher
    return between and loop._should_check_val_fx(fetcher)


def settle(progress: dict[str, Any], batch: int, again: int, evaluation: bool) -> None:
    """Lets Lightning's count of batches in a checkpoint end with those that count, if the run was interrupted.

    Arguments:
        progress: The count.
        batch: The batches of the epoch that count.
        again: How many more were handed over, and are again; if none, an interrupted one has made its step.
        evaluation: Whether the run goes on with the evaluation that follows the batch.
    """
    back = progress["current"]["processed"] - batch
    for counts in (progress["total"], progress["current"]):
        count = counts["processed"] - back
        if again or evaluation:
            counts.update(dict.fromkeys(counts, count))
        elif counts["ready"] > counts["processed"]:  # what follows a step is still to be done
            counts.update(dict.fromkeys(counts, count), completed=count - 1)
    if again:
        progress["is_last_batch"] = False


class ConvertProgress(Callback):
    """Converts Lightning's counts of batches in a checkpoint: of an interrupted run, or with another global batch.

    Arguments:
        key: The data module's key in the checkpoint.
        stream: Returns the present run's stream.
    """

    def __init__(self, key: str, stream: Callable[[], Stream]) -> None:
        self.key = key
        self.stream = stream
        self._stepped: int | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Changes the counts of the current epoch in `checkpoint`, before the loops read them."""
        state, loops = checkpoint.get(self.key), checkpoint.get("loops", {}).get("fit_loop", {})
        progress = loops.get("epoch_loop.batch_progress")
        if not state or progress is None:
            return
        again, left = state.get("again", 0), state.get("evaluation", False)
        settle(progress, state["batch"], again, left)
        if again:
            self._stepped = loops["epoch_loop.state_dict"]["_batches_that_stepped"]
        evaluation = loops["epoch_loop.val_loop.batch_progress"]
        evaluation["current"] = dict.fromkeys(evaluation["current"], 0)
        done = evaluation["total"]["completed"]  # one is begun, or none: so Lightning tells
        evaluation["total"].update(
            ready=done + left, started=done + left, processed=done, completed=done
        )
        current = progress["current"]
        step = self.stream().convert(current["ready"], state) - current["ready"]
        progress["current"] = {key: count + step for key, count in current.items()}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Logs a batch that is made again at its step: Lightning counts one more where it passes an evaluation over."""
        if self._stepped is not None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._stepped
            self._stepped = None
