"""A run that is taken up from a checkpoint sees the batches that the uninterrupted run sees."""

from __future__ import annotations

import logging
import multiprocessing
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from stitchvm.data.base import Sample
from stitchvm.data.loader import Loader
from stitchvm.data.module import DataModule
from stitchvm.data.sampling import EpochSampler

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

Seen = list[tuple[int, ...]]


class Numbers(Dataset[Sample]):
    """Tiny images whose value is their index."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return {
            "index": index,
            "pixels": torch.full((3, 1, 1), index, dtype=torch.uint8),
            "bad": [],
        }


class NumbersData(DataModule):
    def __init__(self, length: int = 23, **kwargs: Any) -> None:
        super().__init__(
            **{"resolution": 1, "batch_size": 4, "num_workers": 0, "seed": 5, **kwargs}
        )
        self.length = length

    def fit_data(self) -> tuple[Numbers, Numbers]:
        return Numbers(self.length), Numbers(7)


class Recorder(pl.LightningModule):
    """Notes the training batches; draws from the global generator as a model with dropout would."""

    def __init__(self, estimate: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.estimate = estimate
        self.seen: Seen = []
        self.noise: list[float] = []
        self.validated: list[int] = []
        self.stop: tuple[str, int] | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        if self.stop == ("after the step", len(self.seen)):
            raise KeyboardInterrupt

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        assert batch["pixels"].dtype == torch.float32
        torch.testing.assert_close(batch["pixels"][:, 0, 0, 0], batch["index"] / 255)
        self.seen.append((batch["epoch"], *batch["index"].tolist()))
        self.noise.append(float(torch.rand(())))
        if self.stop == ("before the step", len(self.seen)):
            raise KeyboardInterrupt
        if not self.automatic_optimization:
            self.optimizers().step()
            if self.stop == ("with the step", len(self.seen)):
                raise KeyboardInterrupt
        return self.weight * batch["pixels"].mean()

    def on_validation_start(self) -> None:
        if self.stop == ("before an evaluation", len(self.validated)):
            raise KeyboardInterrupt

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated += batch["index"].tolist()
        if self.stop == ("in an evaluation", len(self.validated)):
            raise KeyboardInterrupt

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimate:  # makes the loader before the checkpoint's progress is read
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    ckpt: Path | None = None,
    save: Path | None = None,
    estimate: bool = False,
    data: DataModule | None = None,
    stop: tuple[str, int] | None = None,
    every: int = 100,
    manual: bool = False,
    **kwargs: Any,
) -> tuple[Recorder, pl.Trainer]:
    """Trains; with `save` leaves a checkpoint of every step there, or with `stop` one of where it was interrupted,
    and of `every` so many steps."""
    kept = {"every_n_train_steps": 1 if stop is None else every}
    kept |= {"save_top_k": -1, "save_on_exception": stop is not None}
    callbacks = [] if save is None else [ModelCheckpoint(save, "{step}", **kept)]
    kwargs = {"max_epochs": 3, "val_check_interval": 2, "devices": 1, **kwargs}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=save is not None,
        callbacks=callbacks,  # type: ignore[arg-type]
        **kwargs,
    )
    module = Recorder(estimate)
    module.stop, module.automatic_optimization = stop, not manual
    with nullcontext() if stop is None else pytest.raises(SystemExit):
        trainer.fit(module, datamodule=data or NumbersData(), ckpt_path=ckpt, weights_only=True)
    return module, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Path]:
    """An uninterrupted run of 3 epochs of 5 steps, with validation in between, and its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    module, _ = fit(save=folder)
    assert len(module.seen) == 15 and sorted(set(module.validated)) == list(range(7))
    epochs = [[i for _, *batch in module.seen[5 * e : 5 * e + 5] for i in batch] for e in range(3)]
    assert all(len(set(epoch)) == 20 for epoch in epochs) and epochs[0] != epochs[1]
    return module.seen, folder


@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 9, 10, 14])
def test_resume_at_any_step(whole: tuple[Seen, Path], step: int, estimate: bool) -> None:
    seen, folder = whole
    module, _ = fit(folder / f"step={step}.ckpt", estimate=estimate)
    assert module.seen == seen[step:]


def test_resume_with_workers_that_prefetch(whole: tuple[Seen, Path], tmp_path: Path) -> None:
    seen, _ = whole
    module, _ = fit(save=tmp_path, data=NumbersData(num_workers=2), max_steps=8)
    assert module.seen == seen[:8]
    assert not multiprocessing.active_children()  # the run's end ends the workers
    module, _ = fit(tmp_path / "step=7.ckpt", data=NumbersData(num_workers=2))
    assert module.seen == seen[7:]


def test_resume_of_a_run_that_ended_by_max_steps(whole: tuple[Seen, Path], tmp_path: Path) -> None:
    seen, _ = whole
    module, trainer = fit(max_steps=7)
    trainer.save_checkpoint(tmp_path / "7.ckpt")
    assert module.seen == seen[:7]
    module, trainer = fit(tmp_path / "7.ckpt", max_steps=12, max_epochs=-1)
    assert module.seen == seen[7:12]
    trainer.save_checkpoint(tmp_path / "12.ckpt")  # a second time, with the epochs shifted already
    module, _ = fit(tmp_path / "12.ckpt", max_steps=15, max_epochs=-1)
    assert module.seen == seen[12:]


def test_resume_under_limit_train_batches(whole: tuple[Seen, Path], tmp_path: Path) -> None:
    seen, _ = whole
    module, _ = fit(save=tmp_path, limit_train_batches=3)
    assert module.seen == seen[0:3] + seen[5:8] + seen[10:13]
    for step in (2, 3, 4):
        again, _ = fit(tmp_path / f"step={step}.ckpt", limit_train_batches=3)
        assert again.seen == module.seen[step:]


def test_resume_with_another_global_batch(whole: tuple[Seen, Path]) -> None:
    seen, folder = whole
    samples = [i for _, *batch in seen for i in batch]
    # 3 batches of 4 were consumed: batches of 2 go on at the 7th of 11, batches of 8 at the 2nd of 2.
    module, _ = fit(folder / "step=3.ckpt", data=NumbersData(batch_size=2), max_epochs=1)
    assert [i for _, *batch in module.seen for i in batch][:8] == samples[12:20] and len(
        module.seen
    ) == 11 - 6
    module, _ = fit(
        folder / "step=3.ckpt", data=NumbersData(batch_size=8), max_epochs=1, val_check_interval=1
    )
    assert module.seen == [(0, *samples[8:16])]
    module, _ = fit(folder / "step=5.ckpt", data=NumbersData(batch_size=2), max_epochs=2)
    assert [i for _, *batch in module.seen for i in batch][:20] == samples[20:40] and len(
        module.seen
    ) == 11


@pytest.mark.parametrize("batches", [2, 3, 5, 6, 9, 10])
@pytest.mark.parametrize("when", ["before the step", "with the step", "after the step"])
def test_an_interrupted_batch_is_made_again_unless_it_has_made_its_step(
    whole: tuple[Seen, Path], tmp_path: Path, when: str, batches: int
) -> None:
    """In the middle of an epoch, at its first and at its last batch, and before an evaluation; these stay where they
    were, and so do the logs' steps."""
    seen, _ = whole
    manual = when == "with the step"
    module, trainer = fit(save=tmp_path, stop=(when, batches), manual=manual)
    steps = trainer.global_step
    assert steps == batches - (when == "before the step") and module.seen == seen[:batches]
    (file,) = tmp_path.iterdir()
    again, trainer = fit(file, manual=manual)
    assert again.seen == seen[steps:] and trainer.global_step == 15
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 15
    # 2 evaluations of 7 in each epoch of 5
    assert len(module.validated) - 7 + len(again.validated) == 6 * 7  # 7 before training


@pytest.mark.parametrize(
    ("stop", "steps", "first"),
    [
        (("before the step", 4), 1, 2),  # of a step of two batches the second is interrupted
        (("after the step", 3), 1, 2),  # or the run, once the first has been made
        (("after the step", 4), 2, 4),
        (("after the step", 5), 3, 5),  # the last of an epoch makes a step of its own
    ],
)
def test_batches_accumulated_for_an_interrupted_step_are_made_again(
    whole: tuple[Seen, Path], tmp_path: Path, stop: tuple[str, int], steps: int, first: int
) -> None:
    """Their gradients are in no checkpoint."""
    seen, _ = whole
    options = {"accumulate_grad_batches": 2, "val_check_interval": 1.0}
    module, trainer = fit(save=tmp_path, stop=stop, **options)
    assert trainer.global_step == steps and module.seen == seen[: stop[1]]
    (file,) = tmp_path.iterdir()
    again, trainer = fit(file, **options)
    assert again.seen == seen[first:] and trainer.global_step == 9


def test_batches_of_a_step_that_was_made_are_not_made_again_by_a_run_that_accumulates_more(
    whole: tuple[Seen, Path], tmp_path: Path
) -> None:
    seen, _ = whole
    options = {"val_check_interval": 1.0, "accumulate_grad_batches": 2}
    fit(save=tmp_path / "a", stop=("after the step", 4), **options)
    (file,) = (tmp_path / "a").iterdir()
    options["accumulate_grad_batches"] = 3
    module, trainer = fit(file, tmp_path / "b", stop=("before the step", 1), **options)
    assert module.seen == seen[4:5]
    trainer.save_checkpoint(tmp_path / "b.ckpt")  # by itself it has not: there was no step
    module, _ = fit(tmp_path / "b.ckpt", **options)
    assert module.seen == seen[4:]


@pytest.mark.parametrize("every", [100, 1])
@pytest.mark.parametrize(
    ("when", "validated"), [("before an evaluation", 4), ("in an evaluation", 8)]
)
def test_an_interrupted_evaluation_begins_again(
    tmp_path: Path, when: str, validated: int, every: int
) -> None:
    """From a checkpoint of the interrupted run, or from that of the step before the evaluation."""
    data = {"data": NumbersData(batch_size=2), "max_epochs": 1, "val_check_interval": 3}
    # 2 batches before training, then the first or the second of 4
    module, trainer = fit(save=tmp_path, stop=(when, validated), every=every, **data)
    assert trainer.global_step == 3 and len(module.validated) == validated
    file = max(tmp_path.iterdir())
    again, trainer = fit(file, **data | {"data": NumbersData(batch_size=2)})
    assert again.validated == list(range(7)) * 3 and trainer.global_step == 11


def test_another_data_set_is_told(whole: tuple[Seen, Path]) -> None:
    _, folder = whole
    with pytest.warns(
        UserWarning, match="seed 5 and 23 training images, this run has seed 6 and 23"
    ):
        fit(folder / "step=3.ckpt", data=NumbersData(seed=6), max_epochs=1)


def test_a_trained_run_can_be_tested_from_its_checkpoint(whole: tuple[Seen, Path]) -> None:
    _, folder = whole
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    module = Recorder()
    trainer.validate(
        module, datamodule=NumbersData(), ckpt_path=folder / "step=3.ckpt", weights_only=True
    )
    assert module.validated == list(range(7))


def test_loading_does_not_touch_the_global_generator() -> None:
    noise = []
    for workers in (0, 2):
        torch.manual_seed(3)
        module, _ = fit(data=NumbersData(num_workers=workers), max_epochs=2)
        noise.append(module.noise)
    torch.manual_seed(3)
    assert noise[0] == noise[1] == [float(torch.rand(())) for _ in range(10)]


def test_overfit_batches_sees_the_same_ones() -> None:
    module, _ = fit(overfit_batches=2, max_epochs=2, limit_val_batches=0)
    assert module.seen[:2] == module.seen[2:]


def test_without_a_trainer() -> None:
    loader = Loader(Numbers(10), EpochSampler(10, 3))
    first = [batch["index"].tolist() for batch in loader]
    second = [batch["index"].tolist() for batch in loader]
    assert first != second and len(first) == len(second) == 3
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    rest = [batch["index"].tolist() for batch in batches]
    other = Loader(Numbers(10), EpochSampler(10, 3))
    other.load_state_dict(state)
    assert [batch["index"].tolist() for batch in other] == rest
    next(iter(other))  # abandoned: the next iteration begins the same epoch again
    assert other.epoch == 3 and next(iter(other))["index"].tolist() != [] and other.epoch == 3
