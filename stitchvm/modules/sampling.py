"""`stitchvm predict`: samples of prompts by any sampler with any value, written as they come.

    prompt i, seed s → sampler(generator, value) → image → clean rewards → images/NNNNNN_sS.png, a line of samples.jsonl

**Seeds.** Sample s of prompt i has random streams of its own, keyed by (seed + s, i): it does not depend on batch size,
order or number of devices, up to the rounding of batched kernels. A line's `stream` is what a sampler is given in
Python: `sampler(generator, [prompt], value, seeds=[stream])`.

**Interruption.** Whatever ends a run, finished samples stay, and the same command makes the others. A batch of which
some samples are missing is run again whole, so that they come out to the last bit as in a run without interruption (if
batch size and devices are the same).

**What is measured.** Rewards are scored on the 8-bit images as they were written. Seconds and peak memory are of
sampling and decoding a batch, without loading and scoring; on a GPU, rewards that no step looks through wait in CPU
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from stitchvm.generator import Generator
from stitchvm.interruption import stop_on_sigterm
from stitchvm.modules.judges import check_prompts
from stitchvm.modules.meter import Meter, out_of_memory_says
from stitchvm.modules.sample_lines import decode, sample_stream, trajectories
from stitchvm.modules.sample_store import Line, SampleStore
from stitchvm.modules.sampling_bar import SamplingBar
from stitchvm.modules.sampling_config import changed_files, configuration, measured, weights
from stitchvm.modules.sampling_parts import SamplingParts, terminal_terms
from stitchvm.modules.sampling_report import report
from stitchvm.rewards.base import Reward
from stitchvm.samplers.base import Record, Sampler, Samples
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.parts import ValueFactory
from stitchvm.values.terminal import TerminalFactory

ENCODED_AHEAD = 1024  # so many prompts' conditions are kept in memory, 3 MB each for SD 3.5
LOADING = (
    "out of memory while loading generator, value and rewards: load them in bfloat16 (dtype), leave out model.rewards "
    "(`stitchvm test` scores the folder afterwards), or take a device with more memory."
)


class Sampling(LightningModule):
    """Samples the prompts of a data module; only predicts.

    Arguments:
        sampler: How to sample.
        generator: Builds the generator.
        value: The value that steers, if the sampler asks one.
        final_value: The value by which the sample is chosen from several particles; by default the terminal reward,
            that of `reward` on the decoded image.
        reward: Builds the reward of `value` and `final_value`; by default a stitched value's own.
        rewards: Builds the clean rewards that every image is scored with, by name. One that is described as `reward`
            is loaded once with it.
        checker: Whether the embedded world's exact checker reads the images; prompts must be its captions.
        samples_per_prompt: The number of samples of every prompt.
        height: The height in pixels; the model's own size by default.
        width: The width in pixels.
        seed: Seeds the first sample of every prompt; seed + 1 the second, ….
        save_particles: Whether all particles are written beside the chosen one.
        overwrite: Whether samples of another configuration in the run's folder may be deleted.

    Attributes:
        run_config: The run's configuration as YAML, set by the command line.
        records: The records of summary.json, after sampling.

    Raises:
        ValueError: If a number is out of its range, or the sampler lacks a value.
    """

    run_config: str | None = None

    def __init__(
        self,
        sampler: Sampler,
        generator: Callable[[], Generator],
        value: ValueFactory | None = None,
        final_value: ValueFactory | None = None,
        reward: Callable[[], Reward] | None = None,
        rewards: dict[str, Callable[[], Reward]] | None = None,
        checker: bool = False,
        samples_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        save_particles: bool = False,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        if samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt = {samples_per_prompt}: expected at least 1.")
        sides = [side for side in (height, width) if side is not None]
        if len(sides) == 1 or min(sides, default=1) < 1:
            raise ValueError(
                f"height = {height}, width = {width}: expected two numbers of pixels, or neither for the model's size."
            )
        if sampler.wants_value and value is None:
            raise ValueError(
                f"{type(sampler).__name__} asks a value, but none is configured: give model.value, such as "
                "stitchvm.values.stitched.StitchedFactory, or take stitchvm.samplers.plain.PlainSampler."
            )
        if sampler.wants_value and not sampler.clean_only and (ends := terminal_terms(value)):
            raise ValueError(
                f"{type(sampler).__name__} asks the value at every noise level, but {' and '.join(ends)} is the "
                "terminal reward, defined at t = 0 only: take a stitched, Tweedie or Monte Carlo value there."
            )
        if sampler.particles > 1 and not (value or final_value or reward):
            raise ValueError(
                f"{type(sampler).__name__} chooses among {sampler.particles} particles, but by what? Give model.reward "
                "(the terminal reward chooses), or model.final_value."
            )
        self.sampler, self.generator_factory = sampler, generator
        self.value_factory, self.reward_factory = value, reward
        several = sampler.particles > 1
        self.final_factory = final_value or (TerminalFactory() if several else None)
        self.reward_factories = dict(rewards or {})
        self.checker, self.samples_per_prompt, self.seed = checker, samples_per_prompt, seed
        self.size = None if height is None or width is None else (height, width)
        self.save_particles, self.overwrite = save_particles, overwrite
        self.parts: SamplingParts | None = None
        self.bar: SamplingBar | None = None
        self.records: list[dict[str, Any]] = []

    @property
    def folder(self) -> Path:
        """The run's folder: the trainer's default_root_dir."""
        return Path(self.trainer.default_root_dir)

    @property
    def dataset(self) -> Any:
        """The prompts, by index; None if the loader does not tell."""
        return getattr(self.trainer.predict_dataloaders, "dataset", None)

    def configure_callbacks(self) -> list[Callback]:
        """Replaces the progress bar by one that counts samples."""
        others = [c for c in self.trainer.callbacks if not isinstance(c, ProgressBar)]
        if len(others) == len(self.trainer.callbacks):
            return []
        self.trainer.callbacks = others
        self.bar = SamplingBar()
        return [self.bar]

    # Before sampling.

    def setup(self, stage: str) -> None:
        """Reads what is there, before anything is loaded; changes nothing.

        Raises:
            FileExistsError: If the folder holds samples of another configuration.
            FileNotFoundError: If a value model is not there.
            ValueError: If another loop than predict is asked for.
        """
        if stage != "predict":
            raise ValueError(f"Sampling only predicts: run `stitchvm predict`, not {stage}.")
        for factory in (self.value_factory, self.final_factory):
            for name, path in {} if factory is None else factory.sources().items():
                if name.rpartition(".")[2] == "value_model":
                    StitchedValueModel.read(path)  # else said after gigabytes were loaded
        self.store = SampleStore(self.folder)
        self.done = self.store.read()
        self.identity = configuration(self)
        self.erases = False
        self._accept(self.store.check(self.identity))

    def on_predict_start(self) -> None:
        """Builds what is needed, checks it against the samples that are there, and opens the folder."""
        stop_on_sigterm()  # the Trainer restores the handler before it when it ends
        # weights and gradients must not be inference tensors, whatever the Trainer's mode
        with torch.inference_mode(False), torch.no_grad():
            self._begin()

    def _accept(self, differing: Sequence[str]) -> None:
        """Raises FileExistsError if samples of another configuration are there and may not be deleted."""
        if not differing:
            return
        if not self.overwrite:
            raise FileExistsError(
                f"{self.folder} holds {len(self.done)} samples of another configuration ("
                f"{'; '.join([*differing[:6], *['…'][: len(differing) > 6]])}): choose another folder with "
                "--trainer.default_root_dir, or delete them with --model.overwrite true."
            )
        self.erases, self.done = True, {}

    def _begin(self) -> None:
        self._accept(self._changed_prompts())
        left, found = self._left(everywhere=True), {}
        if left == [] and self.done:  # nothing would be loaded, and so nothing hashed
            self._accept(changed_files(self))
            left = self._left(everywhere=True)
        if left is None or left:
            if self.checker and left:
                check_prompts(self.dataset[i]["prompt"] for i, _ in left)
            self._build()
            found = {"weights": weights(self), "measured": measured(self)}
            self._accept(self.store.check(found["weights"], "weights"))
            self._build().release()  # what is hashed is what was loaded
        self.trainer.strategy.barrier("checked")
        if self.trainer.is_global_zero:
            if self.erases:
                self.store.erase()
            self.store.prepare(config=self.identity, **found)
        self.trainer.strategy.barrier("prepared")
        for notice in self.store.notices:
            rank_zero_info(notice)
        if self.done:
            rank_zero_info(f"{len(self.done)} samples are there already and are kept")
        mine = self._left()
        if mine is not None and self.parts is not None:
            self._prepare_prompts([self.dataset[i]["prompt"] for i in self._run_again(mine)])
        self.meter = Meter(self.device)
        self.store.open(self.global_rank, self.trainer.world_size)
        if self.bar is not None:
            self.bar.begin(None if mine is None else len(mine))

    def _build(self) -> SamplingParts:
        """Returns the networks, built when first asked for."""
        if self.parts is None:
            with out_of_memory_says(lambda: LOADING):
                self.parts = SamplingParts.build(self)
        return self.parts

    def _left(self, everywhere: bool = False) -> list[tuple[int, int]] | None:
        """Returns (index, seed) of what this process, or any, has still to sample; None if the loader does not tell."""
        batches = self._batches()
        if self.dataset is None or batches is None:
            return None
        if everywhere:
            indices: list[int] = list(range(len(self.dataset)))
        else:
            indices = [i for batch in batches for i in batch]
        seeds = range(self.seed, self.seed + self.samples_per_prompt)
        return [(i, s) for i in dict.fromkeys(indices) for s in seeds if (i, s) not in self.done]

    def _batches(self) -> list[list[int]] | None:
        """Returns the indices of this process's batches; None if the loader does not tell."""
        batches = getattr(self.trainer.predict_dataloaders, "batch_sampler", None)
        if batches is None:
            return None
        (most,) = self.trainer.num_predict_batches
        return [list(batch) for k, batch in enumerate(batches) if k < most]

    def _run_again(self, left: Sequence[tuple[int, int]]) -> list[int]:
        """Returns the indices of all batches of which a sample is left."""
        missing = {i for i, _ in left}
        batches = [batch for batch in self._batches() or () if missing.intersection(batch)]
        return [i for batch in batches for i in batch]

    def _changed_prompts(self) -> list[str]:
        """Returns which prompts are not those of the finished samples."""
        if self.dataset is None:
            return []
        there = {i: line["prompt"] for (i, _), line in self.done.items() if i < len(self.dataset)}
        now = {i: self.dataset[i]["prompt"] for i in there}
        return [f"prompt {i}: {there[i]!r} → {now[i]!r}" for i in there if there[i] != now[i]]

    def _prepare_prompts(self, prompts: Sequence[str]) -> None:
        assert self.parts is not None
        if prompts and len(set(prompts)) <= ENCODED_AHEAD:
            self.parts.generator.encode_ahead(prompts)

    # Sampling.

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Line]:
        """Samples a batch of prompts, each as many times as asked for, and returns the lines of samples.jsonl."""
        with torch.inference_mode(False), torch.no_grad():
            seeds = range(self.seed, self.seed + self.samples_per_prompt)
            return [line for seed in seeds for line in self._sample(batch, seed)]

    def _sample(self, batch: dict[str, Any], seed: int) -> list[Line]:
        """Samples a batch of prompts with one seed; finished ones are not written again."""
        index, prompts = batch["index"].tolist(), list(batch["prompt"])
        if any((i, seed) not in self.done for i in index):
            streams = [sample_stream(seed, i) for i in index]
            parts = self._build()
            self.meter.start()
            with out_of_memory_says(lambda: self._what_to_lower(parts, len(prompts))):
                for prompt in dict.fromkeys(prompts):  # one at a time, as `encode_ahead` does
                    parts.generator.encode_prompts([prompt])
                samples = self.sampler(
                    parts.generator,
                    prompts,
                    parts.value,
                    seeds=streams,
                    latent_size=parts.latent_size,
                    final_value=parts.final_value,
                    on_step=self._on_step,
                )
                pixels = self._decode(samples.latents, prompts)
                self.meter.stop()
                self._keep(batch, seed, streams, samples, pixels)
        return [self.done[i, seed] for i in index]

    def _on_step(self, record: Record) -> None:
        if self.bar is not None:
            self.bar.step(record.step, self.sampler.num_steps)

    def _keep(
        self,
        batch: dict[str, Any],
        seed: int,
        streams: Sequence[int],
        samples: Samples,
        pixels: Tensor,
    ) -> None:
        """Scores images and writes those that are not there yet."""
        index, prompts = batch["index"].tolist(), list(batch["prompt"])
        assert self.parts is not None
        verdicts, paths = self.parts.judges(pixels, prompts), trajectories(samples)
        for row, i in enumerate(index):
            if (i, seed) in self.done:
                continue
            name = f"{i:06d}_s{seed}"
            line: Line = {"index": i, "prompt": prompts[row], "seed": seed, "stream": streams[row]}
            if "metadata" in batch:
                line["metadata"] = batch["metadata"][row]
            if self.save_particles:
                line["particles"] = self._save_particles(name, samples, row, prompts[row])
            line["file"] = self.store.save_image(name, pixels[row].permute(1, 2, 0).numpy())
            line |= verdicts[row] | paths[row]
            line |= {
                "calls": {kind: rows / len(index) for kind, rows in samples.calls.items()},
                "seconds": self.meter.seconds / len(index),
                "cpu_seconds": self.meter.cpu_seconds / len(index),
                "peak_memory_gib": self.meter.peak_gib,
                "peak_memory_of": self.meter.memory,
                "batch": len(index),
            }
            self.store.append(line)
            self.done[i, seed] = line
            if self.bar is not None:
                self.bar.add(line)

    def _save_particles(
        self, name: str, samples: Samples, row: int, prompt: str
    ) -> list[dict[str, Any]]:
        particles, kept = samples.particles[row], []
        pixels = self._decode(particles, [prompt] * len(particles))
        for n, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            value = None if samples.final_values is None else float(samples.final_values[row, n])
            file = self.store.save_image(f"{name}_p{n}", image)
            kept.append({"file": file, "final_value": value})
        return kept

    def _decode(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        assert self.parts is not None
        return decode(self.parts.generator.vae, latents, prompts, self.sampler.micro_batch)

    # The end.

    def on_predict_end(self) -> None:
        """Merges the files of all devices; the first one draws, summarises and prints."""
        self.store.close()
        self.trainer.strategy.barrier("sampled")
        if self.trainer.is_global_zero:
            lines = self.store.merge()
            if lines:
                self.records = report(self, lines)
        self.trainer.strategy.barrier("merged")

    def teardown(self, stage: str) -> None:
        """Sees to it that no run ends without a sample: Lightning skips an empty set in silence.

        Raises:
            ValueError: If there is no sample.
        """
        if stage == "predict" and self.trainer.is_global_zero and not self.records:
            raise ValueError(
                "nothing was sampled: there are no prompts, or trainer.limit_predict_batches is 0. Check the data "
                "module."
            )

    def how_to_go_on(self) -> str:
        """Returns what is kept, and what to do, when a run was interrupted."""
        kept = len(SampleStore(self.folder).read())
        return f"{kept} finished samples are kept in {self.folder}: the same command goes on from there."

    def _what_to_lower(self, parts: SamplingParts, prompts: int) -> str:
        rows = prompts * self.sampler.particles * getattr(self.sampler, "proposals", 1)
        height, width = parts.image_size
        micro = self.sampler.micro_batch
        return (
            f"out of memory with {prompts} prompts, {rows} rows of latents, at {height} x {width} pixels. Lower "
            f"model.sampler.micro_batch (now {f'null: all {rows}' if micro is None else micro} rows in a network "
            f"call), then data.batch_size (now {prompts}), then model.height and model.width. {self.how_to_go_on()}"
        )
