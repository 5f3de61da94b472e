"""Two processes: training data divided and resumed, evaluation sets covered once."""

from __future__ import annotations

import atexit
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from stitchvm.data.prompts import Prompts
from stitchvm.modules.ranks import leave
from tests.data.test_resume import NumbersData, Recorder, fit


class Noting(Recorder):
    """Writes what its process saw."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def setup(self, stage: str) -> None:
        atexit.register(leave)  # of the spawned process

    def note(self, what: str, seen: list[Any]) -> None:
        (self.folder / f"{what}{self.global_rank}.json").write_text(json.dumps(seen))

    def on_train_end(self) -> None:
        self.note("train", self.seen)

    def on_validation_end(self) -> None:
        self.note("val", self.validated)


def run(
    folder: Path, ckpt: Path | None = None, validate: bool = False
) -> dict[str, list[list[Any]]]:
    """Runs two processes; returns what each saw."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=1,
        limit_val_batches=1.0 if validate else 0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = NumbersData(length=21, batch_size=2)
    module = Noting(folder)
    if validate:
        trainer.validate(module, datamodule=data)
    else:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return {
        what: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{what}?.json"))]
        for what in ("train", "val")
    }


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    # The same global batch of 4 on one device: 5 steps.
    single, _ = fit(
        data=NumbersData(length=21, batch_size=4), save=tmp_path / "ckpt", max_epochs=1
    )
    seen = run(tmp_path)["train"]
    assert len(seen) == 2
    together = [sorted(a[1:] + b[1:]) for a, b in zip(*seen, strict=True)]
    assert together == [sorted(batch) for _, *batch in single.seen]

    # Taken up on two devices after 2 steps on one, the run sees the rest.
    seen = run(tmp_path, tmp_path / "ckpt" / "step=2.ckpt")["train"]
    assert [sorted(a[1:] + b[1:]) for a, b in zip(*seen, strict=True)] == together[2:]

    # Seven validation images in twos: each once, without padding, although Lightning would add its own sampler.
    val = run(tmp_path, validate=True)["val"]
    assert sorted(val[0] + val[1]) == list(range(7)) and val[0] == [0, 2, 4, 6]


class Prompted(pl.LightningModule):
    """Writes which prompts its process was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.seen: list[Any] = []

    def setup(self, stage: str) -> None:
        atexit.register(leave)  # of the spawned process

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.append(list(zip(batch["index"].tolist(), batch["prompt"], strict=True)))

    def on_predict_end(self) -> None:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.seen))


@pytest.mark.slow
def test_two_processes_divide_the_prompts(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = Prompts(prompts=[f"p{i}" for i in range(7)], batch_size=3)
    trainer.predict(Prompted(tmp_path), datamodule=data, return_predictions=False)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [[i for i, _ in batch] for batch in seen[0]] == [[0, 2, 4], [6]]
    assert [[i for i, _ in batch] for batch in seen[1]] == [[1, 3], [5]]
    assert all(prompt == f"p{i}" for part in seen for batch in part for i, prompt in batch)
