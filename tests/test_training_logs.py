"""Reading runs back: event files joined without double steps, and costs beside every value."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from stitchvm.modules.spent import COSTS
from stitchvm.training_curves import AXES
from stitchvm.training_logs import read_curve, read_scalars
from tests.modules import alignment_runs as runs
from tests.modules.alignment_fakes import evaluated
from tests.modules.alignment_runs import save_every_step

EVALUATED: dict[str, Any] = {
    "limit_val_batches": None,
    "num_sanity_val_steps": -1,
    "val_check_interval": 1,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 1,
}


def write(folder: Path, start: float, scalars: dict[str, dict[int, float]]) -> None:
    """Writes an event file whose entries were made from a time on."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, filename_suffix=f".{start}")
    for tag, points in scalars.items():
        for step, value in points.items():
            writer.add_scalar(tag, value, step, walltime=start + step)
    writer.close()


def test_a_resumed_run_is_joined_without_double_steps(tmp_path):
    """Killed after step 5, gone on from step 2 with log_every_n_steps 2."""
    loss = {s: 10.0 + s for s in range(1, 6)}
    write(tmp_path, 1000.0, {"train/loss": loss, "val/hps": {0: 0.0, 2: 2.0, 4: 4.5}})
    write(tmp_path, 2000.0, {"train/loss": {4: 24.0, 6: 26.0}, "val/hps": {4: 4.0, 6: 6.0}})
    found = read_scalars(tmp_path)
    assert found["train/loss"] == {1: 11.0, 2: 12.0, 3: 13.0, 4: 24.0, 6: 26.0}
    assert found["val/hps"] == {0: 0.0, 2: 2.0, 4: 4.0, 6: 6.0}
    write(tmp_path, 3000.0, {"val/clip": {5: 1.0}})  # resumed once more, other tags
    assert read_scalars(tmp_path)["val/hps"] == {0: 0.0, 2: 2.0, 4: 4.0}
    write(tmp_path, 4000.0, {"val/hps": {0: 7.0}})  # began anew
    assert read_scalars(tmp_path) == {"val/hps": {0: 7.0}}
    write(tmp_path, 5000.0, {})  # ended before it logged anything
    assert read_scalars(tmp_path) == {"val/hps": {0: 7.0}}


def test_the_order_is_that_of_the_entries_not_of_the_files(tmp_path):
    write(tmp_path, 2000.0, {"val/hps": {1: 2.0}})
    write(tmp_path, 1000.0, {"val/hps": {0: 0.0, 1: 1.0}})
    for file in tmp_path.iterdir():  # as after copying
        os.utime(file, (0, 0))
    assert read_scalars(tmp_path)["val/hps"] == {0: 0.0, 1: 2.0}


def test_a_curve_has_costs_and_no_gaps():
    scalars = {
        "val/hps": {0: 1.0, 10: float("nan"), 20: 3.0},
        "cost/samples": {0: 0.0, 5: 40.0, 20: 160.0},
        "cost/seconds": {5: 4.0, 20: 16.0},
    }
    assert read_curve(scalars, "val/hps") == [
        {"step": 0, "samples": 0.0, "value": 1.0},
        {"step": 20, "samples": 160.0, "seconds": 16.0, "value": 3.0},
    ]
    with pytest.raises(ValueError, match=r"no val/clip in the logs; there are val/hps"):
        read_curve(scalars, "val/clip")
    with pytest.raises(ValueError, match=r"no val/clip in the logs"):
        read_curve(scalars, "val/hps+val/clip")
    scalars["val/clip"] = {0: 0.5, 10: 0.5}
    assert [p["value"] for p in read_curve(scalars, "val/hps+val/clip")] == [1.5]


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_scalars(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no event files"):
        read_scalars(tmp_path)
    write(tmp_path / "lightning_logs" / "version_0", 1000.0, {"val/hps": {0: 1.0}})
    assert read_scalars(tmp_path) == {"val/hps": {0: 1.0}}
    write(tmp_path, 2000.0, {"val/hps": {1: 2.0}})  # of the run itself: others below do not count
    assert read_scalars(tmp_path) == {"val/hps": {1: 2.0}}


def test_a_real_run_that_was_resumed(tmp_path):
    """Three steps; then from the checkpoint of the first to the fourth: every step once, costs rising."""
    root = tmp_path / "run"

    def fit(max_steps: int, **more: Any) -> None:
        logger = TensorBoardLogger(root, name="", version="")
        options = EVALUATED | save_every_step(tmp_path / "saved") | more
        runs.fit(evaluated(), root, max_steps=max_steps, logger=logger, **options)

    fit(3)
    first = read_curve(read_scalars(root), "val/fake")
    shutil.copy(tmp_path / "saved" / "step=1.ckpt", tmp_path / "one.ckpt")
    fit(4, ckpt_path=tmp_path / "one.ckpt")
    assert len(list(root.glob("events.*"))) == 2
    curve = read_curve(read_scalars(root), "val/fake")
    assert [p["step"] for p in curve] == [0, 1, 2, 3, 4] and curve[:2] == first[:2]
    assert [p["samples"] for p in curve] == [0, 8, 16, 24, 32]
    assert [*read_scalars(root)["train/loss"]] == [
        1,
        2,
        3,
        4,
    ]  # the second file begins with val/ of step 1
    assert [p["value"] for p in curve[:4]] == [p["value"] for p in first]  # resuming is exact
    for name in ("seconds", "device_seconds", "cpu_seconds"):
        costs = [p[name] for p in curve]
        assert costs[0] == 0 and costs == sorted(set(costs))
    assert {*AXES} == {*COSTS, "step"} == curve[0].keys() - {"value"}
