"""What updates have taken so far: counted, logged beside every evaluation, and gone on with after resuming."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from stitchvm.modules.draft import DRaFT
from stitchvm.modules.spent import COSTS, Spent
from tests.modules import alignment_runs as runs
from tests.modules.alignment_fakes import Broken, draft, evaluated
from tests.modules.alignment_runs import load, save_every_step, scalars


def test_totals_are_of_all_ranks():
    spent = Spent()
    assert spent.totals == dict.fromkeys(COSTS, 0.0)
    spent.add(seconds=2.0, cpu_seconds=1.5, samples=8, ranks=2)
    spent.add(seconds=3.0, cpu_seconds=4.0, samples=16, ranks=1)  # resumed on one device
    wanted = {"updates": 2, "samples": 32, "seconds": 5, "device_seconds": 7, "cpu_seconds": 7}
    assert spent.totals == wanted
    assert spent.scalars()["cost/device_seconds"] == 7
    again = Spent()
    again.load(spent.totals)
    again.add(1.0, 1.0, 1, 1)
    assert again.totals["samples"] == 33 and spent.totals["samples"] == 32


def test_a_clock_reads_wall_and_own_threads():
    spent = Spent()
    spent.start()
    time.sleep(0.2)
    took = spent.stop(torch.device("cpu"))
    assert took["seconds"] >= 0.2 and took["cpu_seconds"] < 0.1


class Slow(DRaFT):
    """Takes its time for evaluations, and a twentieth of a second for updates."""

    elsewhere = 0.0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        time.sleep(0.2)
        self.elsewhere += 0.2
        super().validation_step(batch, batch_idx)

    def after_step(self, step: int) -> None:
        time.sleep(0.05)


def test_evaluations_are_logged_at_the_steps_made_with_the_cost_of_training_alone(tmp_path):
    root = tmp_path / "run"
    options: dict[str, Any] = {
        "limit_val_batches": None,
        "num_sanity_val_steps": -1,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 50,  # evaluations do not wait for it
    }
    logger = TensorBoardLogger(root, name="", version="")
    module, start = evaluated(cls=Slow), time.perf_counter()
    runs.fit(module, root, max_steps=3, logger=logger, **options)
    wall = time.perf_counter() - start
    log = scalars(root)
    assert [event.step for event in log.Scalars("val/fake")] == [0, 1, 2, 3]
    cost = {name: [e.value for e in log.Scalars(f"cost/{name}")] for name in COSTS}
    assert cost["updates"] == [0, 1, 2, 3] and cost["samples"] == [0, 8, 16, 24]
    assert cost["seconds"] == cost["device_seconds"] and cost["seconds"][0] == 0
    gaps = [b - a for a, b in zip(cost["seconds"], cost["seconds"][1:], strict=False)]
    assert all(gap >= 0.05 for gap in gaps) and module.elsewhere >= 0.8
    assert cost["seconds"][-1] < wall - module.elsewhere
    assert 0 < cost["cpu_seconds"][-1] < cost["seconds"][-1]


def test_a_resumed_run_goes_on_counting(tmp_path):
    value = Broken("value", 4)  # the second of four updates is skipped, and costs what it costs
    runs.fit(draft(value), tmp_path, max_steps=3, **save_every_step(tmp_path / "a"))
    whole = load(tmp_path / "a" / "step=3.ckpt")["spent"]
    assert (whole["updates"], whole["samples"]) == (4, 32)
    one = load(tmp_path / "a" / "step=1.ckpt")["spent"]
    assert (one["updates"], one["samples"]) == (1, 8)
    module = draft(Broken("value", 1))
    saved = {"ckpt_path": tmp_path / "a" / "step=1.ckpt", **save_every_step(tmp_path / "b")}
    runs.fit(module, tmp_path, max_steps=3, **saved)
    resumed = load(tmp_path / "b" / "step=3.ckpt")["spent"]
    assert (resumed["updates"], resumed["samples"]) == (4, 32)
    for name in ("seconds", "device_seconds", "cpu_seconds"):
        assert resumed[name] > one[name] > 0
    assert resumed == module.spent.totals


class Twice(DRaFT):
    """Makes two optimiser steps an update."""

    def micro_steps(self, rows: Any, rolled: None) -> Any:
        yield from super().micro_steps(rows, rolled)
        yield None
        yield from super().micro_steps(rows, rolled)


def test_entries_are_at_the_optimisers_step_as_checkpoints_are(tmp_path):
    root = tmp_path / "run"
    logger = TensorBoardLogger(root, name="", version="")
    options = {"logger": logger, "log_every_n_steps": 1, **save_every_step(tmp_path / "saved")}
    runs.fit(draft(cls=Twice), root, max_steps=4, **options)
    log = scalars(root)
    for tag in ("train/reward", "cost/updates", "samples/s"):
        assert [event.step for event in log.Scalars(tag)] == [2, 4]
    assert [event.value for event in log.Scalars("cost/updates")] == [1, 2]
    found = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert found == ["step=2.ckpt", "step=4.ckpt"]
    for name in found:
        assert f"step={load(tmp_path / 'saved' / name)['global_step']}.ckpt" == name


def test_checkpoints_without_a_clock_are_taken_up(tmp_path):
    runs.fit(draft(), tmp_path, max_steps=1, **save_every_step(tmp_path / "saved"))
    state = load(tmp_path / "saved" / "step=1.ckpt")
    del state["spent"]
    torch.save(state, tmp_path / "old.ckpt")
    module = draft()
    runs.fit(module, tmp_path, max_steps=2, ckpt_path=tmp_path / "old.ckpt")
    assert module.spent.totals["updates"] == 1
