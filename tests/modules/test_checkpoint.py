"""What a checkpoint holds and requires."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.call import _call_callback_hooks
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from stitchvm.data.module import DataModule
from stitchvm.modules.checkpoint import LeanCheckpoint, renumber
from tests.data.test_resume import Numbers

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}


class Half(LeanCheckpoint):
    pretrained_prefixes = ("teacher.",)

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = nn.Linear(2, 2), nn.Linear(2, 3)


@pytest.mark.parametrize(
    ("processes", "exception", "saves"),
    [
        (1, MemoryError(), True),
        (2, MemoryError(), False),  # of one of them, perhaps
        (2, KeyboardInterrupt(), True),
        (2, SIGTERMException(), True),
    ],
)
def test_a_process_of_several_does_not_save_on_an_exception_of_its_own(
    tmp_path, processes, exception, saves
):
    """Lightning's saving waits for all processes."""
    kept = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=9)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[kept])
    trainer.strategy.connect(Half())
    trainer._callback_connector._attach_model_callbacks()
    trainer.state.fn, kept._last_global_step_saved = TrainerFn.FITTING, -1
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "world_size", processes)
        patch.setattr(trainer, "save_checkpoint", lambda *args: found.append(args))
        _call_callback_hooks(trainer, "on_exception", exception)
    assert bool(found) == saves


class Cut(torch.optim.SGD):
    """Gets a Ctrl-C, or runs out of memory, in the middle of its third step."""

    steps, error = 0, False

    def step(self, closure=None):
        loss = closure()
        self.steps += 1
        for place, parameter in enumerate(self.param_groups[0]["params"]):
            if (self.steps, place) == (3, 1):
                os.kill(os.getpid(), signal.SIGINT)
                if self.error:
                    raise MemoryError
            parameter.data -= self.param_groups[0]["lr"]
        return loss


class TwoWeights(LeanCheckpoint):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(())) for _ in "ab")

    def training_step(self, batch, batch_idx):
        return self.a + self.b

    def validation_step(self, batch, batch_idx):
        self.log("a", self.a)

    def configure_optimizers(self):
        optimizer = Cut(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2.0**step)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@pytest.mark.parametrize("error", [False, True])
def test_ctrl_c_cuts_no_step_of_lightnings_in_two(tmp_path, monkeypatch, error):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(Cut, "error", error)
    kept = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    trainer = Trainer(
        accelerator="cpu", callbacks=[kept], max_steps=5, limit_val_batches=0, **QUIET
    )
    try:
        with pytest.raises(MemoryError if error else SystemExit):
            trainer.fit(TwoWeights(), torch.utils.data.DataLoader(range(9)))
        if error:
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            return
    finally:
        signal.signal(signal.SIGINT, before)
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert found["state_dict"] == {"a": torch.tensor(-7.0), "b": torch.tensor(-7.0)}  # 1 + 2 + 4
    assert found["global_step"] == 3 and found["lr_schedulers"][0]["last_epoch"] == 3
    progress = found["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert progress["ready"] == progress["processed"] == 3


def test_the_best_of_evaluations_is_kept_also_where_a_run_goes_on_with_one(tmp_path):
    """From the checkpoint of the step that is evaluated, which another callback has saved."""

    class Data(DataModule):
        def fit_data(self):
            return Numbers(20), Numbers(2)

    def fit(steps, **kwargs):
        last = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True, **saves)
        best = ModelCheckpoint(tmp_path / "best", "{step}", monitor="a", save_top_k=-1)
        options = {"max_steps": steps, "val_check_interval": 2, "num_sanity_val_steps": 0} | QUIET
        trainer = Trainer(accelerator="cpu", callbacks=[last, best], **options)
        trainer.fit(TwoWeights(), datamodule=Data(1, 4, 0), weights_only=True, **kwargs)
        return {file.name for file in (tmp_path / "best").iterdir()}

    saves = {"save_on_exception": True}
    assert fit(2) == {"step=2.ckpt"}
    (tmp_path / "best" / "step=2.ckpt").unlink()  # as if it had been killed before
    assert fit(4, ckpt_path=tmp_path / "last.ckpt") == {"step=2.ckpt", "step=4.ckpt"}


@pytest.fixture
def saved():
    module = Half()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_nothing_pretrained_is_saved(saved):
    assert set(saved["state_dict"]) == {"student.weight", "student.bias"}
    assert saved["trained"] == {"student.weight": [3, 2], "student.bias": [3]}
    Half().on_load_checkpoint(saved)


def test_a_missing_key_is_named(saved):
    del saved["state_dict"]["student.bias"]
    with pytest.raises(ValueError, match=r"missing \['student.bias'\] \(1\)"):
        Half().on_load_checkpoint(saved)


def test_unknown_keys_and_wrong_shapes_are_named(saved):
    saved["state_dict"]["other"] = torch.zeros(1)
    saved["state_dict"]["student.bias"] = torch.zeros(4)
    with pytest.raises(
        ValueError, match=r"unknown \['other'\].*student\.bias \(4,\) \(expected \(3,\)\)"
    ):
        Half().on_load_checkpoint(saved)


def test_strict_also_where_the_strategy_has_taken_the_weights(saved):
    del saved["state_dict"]
    Half().on_load_checkpoint(saved)
    del saved["trained"]["student.weight"]
    with pytest.raises(ValueError, match=r"missing \['student.weight'\]"):
        Half().on_load_checkpoint(saved)


def test_an_optimiser_is_numbered_by_the_module_and_still_loads_by_position():
    module = Half()
    groups = [{"params": [module.student.bias]}, {"params": [module.student.weight], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups)
    (module.student(torch.ones(1, 2)).sum() * 3).backward()
    optimizer.step()
    state = optimizer.state_dict()
    expected = {p: optimizer.state[p]["exp_avg"].clone() for p in module.student.parameters()}
    renumber(state, [3, 2])  # teacher.weight, teacher.bias, student.weight, student.bias
    assert [group["params"] for group in state["param_groups"]] == [[3], [2]]
    assert torch.equal(state["state"][3]["exp_avg"], expected[module.student.bias])
    again = torch.optim.AdamW(
        [{"params": [module.student.bias]}, {"params": [module.student.weight]}]
    )
    again.load_state_dict(state)
    for parameter, value in expected.items():
        assert torch.equal(again.state[parameter]["exp_avg"], value)
