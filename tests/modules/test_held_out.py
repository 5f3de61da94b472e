"""Held-out prompts during alignment: what is scored with which weights, and logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger

from stitchvm.data.prompts import Prompts
from stitchvm.modules.held_out import picture_grid
from tests.modules import alignment_runs as runs
from tests.modules.alignment_fakes import evaluated
from tests.modules.alignment_runs import save_every_step, scalars


def test_held_out_prompts_are_scored_with_the_average_and_logged(tmp_path):
    module = evaluated(ema_limit=1.0)  # (1 + s)/(10 + s): the average lags behind
    logger = TensorBoardLogger(tmp_path, name="", version="")
    runs.fit(
        module,
        tmp_path,
        max_steps=2,
        logger=logger,
        limit_val_batches=None,
        num_sanity_val_steps=-1,
        log_every_n_steps=1,
    )
    log = scalars(tmp_path)
    tags = set(log.Tags()["scalars"])
    assert {
        "val/fake",
        "val/image/saturation",
        "val/image/colour_entropy",
        "train/reward",
        "train/regulariser",
        "train/grad_norm",
        "train/skipped",
        "train/distance_ema",
        "seconds/rollout",
        "seconds/value",
        "seconds/update",
        "samples/s",
    } <= tags
    before, after = log.Scalars("val/fake")
    assert before.step == 0 and before.value != after.value
    assert log.Tags()["images"] == ["val/samples"] and len(log.Images("val/samples")) == 2

    def by_hand(name: str) -> float:
        held_out = module._built.held_out
        with torch.no_grad(), module.policy.use(name):
            for start in (0, 5):  # other batches, the same means
                index = torch.arange(start, min(start + 5, 8))
                held_out.add({"index": index, "prompt": [runs.PROMPTS[i] for i in index]})
        return held_out.finish()[0]["fake"]

    assert by_hand("base") == pytest.approx(before.value, rel=1e-5)
    assert by_hand("ema") == pytest.approx(after.value, rel=1e-5)
    assert by_hand("default") != pytest.approx(after.value, rel=1e-5)


def test_a_checkpoint_is_validated_with_its_own_average(tmp_path):
    trained = evaluated(ema_limit=0.5)
    runs.fit(trained, tmp_path, max_steps=2, **save_every_step(tmp_path / "saved"))
    module = evaluated()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(tmp_path)
    )
    data = Prompts(prompts=runs.PROMPTS, batch_size=8)
    (found,) = trainer.validate(module, data, ckpt_path=tmp_path / "saved" / "step=2.ckpt")
    held_out = trained._built.held_out
    with torch.no_grad(), trained.policy.use("ema"):
        held_out.add({"index": torch.arange(8), "prompt": runs.PROMPTS})
    wanted = held_out.finish()[0]
    assert found["val/fake"] == pytest.approx(wanted["fake"], rel=1e-6)
    assert all(name.startswith("val/") for name in found)  # no step, no cost


def test_an_interrupted_evaluation_leaves_nothing_in_the_next(tmp_path, monkeypatch):
    """In a notebook, say: the same module on other prompts, fewer than those of before."""
    module = evaluated()

    def found(prompts: list[str]) -> float:
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        return trainer.validate(module, Prompts(prompts=prompts, batch_size=2))[0]["val/fake"]

    wanted = found(runs.PROMPTS[:2])
    held_out, add = module._built.held_out, type(module._built.held_out).add

    def fails(self: Any, batch: dict[str, Any], **kwargs: Any) -> None:
        if 4 in batch["index"]:
            raise RuntimeError("no more memory")
        add(self, batch, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no more memory"):
        patch.setattr(type(held_out), "add", fails)
        found(runs.PROMPTS)
    assert len(held_out._scores) == 4
    assert found(runs.PROMPTS[:2]) == wanted


def test_early_stopping_on_a_held_out_reward(tmp_path):
    module = evaluated(lr=1e-9)  # no improvement, ever
    stop = EarlyStopping("val/fake", mode="max", patience=2, min_delta=0.01)
    runs.fit(
        module,
        tmp_path,
        max_steps=50,
        limit_val_batches=None,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        callbacks=[stop],
    )
    assert module.trainer.global_step == 3


def test_a_grid_of_pictures():
    images = [torch.full((3, 2, 3), value, dtype=torch.uint8) for value in (10, 20, 30, 40, 50)]
    picture = picture_grid(images)
    assert picture.shape == (3, 6, 6) and picture.dtype == torch.uint8  # two columns
    assert picture[0, 0].tolist() == [10] * 3 + [20] * 3
    assert picture[0, 4].tolist() == [50] * 3 + [255] * 3
    assert picture_grid([torch.zeros(3, 512, 256, dtype=torch.uint8)]).shape == (3, 256, 128)
