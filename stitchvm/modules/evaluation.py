"""`stitchvm test`: how good values are, by noise level, for several estimators in one pass over the data.

    image → VAE latent z_0 (once) → z_t = (1 − σ) z_0 + σ ε (the same for every estimator) → embedding → metric

The noise of a sample depends on the seed, its index and σ only: not on batch size, order or number of devices.
The clean reward on the image itself is measured beside the estimators (Table 5, Figure 2). With a generator
and `truth_images` > 0, the values are also compared with Monte Carlo truth E[r(z_0) | z_t] on a part of the
images (their prompt: the first caption, or the prompt), and with `clean`, their ranking with the clean reward's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import normalize

from stitchvm.generator import Generator
from stitchvm.modules.board import Board, Key
from stitchvm.modules.report import report
from stitchvm.modules.sampling_parts import check_latent_space
from stitchvm.modules.tasks import TASKS, Task, Texts
from stitchvm.path import FlowPath
from stitchvm.randomness import keyed_generator, keyed_normal
from stitchvm.results import check_free
from stitchvm.rewards.base import Reward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.spec import spec_of
from stitchvm.vae import VAE
from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.values.parts import Parts, ValueFactory

SIGMAS = (0.1, 0.25, 0.5, 0.75, 0.9)
Scorer = Callable[[Tensor, Tensor | None], Tensor]


class ValueEvaluation(LightningModule):
    """Measures values on a retrieval, preference or aesthetic data module; only tests.

    Arguments:
        estimators: The values by name; "stitched", "vae_stitch", "tweedie" and "monte_carlo" have
            their own colours in plots.
        reward: Builds the clean reward; by default the one of the first stitched value.
        generator: Builds the generator, if an estimator or the truth needs one.
        vae: Builds the VAE; by default the generator's.
        sigmas: The noise levels σ = t in (0, 1]; the paper's five by default.
        clean: Whether to measure the clean reward too.
        overwrite: Whether results in the run's folder may be replaced.
        task: "retrieval", "preference" or "aesthetic"; by default the data module's.
        seed: Seeds noise and roll-outs.
        truth_images: The number of images that Monte Carlo truth is computed for, evenly spread (all if there are
            fewer); 0 for none.
        truth_rollouts: The roll-outs per image and noise level of the truth, an even number.
        truth_steps: The steps of each.
        truth_batch_size: The roll-outs that are sampled and decoded at a time; lower it when memory runs out.
        plot: Whether to draw the plot of Figure 2.
        write_cards: Whether to put the measured table into the model card of every value model that was tested
            from a local folder.

    Attributes:
        run_config: The run's configuration as YAML, set by the command line, for metrics.json.
        records: The records, after a test.

    Raises:
        ValueError: If there is nothing to measure, or a number is out of its range.
    """

    run_config: str | None = None

    def __init__(
        self,
        estimators: dict[str, ValueFactory],
        reward: Callable[[], Reward] | None = None,
        generator: Callable[[], Generator] | None = None,
        vae: Callable[[], VAE] | None = None,
        sigmas: list[float] | None = None,
        clean: bool = True,
        overwrite: bool = False,
        task: str | None = None,
        seed: int = 0,
        truth_images: int = 0,
        truth_rollouts: int = 64,
        truth_steps: int = 20,
        truth_batch_size: int = 256,
        plot: bool = True,
        write_cards: bool = True,
    ) -> None:
        super().__init__()
        # floats, since their text keys the noise
        self.sigmas = tuple(map(float, SIGMAS if sigmas is None else sigmas))
        if not all(0 < sigma <= 1 for sigma in self.sigmas) or len(set(self.sigmas)) < len(
            self.sigmas
        ):
            raise ValueError(
                f"sigmas = {list(self.sigmas)}: expected distinct noise levels in (0, 1]; the clean reward "
                "is measured by `clean`."
            )
        if not clean and not (estimators and self.sigmas):
            raise ValueError("there is nothing to measure: give estimators, or set clean to true.")
        if "clean" in estimators:
            raise ValueError('"clean" names the clean reward: give the estimator another name.')
        for name, what in (("truth", "Monte Carlo truth"), ("noise", "what makes z_t")):
            if name in estimators:  # its roll-outs would have the same random numbers
                raise ValueError(f'"{name}" names {what}: give the estimator another name.')
        if truth_images < 0:
            raise ValueError(f"truth_images = {truth_images}: expected at least 0.")
        if truth_images and (truth_rollouts < 2 or truth_rollouts % 2):
            raise ValueError(
                f"truth_rollouts = {truth_rollouts}: expected an even number, at least 2."
            )
        if truth_images and min(truth_steps, truth_batch_size) < 1:
            raise ValueError(
                f"truth_steps = {truth_steps}, truth_batch_size = {truth_batch_size}: expected at least 1."
            )
        if truth_images and generator is None:
            raise ValueError(
                "Monte Carlo truth needs roll-outs: give a generator, or truth_images: 0."
            )
        self.factories = dict(estimators)
        self.part_factories = (reward, generator, vae)
        self.clean, self.plot, self.seed = clean, plot, seed
        self.overwrite, self.task_name, self.write_cards = overwrite, task, write_cards
        self.truth_images, self.truth_rollouts = truth_images, truth_rollouts
        self.truth_steps, self.truth_batch_size = truth_steps, truth_batch_size
        self.parts: Parts | None = None
        self.records: list[dict[str, Any]] = []

    def setup(self, stage: str) -> None:
        """Checks what can be checked before anything is loaded.

        Raises:
            FileExistsError: If the output folder already holds results.
            ValueError: If the task is unknown, or another loop than test is asked for.
        """
        if stage != "test":
            raise ValueError(
                f"an evaluation only tests, but the stage is {stage!r}: run `stitchvm test`."
            )
        check_free(
            self.folder / "metrics.json",
            overwrite=self.overwrite,
            remedy="choose another folder with --trainer.default_root_dir, or set --model.overwrite=true.",
        )
        name = self.task_name or getattr(self.datamodule, "task", None)
        if name not in TASKS:
            raise ValueError(
                f"the task is {name!r}: expected one of {sorted(TASKS)}, from the data module or from "
                "--model.task."
            )
        self.task: Task = TASKS[name]()

    @property
    def datamodule(self) -> Any:
        """The data module that is tested on, or None."""
        return getattr(self.trainer, "datamodule", None)

    @property
    def folder(self) -> Path:
        """The run's folder, where metrics.json and the plot go: the trainer's default_root_dir."""
        return Path(self.trainer.default_root_dir)

    def configure_model(self) -> None:
        """Builds estimators and parts, once.

        Raises:
            ValueError: If the reward cannot do what the task asks of it, or estimators are of other rewards or latents.
        """
        if self.parts is not None:
            return
        parts = Parts(*self.part_factories)
        self.values = {name: factory(parts) for name, factory in self.factories.items()}
        self.reward = parts.reward
        self.task.check_reward(self.reward)
        for name, value in self.values.items():
            if not same_reward(value.reward, self.reward):
                raise ValueError(
                    f"the estimator {name!r} values {value.reward.id}, but the reward of this evaluation is "
                    f"{self.reward.id}: one evaluation measures one reward. Give `reward` as the estimator has it, or "
                    "an evaluation of its own to each."
                )
        self.vae = parts.vae if self.values else None
        for value in self.values.values():
            check_latent_space(value, self.vae)
        self.truth: MonteCarloValue | None = None
        if self.truth_images:
            self.truth = MonteCarloValue(
                parts.generator,
                self.reward,
                rollouts=self.truth_rollouts,
                steps=self.truth_steps,
                batch_size=self.truth_batch_size,
            )
        self.parts = parts
        # a list registers them, so that they move with this module; shared parts may occur twice
        modules = [*self.values.values(), self.reward, self.vae, self.truth]
        self.registered = nn.ModuleList([m for m in modules if isinstance(m, nn.Module)])

    def on_test_start(self) -> None:
        """Prepares a board for every benchmark, and notes its size, over which the truth's images are spread.

        Raises:
            ValueError: If there are no data.
        """
        loaders = self.trainer.test_dataloaders
        loaders = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
        names = getattr(self.datamodule, "benchmarks", None) or [None] * len(loaders)
        keys: list[Key] = [("clean", None)] if self.clean else []
        keys += [(name, sigma) for name in self.values for sigma in self.sigmas]
        self.boards: list[Board] = []
        self.sizes: list[int] = []
        for name, loader in zip(names, loaders, strict=True):
            size = len(getattr(loader, "dataset", loader))
            if size == 0:
                raise ValueError(
                    "the test set is empty: check the data module's folder and split."
                )
            board = Board(self.task, keys, truth=self.truth is not None, benchmark=name)
            self.boards.append(board.to(self.device))
            self.sizes.append(size)
        self.seconds = dict.fromkeys(self.factories, 0.0)
        self.calls = dict.fromkeys(self.factories, 0)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the metrics of every estimator and noise level."""
        self.task.check(batch, self.reward)
        board, size = self.boards[dataloader_idx], self.sizes[dataloader_idx]
        texts = self.task.texts(batch, self.reward, self._encode_text)
        reference = None
        if self.clean:
            image = normalize(self.reward.embed(_pixels(batch)).image.float(), dim=-1)
            reference = self._score("clean", self.reward.score, image, texts)
            board.add(("clean", None), image, reference, texts, batch)
        if self.vae is None:
            return
        z_0 = batch["latents"] if "latents" in batch else self.vae.encode(_pixels(batch))
        for sigma in self.sigmas:
            z_t, t = self._noised(z_0, sigma, batch["index"])
            truth = self._truth(z_t, t, sigma, texts, batch["index"], size)
            for name in self.values:
                image, scorer = self._embed(name, z_t, t, sigma, texts, batch["index"])
                score = self._score(name, scorer, image, texts)
                board.add((name, sigma), image, score, texts, batch, reference, truth)

    def on_test_epoch_end(self) -> None:
        """Gathers the metrics of all devices; the first one writes, prints and draws."""
        self.records = [record for board in self.boards for record in board.records()]
        if self.trainer.is_global_zero:
            report(self)

    def teardown(self, stage: str) -> None:
        """Sees to it that no evaluation ends without a result: Lightning skips an empty test in silence.

        Raises:
            ValueError: If nothing was measured.
        """
        if stage == "test" and not self.records:
            raise ValueError(
                "nothing was measured: the test set is empty, or trainer.limit_test_batches is 0. Check the "
                "data module's folder and split."
            )

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Returns unit text embeddings (M, E); each distinct text is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        text = normalize(self.reward.encode_text(distinct).float(), dim=-1)
        return text[[place[prompt] for prompt in prompts]]

    def _noised(self, z_0: Tensor, sigma: float, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z_t, in float32 or better, and t."""
        z_0 = z_0.to(torch.promote_types(z_0.dtype, torch.float32))
        # drawn on the CPU: the same for every kind of device
        keys = [(self.seed, "noise", i, str(sigma)) for i in index.tolist()]
        eps = keyed_normal(keys, z_0.shape[1:]).to(z_0)
        t = torch.full((len(z_0),), sigma, device=z_0.device)
        return FlowPath.interpolate(z_0, eps, t), t

    def _generators(self, purpose: str, sigma: float, index: Tensor) -> list[torch.Generator]:
        return [keyed_generator(self.seed, purpose, i, str(sigma)) for i in index.tolist()]

    def _embed(
        self, name: str, z_t: Tensor, t: Tensor, sigma: float, texts: Texts, index: Tensor
    ) -> tuple[Tensor, Scorer]:
        """Returns embeddings (B, E): averages as they are, all others with unit length; and what scores them."""
        value = self.values[name]
        random = self._generators(name, sigma, index)
        scorer: Scorer = value.score
        start = self._clock()
        if isinstance(value, MonteCarloValue) and not value.scores_averages:
            each = value.embeddings(z_t, t, prompts=texts.prompts, generator=random)
            image, scorer = each.mean(dim=0), lambda _, text: value.score_each(each, text)
        else:
            image = value.embed(z_t, t, prompts=texts.prompts, generator=random).float()
        self.seconds[name] += self._clock() - start
        self.calls[name] += len(z_t)
        bad = ~torch.isfinite(image).all(dim=-1)
        if bool(bad.any()):
            raise ValueError(
                f"the estimator {name!r} is not finite at sigma = {sigma} for the images with index "
                f"{index[bad].tolist()[:5]}: check its weights and precision."
            )
        return image if value.averages else normalize(image, dim=-1), scorer

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _score(self, name: str, scorer: Scorer, image: Tensor, texts: Texts) -> Tensor | None:
        """Returns the scores (B,) of images for their own prompts; None without prompts."""
        if texts.own is None and self.reward.uses_text:
            return None
        score = scorer(image, texts.own).float()
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"the score of {name!r} is not finite: check the reward's weights.")
        return score

    def _truth(
        self, z_t: Tensor, t: Tensor, sigma: float, texts: Texts, index: Tensor, size: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns which of the batch have truth, and it from either half of the roll-outs."""
        if self.truth is None:
            return None
        # every size/n-th image, from the first on: n of them whether or not n divides the size
        chosen = (index * self.truth_images % size < self.truth_images).nonzero()[:, 0]
        if len(chosen) == 0:
            return chosen, z_t.new_zeros(0), z_t.new_zeros(0)
        random = self._generators("truth", sigma, index[chosen])
        each = self.truth.embeddings(z_t[chosen], t[chosen], generator=random)
        text = None if texts.own is None else texts.own[chosen].repeat(len(each), 1)
        scores = self.reward.score(each.flatten(0, 1), text).float().unflatten(0, each.shape[:2])
        half_a, half_b = (half.mean(dim=0) for half in scores.chunk(2))
        return chosen, half_a, half_b


def same_reward(one: Reward, other: Reward) -> bool:
    """Returns whether two rewards are one object, or sums of the same rewards with the same constants."""
    if one is other:
        return True
    if not (isinstance(one, WeightedReward) and isinstance(other, WeightedReward)):
        return False
    constants = [(r.names, r.weights, r.means, r.stds) for r in (one, other)]
    return constants[0] == constants[1] and all(
        a is b or spec_of(a) == spec_of(b) for a, b in zip(one.parts, other.parts, strict=True)
    )


def _pixels(batch: dict[str, Any]) -> Tensor:
    if "pixels" not in batch:
        raise ValueError(
            f"the batch has no 'pixels' but {sorted(batch)}: the clean reward looks at the image itself. "
            "Use a data module that gives images, or set clean to false."
        )
    return batch["pixels"]
