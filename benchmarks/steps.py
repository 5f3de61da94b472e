"""The training step of stage 2 as a Trainer would take it, in parts that can be timed and counted."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Laps, autocast, clock, instrumented, peak_memory, reset_memory, seconds_of
from setups import Setup, factories
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stitchvm.compilation import compile_forward
from stitchvm.data.base import Batch, to_float
from stitchvm.modules import distillation
from stitchvm.modules.distillation import StitchDistillation
from stitchvm.value_model import StitchedValueModel

__all__ = ["PARTS", "Run", "Variant", "meta_tensors", "reading_rate", "variants"]

PARTS = ("transfer", "vae", "teacher", "prefix", "student", "backward", "optimiser", "other")


@dataclass(frozen=True)
class Variant:
    """One way of training: what changes the speed."""

    batch_size: int
    noise_levels: int = 1
    cached: bool = False
    compile: bool = False

    @property
    def name(self) -> str:
        """Its name in tables."""
        words = [f"batch {self.batch_size}", f"K = {self.noise_levels}"]
        return ", ".join(words + ["cached latents"] * self.cached + ["compiled"] * self.compile)


def variants(setup: Setup, compiled: bool) -> list[Variant]:
    """Returns the shipped configuration first, then one change at a time, then all of them; compiled ones last."""
    B, K = setup.batch_size, setup.noise_levels
    chosen = [Variant(B, K), *(Variant(B, k) for k in (1, 2, 4)), Variant(B, K, cached=True)]
    chosen += [Variant(B // 2, K), Variant(2 * B, K), Variant(B, 4, cached=True)]
    if compiled:
        chosen += [Variant(B, K, compile=True), Variant(B, 4, cached=True, compile=True)]
    return list(dict.fromkeys(chosen))


class Run:
    """A module with its optimiser and one micro-batch of bytes, as a Trainer would hold them."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = setup, device
        self.module = StitchDistillation(
            *factories(setup, device),
            stitch_point=list(setup.stitch_point),
            fused=device.type != "meta",
        )
        # nothing is saved, and random networks have no place to be loaded from again
        with mock.patch.object(StitchedValueModel, "config", lambda _: {}):
            self.module.configure_model()
        self.module.to(device)
        self.optimizer: torch.optim.Optimizer = self.module.configure_optimizers()["optimizer"]
        self.step_number = 0

    def batch(self, variant: Variant) -> Batch:
        """Returns a micro-batch as the workers deliver it."""
        B, side = variant.batch_size, self.setup.resolution
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8, generator=generator)
        batch: Batch = {"index": torch.arange(B), "pixels": pixels, "epoch": 0}
        if variant.cached:
            batch["latents"] = torch.randn(B, *self.latent_shape(), generator=generator).bfloat16()
        if self.device.type == "cuda":
            batch = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
        return batch

    def latent_shape(self) -> tuple[int, int, int]:
        """Returns (C, h, w) of a latent."""
        side = self.setup.resolution // self.module.vae.factor
        return self.module.vae.latent_channels, side, side

    def step(self, batch: Batch, laps: Laps | None = None) -> None:
        """One micro-batch: forward, backward, and the optimiser when it is its turn."""
        on_device = {
            k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in batch.items()
        }
        on_device = to_float(on_device)
        if laps:
            laps.lap("transfer")
        with autocast(self.device):
            loss = self.module.training_step(on_device, 0)
        if laps:
            laps.lap("other")
        (loss / self.setup.accumulate).backward()
        if laps:
            laps.lap("backward")
        self.step_number += 1
        if self.step_number % self.setup.accumulate == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if laps:
            laps.lap("optimiser")

    def rate(self, variant: Variant, steps: int) -> tuple[float, float]:
        """Returns seconds per micro-batch (optimiser included) and the peak memory in GiB."""
        batch, period = self.batch(variant), self.setup.accumulate
        self.module.noise_levels = variant.noise_levels
        if variant.compile:
            compile_networks(self.module)
        reset_memory(self.device)

        def cycle() -> None:
            for _ in range(period):
                self.step(batch)

        seconds = seconds_of(cycle, self.device, repeats=max(1, steps // period)) / period
        return seconds, peak_memory(self.device)

    def split(self, variant: Variant, steps: int) -> dict[str, float]:
        """Returns seconds per micro-batch of each part."""
        batch, period = self.batch(variant), self.setup.accumulate
        self.module.noise_levels = variant.noise_levels
        steps = max(period, steps // period * period)
        for _ in range(period):
            self.step(batch)
        laps = Laps.of_seconds(self.device)
        with instrumented(self.module, laps):
            for _ in range(steps):
                self.step(batch, laps)
        return {name: laps.sums.get(name, 0.0) / steps for name in PARTS}

    def flops(self, noise_levels: int) -> dict[str, float]:
        """Returns the FLOPs per image of each part, counted on the calls (2 per multiply-add)."""
        side = self.setup.resolution
        t = torch.full((1, noise_levels), 0.5, device=self.device)
        batch = {
            "index": torch.zeros(1, dtype=torch.int64),
            "pixels": torch.rand(1, 3, side, side, device=self.device),
        }
        # the counter passes over the fused attention of a CPU in some releases of torch
        with FlopCounterMode(display=False) as counter, _counted_attention(self.device):
            laps = Laps.of_flops(counter)
            with instrumented(self.module, laps), autocast(self.device):
                loss = self.module.losses(batch, t, epoch=0)["loss"].mean()
            laps.lap("other")
            loss.backward()
            laps.lap("backward")
        self.optimizer.zero_grad()
        return {name: laps.sums.get(name, 0.0) for name in PARTS}

    def analytic_flops(self, noise_levels: int) -> dict[str, int]:
        """Returns the FLOPs per image that the parts say of themselves."""
        model, (_, h, w) = self.module.value_model, self.latent_shape()
        assert model is not None
        grid = (h // model.backbone.patch, w // model.backbone.patch)
        return {
            "teacher": self.module.teacher.flops(),
            "prefix": noise_levels * model.backbone.flops((h, w), model.i),
            "student": noise_levels * (model.stitch.flops(grid) + model.tail.flops()),
        }


def meta_tensors() -> ExitStack:
    """Returns a context in which losses run on the meta device, which has neither autocast nor generators."""

    def normal(keys: Sequence[Any], shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.randn(len(keys), *shape, device=device)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: ExitStack()))
    stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *_: False))
    stack.enter_context(mock.patch.object(distillation, "keyed_normal", normal))
    return stack


def compile_networks(module: StitchDistillation) -> None:
    """What `compile: true` does; all that is measured afterwards is compiled."""
    assert module.value_model is not None
    compile_forward(module.repeated(module.value_model))


def reading_rate(setup: Setup, batch_size: int, workers: int) -> float:
    """Returns images/s of the data module's training loader: reading, decoding, resizing, collating."""
    with tempfile.TemporaryDirectory() as folder:
        data = setup.data(Path(folder), batch_size, workers)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.as_float = False  # as under a Trainer: bytes become floats on the device
        batches = itertools.chain.from_iterable(loader for _ in itertools.count())
        next(batches)  # starts the workers
        now = time.perf_counter if workers else clock(torch.device("cpu"))
        start, images = now(), 0
        while images < 2 * batch_size or now() - start < 2:
            images += len(next(batches)["pixels"])
        return images / (now() - start)


def _counted_attention(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context in which attention runs where a FLOP counter sees it."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
