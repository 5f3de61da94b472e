"""What a checkpoint holds: everything that training changes, and nothing pretrained.

A module mixes in `LeanCheckpoint` and names the prefixes of its frozen, pretrained parts. Their keys are dropped
when a checkpoint is written; when one is read, every other key must be there.

A run that ends by `max_steps`, between two steps at which its ModelCheckpoint saves, leaves its last step in last.ckpt
all the same.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from stitchvm.interruption import uninterrupted

__all__ = ["LeanCheckpoint"]


class NoneAlone(Callback):
    """Lets no process of several save on an exception that is its own.

    It would wait at the end of saving for the others, who wait for it in another exchange, until that times out: nobody
    would even see the exception. Ctrl-C and SIGTERM come to all, as a rule at the same place.
    """

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Comes before those that save, which stand last."""
        if trainer.world_size > 1 and not isinstance(exception, KeyboardInterrupt | SystemExit):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.save_on_exception = False


class WholeSteps(Callback):
    """Lets an interrupt wait until a step that Lightning makes is made, counted, and followed by its schedule.

    Else a checkpoint would hold weights of half a step, or the next step's rate would be that of the one before.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Begins to wait, once the gradients are there."""
        if pl_module.automatic_optimization:
            self._held.enter_context(uninterrupted())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Lets the interrupt come."""
        self._held.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Waits no longer; the run ends already."""
        with suppress(KeyboardInterrupt):
            self._held.close()


class LeanCheckpoint(LightningModule):
    """A LightningModule whose checkpoints leave out the parts named in `pretrained_prefixes`."""

    pretrained_prefixes: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # ours is in on_load_checkpoint: it knows what must be there

    def _own(self, key: str) -> bool:
        return not key.startswith(self.pretrained_prefixes)

    def configure_callbacks(self) -> list[Callback]:
        """Adds `NoneAlone` and `WholeSteps`."""
        return [NoneAlone(), WholeSteps()]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Leaves the last step of `max_steps` in last.ckpt, so that a longer run goes on from there.

        ModelCheckpoint saves every so many steps and not at the end. Its own saving has been done by now, in the same
        place of the loop, so that resuming from here is as exact.
        """
        if not 0 < self.trainer.max_steps <= self.trainer.global_step:
            return
        for callback in self.trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.save_last is not True:
                continue
            if callback._last_global_step_saved != self.trainer.global_step:
                assert callback.dirpath is not None
                name = callback.CHECKPOINT_NAME_LAST + callback.FILE_EXTENSION
                callback.last_model_path = callback.last_model_path or str(
                    Path(callback.dirpath) / name
                )
                self.trainer.save_checkpoint(callback.last_model_path)

    def note_loaded(self, checkpoint: dict[str, Any]) -> None:
        """Lets callbacks that save on exceptions take a checkpoint's step for saved.

        They would save it again: over the file itself, and while the optimiser's state is not yet loaded. Others, such
        as one that keeps the best of evaluations, have perhaps not seen the step.
        """
        for callback in [] if self._trainer is None else self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
                callback._last_global_step_saved = checkpoint.get("global_step", 0)

    def how_to_go_on(self) -> str:
        """Returns what is kept, and what to do, when a run was interrupted."""
        callbacks = [
            c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)
        ]
        last = next((c.last_model_path for c in callbacks if c.last_model_path), None)
        if last is None or self.trainer.state.fn != TrainerFn.FITTING:
            return "nothing new was saved: the same command starts again"
        return f"the same command with --ckpt_path last goes on from {last}"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops the pretrained weights, and lists names and shapes of the others."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: state[key] for key in state if self._own(key)}
        checkpoint["trained"] = shapes(checkpoint["state_dict"])
        places = {id(parameter): place for place, parameter in enumerate(self.parameters())}
        optimizers = self.trainer.optimizers if self._trainer is not None else []
        for state, optimizer in zip(
            checkpoint.get("optimizer_states", []), optimizers, strict=False
        ):
            order = [places[id(p)] for group in optimizer.param_groups for p in group["params"]]
            if state.get("param_groups"):  # with FSDP2 only the first process holds them
                renumber(state, order)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Requires every trained weight, by name and shape.

        A sharding strategy has taken the weights out of the checkpoint by now; the list says what they were.
        """
        self.note_loaded(checkpoint)
        saved: dict[str, list[int]] = checkpoint["trained"]
        if "state_dict" in checkpoint:
            saved = shapes(checkpoint["state_dict"])
        own = shapes({key: value for key, value in self.state_dict().items() if self._own(key)})
        missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        wrong = [
            f"{key} {tuple(saved[key])} (expected {tuple(own[key])})"
            for key in sorted(own.keys() & saved.keys())
            if saved[key] != own[key]
        ]
        if missing or unknown or wrong:
            raise ValueError(
                f"the checkpoint does not fit this {type(self).__name__}: missing {missing[:5]} "
                f"({len(missing)}), unknown {unknown[:5]} ({len(unknown)}), wrong shape {wrong[:5]}. It was "
                "made with another configuration: use the config.yaml beside the checkpoint."
            )


def renumber(state: dict[str, Any], order: list[int]) -> None:
    """Numbers an optimiser's parameters by their place in the module, in the order of its groups.

    A single process and DDP number them as the optimiser lists them, FSDP2 expects the module's order when it
    reads a file. With one numbering any of them continues the checkpoint of another: a plain optimiser goes by
    position and takes any numbers.
    """
    old = [number for group in state["param_groups"] for number in group["params"]]
    new = dict(zip(old, order, strict=True))
    state["state"] = {new[number]: value for number, value in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [new[number] for number in group["params"]]


def shapes(state: dict[str, Any]) -> dict[str, list[int]]:
    """Returns the shape of every tensor, as plain lists (checkpoints hold nothing else)."""
    return {key: list(value.shape) for key, value in state.items()}
