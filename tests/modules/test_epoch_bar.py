"""Tests of stitchvm.modules.epoch_bar."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from stitchvm.modules.epoch_bar import EpochBar, name_epochs

OPTIONS = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


@pytest.mark.parametrize(("max_epochs", "expected"), [(-1, "Epoch 3"), (5, "Epoch 3/4")])
def test_epochs_have_an_end_where_the_run_has(tmp_path, max_epochs, expected):
    trainer = Trainer(
        max_epochs=max_epochs,
        max_steps=9,
        callbacks=[RichProgressBar(refresh_rate=7)],
        default_root_dir=tmp_path,
        **OPTIONS,
    )
    name_epochs(trainer)
    bar = trainer.progress_bar_callback
    assert isinstance(bar, EpochBar) and bar.refresh_rate == 7
    bar.setup(trainer, trainer.lightning_module, "fit")
    assert bar._get_train_description(3).rstrip() == expected
    assert len(bar._get_train_description(3)) >= len(bar.validation_description)


def test_another_bar_stays(tmp_path):
    bar = TQDMProgressBar()
    trainer = Trainer(callbacks=[bar], default_root_dir=tmp_path, **OPTIONS)
    name_epochs(trainer)
    assert trainer.progress_bar_callback is bar
