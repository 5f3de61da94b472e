"""What fine-tuning by DRaFT, DiffusionNFT and Flow-GRPO share: everything but the loss.

One `training_step` is one update, as a rule one optimiser step. Its batch is this device's share of the update's
prompts, each prompt gives K images on the same device:

    roll out → value → losses in micro-batches, gradients summed up locally → ONE average over ranks → clip → step

The global number of prompts per update is a setting of the data; the number of devices must divide it. Random numbers
are keyed by prompt and image (`Rows`), so that one GPU does what sixteen do, up to rounding.

**A method is a subclass with these hooks**, of which only `micro_steps` must be there:

    copies                     the copies of the policy that it needs, such as ("old", "ema")
    needs_frozen               whether it runs the frozen model (`policy.off()`): full fine-tuning must then keep it
    check()                    raises ValueError if settings do not go together; before anything is loaded
    check_parts()              the same, when the networks are there
    rollout(rows)              what all images of this device are needed for at once (advantages); may gather from ranks
    micro_steps(rows, rolled)  yields scalar losses, which sum up to the mean loss of this device's images
    after_step(step)           after the optimiser step and the EMA; `step` steps have been made, skipped ones not
    method_state()             plain data and tensors for the checkpoint, and
    load_method_state(state)   their way back

`micro_steps` is a generator: each loss it yields is sent backwards before it goes on, so that one graph is in memory at
a time. A None makes an optimiser step of the losses so far, in between; the last is made at the end. Every rank must
yield equally often. It may use

    self.conditions(rows)      the prompts' conditions
    self.noise(rows)           z_1, where roll-outs begin
    self.velocity(z, t, cond)  the velocity of whatever policy is active: `with self.policy.use("old"):`, `.off():`
    self.walk(z, cond, first, last)   Euler steps on `self.sigmas` (the roll-out's levels), with or without gradients
    self.score(rows, z, tau)   the values of latents, with shape (B,), differentiable, logged; all NaN if a reward was
                               not finite (never an exception on one rank alone); `scored` has a sum's terms, too
    self.stage("value")        a context whose seconds are logged; so are those of "rollout" and "update"
    self.note(name, x)         logs the mean of x over the images of the update
    ranks.gather(x)            the rows of all ranks

**Not finite.** If the loss or a gradient of any rank is not finite, all ranks skip the update: no step, no EMA, no
schedule; it is counted, the data go on. `max_skipped` in a row end the run.

Frozen weights have their own dtype and stand outside of the module tree; the trained ones are float32, and all that a
strategy sees. Under FSDP2 the transformer's blocks are sharded, adapters are whole on every rank (see
`modules/sharding.py`). Checkpoints hold the policy and its copies under "policy", by name.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.adapters.policy import Policy
from stitchvm.generator import Generator
from stitchvm.interruption import uninterrupted
from stitchvm.modules import alignment_checks as checks
from stitchvm.modules.alignment_log import log_evaluation, report
from stitchvm.modules.alignment_parts import AlignmentParts, prompts_of
from stitchvm.modules.alignment_state import export_policy, load_alignment, save_alignment
from stitchvm.modules.checkpoint import LeanCheckpoint
from stitchvm.modules.gradients import average_gradients, clip_gradients, gradient_norm
from stitchvm.modules.held_out import Evaluation
from stitchvm.modules.learning_rate import rates
from stitchvm.modules.meter import out_of_memory_says
from stitchvm.modules.rows import Rows
from stitchvm.modules.sharding import sharded_mark
from stitchvm.modules.spent import Spent
from stitchvm.modules.stages import Stages
from stitchvm.objectives.nft import ema_decay
from stitchvm.path import levels
from stitchvm.rewards.base import Reward
from stitchvm.values.parts import ValueFactory
from stitchvm.values.terminal import TerminalFactory
from stitchvm.values.terms import Scored

__all__ = ["Alignment"]


class Alignment(LeanCheckpoint):
    """The base of the fine-tuning methods (Section 5, Appendix D.3).

    Arguments:
        generator: Builds the generator.
        value: The value that is to rise, any of the library's; the terminal reward by default.
        reward: Builds the reward of the value; by default a stitched value's own.
        policy: Builds the trained weights on the transformer: `PolicyAdapters` (LoRA, the default) or `PolicyWeights`.
        group_size: The images K of a prompt in an update.
        micro_batch: The images of one forward and backward pass; bounds the memory and changes nothing else.
        num_steps: The steps N of roll-outs.
        grid: Their levels: "single" or "double" (shifted once, or twice as diffusers does for SD 3.5), "linear",
            "flux", or "pipeline" for the generator's own.
        shift: The shift of the first four.
        guidance_scale: g of roll-outs; 1 is off.
        height: The height in pixels; the model's own size by default.
        width: The width in pixels.
        lr: AdamW's learning rate.
        betas: AdamW's moment decays.
        weight_decay: AdamW's weight decay.
        warmup_steps: Steps of linear warm-up from 0.
        clip: The largest norm of the gradient, or None.
        ema_limit: The decay of the average that is evaluated and exported, min((1 + s)/(10 + s), limit) after s steps.
        max_skipped: How many updates in a row may be skipped because something is not finite.
        gradient_checkpointing: Whether blocks are run again in the backward pass, to save memory.
        prompts_ahead: Up to so many distinct prompts are encoded before training and the text encoders freed; with more
            of them, the encoders stay, and encode each update's prompts.
        evaluation: How held-out prompts are sampled and scored.
        seed: Seeds roll-outs and evaluation.

    Raises:
        ValueError: If a number is out of its range.
    """

    run_config: str | None = None  # set by the command line
    pretrained_prefixes = ("trained.", "mark")  # saved by name under "policy", or not at all
    copies: tuple[str, ...] = ("ema",)
    needs_frozen: bool = False

    def __init__(
        self,
        generator: Callable[[], Generator],
        value: ValueFactory | None = None,
        reward: Callable[[], Reward] | None = None,
        policy: Callable[[Any], Policy] | None = None,
        group_size: int = 1,
        micro_batch: int | None = 8,
        num_steps: int = 10,
        grid: str = "single",
        shift: float = 3.0,
        guidance_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        clip: float | None = 1.0,
        ema_limit: float = 0.9,
        max_skipped: int = 10,
        gradient_checkpointing: bool = False,
        prompts_ahead: int = 4096,
        evaluation: Evaluation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator_factory, self.reward_factory = generator, reward
        self.value_factory: ValueFactory = value or TerminalFactory()
        self.policy_factory: Callable[..., Policy] = policy or PolicyAdapters
        self.group_size, self.micro_batch = group_size, micro_batch
        self.num_steps, self.grid, self.shift = num_steps, grid, shift
        self.guidance_scale, self.size = guidance_scale, checks.pixel_size(height, width)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_steps, self.clip, self.ema_limit = warmup_steps, clip, ema_limit
        self.max_skipped, self.seed = max_skipped, seed
        self.gradient_checkpointing, self.prompts_ahead = gradient_checkpointing, prompts_ahead
        self.evaluation = evaluation or Evaluation()
        self.skipped = self.skipped_in_a_row = 0
        self.spent = Spent()
        self.parts: AlignmentParts | None = None
        self.trained = nn.ParameterList()
        self._notes: dict[str, list[Tensor]] = defaultdict(list)
        checks.check_settings(self)

    # -- what a method defines ---------------------------------------------------------------------

    def check(self) -> None:
        """Raises ValueError if settings do not go together; called before anything is loaded."""

    def check_parts(self) -> None:
        """Raises ValueError if networks and settings do not go together; called once they are there."""

    def rollout(self, rows: Rows) -> Any:
        """Returns what `micro_steps` needs of all images of this device; nothing by default."""
        return None

    @abstractmethod
    def micro_steps(self, rows: Rows, rolled: Any) -> Iterator[Tensor | None]:
        """Yields scalar losses; their sum is the mean loss of this device's images. After a None another sum begins."""

    def after_step(self, step: int) -> None:
        """Does what follows an optimiser step, such as moving the old policy.

        Arguments:
            step: The optimiser steps made so far.
        """

    def method_state(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold besides the policy; tensors and plain data."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Takes up what `method_state` returned."""

    # -- what a method may use ---------------------------------------------------------------------

    @property
    def generator(self) -> Any:
        """The generator."""
        return self._built.generator

    @property
    def policy(self) -> Policy:
        """The trained weights and their copies."""
        return self._built.policy

    @property
    def sigmas(self) -> Tensor:
        """The levels σ_0 … σ_N of roll-outs, float32 on the CPU."""
        return self._built.sigmas

    @property
    def update(self) -> int:
        """The number of the present update, skipped ones counted."""
        return self.trainer.global_step + self.skipped

    def conditions(self, rows: Rows) -> Any:
        """Returns the conditions of images' prompts."""
        return self._built.conditions(rows)

    def noise(self, rows: Rows) -> Tensor:
        """Returns z at σ_0, float32 with shape (B, C, H, W): unit noise for σ_0 = 1."""
        shape = (self.generator.latent_channels, *self._built.latent_size)
        return float(self.sigmas[0]) * rows.normal("z_1", shape)

    def velocity(self, z_t: Tensor, t: Tensor | float, cond: Any) -> Tensor:
        """Returns u_t(z_t) of the active policy, with the shape of z_t.

        Arguments:
            z_t: The latents, with shape (B, C, H, W).
            t: Their level, a number or a tensor with shape () or (B,).
            cond: Their prompts' conditions.
        """
        return self.generator.velocity(z_t, levels(t, z_t), cond, self.guidance_scale)

    def walk(self, z: Tensor, cond: Any, first: int, last: int) -> Tensor:
        """Returns the latents at σ_last from those at σ_first, by Euler steps, with or without gradients."""
        for k in range(first, last):
            dt = float(self.sigmas[k + 1] - self.sigmas[k])
            z = z + dt * self.velocity(z, self.sigmas[k], cond)
        return z

    def score(self, rows: Rows, z: Tensor, tau: Tensor | float, name: str = "reward") -> Tensor:
        """Returns the values of latents with shape (B,), differentiable in z, and notes them and their terms.

        Arguments:
            rows: The images.
            z: Their latents, with shape (B, C, H, W).
            tau: Their level.
            name: What it is called in logs.
        """
        return self.scored(rows, z, tau, name).value

    def scored(self, rows: Rows, z: Tensor, tau: Tensor | float, name: str = "reward") -> Scored:
        """Returns what `score` does, with the terms of a sum."""
        with self.stage("value"):
            scored = self._built.score(rows, z, tau)
        self.note(name, scored.value)
        for kind, terms in (("", scored.terms), ("_normalised", scored.normalised)):
            for term, x in terms.items():
                self.note(f"{name}{kind}/{term}", x)
        return scored

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Returns a context whose seconds are counted to a stage; stages do not overlap."""
        return self.stages(name)

    def note(self, name: str, x: Tensor) -> None:
        """Logs the mean of x over the images of the update, as "train/NAME"."""
        self._notes[name].append(x.detach().flatten().float().to(self.device))

    # -- building ------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Checks settings before anything is loaded.

        Raises:
            ValueError: If they do not go together, or with the Trainer's.
        """
        checks.check_trainer(self.trainer)
        self.check()
        warnings.filterwarnings("ignore", message=".*ModelCheckpoint with manual optimization.*")

    def configure_model(self) -> None:
        """Builds the networks once; prompts, if they are few, are encoded before the value's networks are there."""
        if self.parts is not None:
            return
        device = self.device if self._trainer is None else self.trainer.strategy.root_device
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        self.parts = AlignmentParts.build(self, device, mesh, prompts_of(self._trainer))
        self.stages = Stages(device)
        self.trained.extend(self.parts.policy.parameters().values())
        self.mark = sharded_mark(mesh)
        self.check_parts()

    @property
    def _built(self) -> AlignmentParts:
        assert self.parts is not None, "configure_model has not been called"
        return self.parts

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a linear warm-up."""
        optimizer = torch.optim.AdamW(
            list(self.trained), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )
        return {"optimizer": optimizer, "lr_scheduler": rates(optimizer, self.warmup_steps)}

    def on_fit_start(self) -> None:
        """Encodes prompts of other data than the networks were built for."""
        self._built.encode_new(prompts_of(self.trainer), self.prompts_ahead)

    # -- an update -------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Makes one update from this device's share of its prompts."""
        self.spent.start()
        rows = Rows.of(batch, self.group_size, self.seed, self.update, self.device)
        self._notes.clear()
        with out_of_memory_says(partial(checks.what_to_lower, self)):
            loss, norm = self._train(rows)
        means = {name: torch.cat(parts).mean() for name, parts in self._notes.items()}
        means |= {"loss": loss, "grad_norm": norm}  # of the last step
        report(self, means, len(rows))
        checks.check_skipped(self, norm)

    def _train(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Makes the update's steps; returns loss and norm of the gradient of the last one."""
        rolled = self.rollout(rows)
        loss = torch.zeros((), device=self.device)
        for part in chain(self.micro_steps(rows, rolled), [None]):
            with self.stage("update"):
                if part is None:
                    norm, mean = self._step(loss), loss
                    loss = torch.zeros_like(loss)
                else:  # not manual_backward: nothing is exchanged before all are summed up
                    part.backward()
                    loss += part.detach()
        return mean, norm

    def _step(self, loss: Tensor) -> Tensor:
        """Averages gradients over ranks and makes the step, unless something is not finite; returns their norm."""
        weights = list(self.trained)
        loss.copy_(average_gradients(weights, loss))
        norm = gradient_norm(weights)
        optimizer: Any = self.optimizers()
        finite = bool(norm.isfinite() & loss.isfinite())
        with uninterrupted():  # a checkpoint that an interrupt leaves is of before or after it
            if finite:
                if self.clip is not None:
                    clip_gradients(weights, norm, self.clip)
                optimizer.step()
                self.lr_schedulers().step()
                self.skipped_in_a_row = 0
                step = self.trainer.global_step
                self.policy.update_ema(ema_decay(step, self.ema_limit))
                self.after_step(step)
            else:
                self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            optimizer.zero_grad(set_to_none=True)
        return norm

    # -- what a user sees and keeps --------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Samples held-out prompts with the averaged policy and scores them."""
        # weights and conditions must not become inference tensors, whatever the Trainer's mode
        with torch.inference_mode(False), torch.no_grad(), self.policy.use("ema"):
            self._built.held_out.add(batch, first=batch_idx == 0)

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all prompts, and draws the first of them."""
        log_evaluation(self, *self._built.held_out.finish())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the policy with its copies, counters, and what the method keeps."""
        super().on_save_checkpoint(checkpoint)
        save_alignment(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them up. Raises ValueError if they are of another method or policy, naming what differs."""
        load_alignment(self, checkpoint)

    def on_train_end(self) -> None:
        """Leaves the averaged policy in the run's folder: LoRA weights in `lora/`, or all in `full/transformer/`."""
        if not self.trainer.fast_dev_run and hasattr(self.policy.transformer, "save_pretrained"):
            name = "lora" if isinstance(self.policy, PolicyAdapters) else "full"
            folder = self.export(Path(self.trainer.default_root_dir) / name, overwrite=True)
            rank_zero_info(f"{name} weights saved to {folder}")

    def export(self, folder: str | Path, name: str = "ema", overwrite: bool = False) -> Path:
        """Writes a set of weights for pipelines (see `adapters.export`, `export_full`), over others if told so."""
        return export_policy(self, folder, name, overwrite)
