"""Monte Carlo truth and estimators on a world with closed forms, in one process and in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torchmetrics.functional import spearman_corrcoef

from stitchvm.modules.evaluation import ValueEvaluation
from stitchvm.path import FlowPath
from stitchvm.randomness import keyed_generator, keyed_normal
from stitchvm.values.monte_carlo import MonteCarloFactory
from stitchvm.values.tweedie import TweedieFactory
from tests.modules.evaluation_runs import WorldData, run, same, value, world_run
from tests.values.fakes import (
    BentReward,
    ClosedFormReward,
    WorldGenerator,
    known,
    mixture,
)


def test_truth_ranks_monte_carlo_above_tweedie(tmp_path: Path) -> None:
    options = {"sigmas": [0.25, 0.75], "truth_images": 30, "truth_rollouts": 64, "truth_steps": 10}
    module = world_run(tmp_path / "a", WorldData(), **options)
    records = module.records
    assert {r["n"] for r in records if r["metric"] == "truth/r2"} == {30}
    assert value(records, "aesthetic/srcc", None) == pytest.approx(1)

    # the same errors from the closed form, for the images that were chosen

    world = mixture()
    z_0 = torch.stack([s["pixels"] for s in WorldData().samples])[::2]
    eps = keyed_normal([(0, "noise", i, "0.75") for i in range(0, 60, 2)], (2, 1, 1))
    z_t = FlowPath.interpolate(z_0, eps, 0.75)
    exact, tweedie = world.value(z_t, 0.75, known()), world.tweedie_value(z_t, 0.75, known())
    rmse = float((tweedie - exact).square().mean().sqrt())
    assert value(records, "truth/rmse", 0.75, "tweedie") == pytest.approx(rmse, rel=0.1)
    assert value(records, "truth/r2", 0.75, "monte_carlo") > value(
        records, "truth/r2", 0.75, "tweedie"
    )
    noise = float((world.value_variance(z_t, 0.75, known()).mean() / 64).sqrt())
    assert value(records, "truth/truth_noise", 0.75, "tweedie") == pytest.approx(noise, rel=0.3)

    # nothing depends on the batch size: neither noise, nor roll-outs, nor the choice of images
    again = world_run(tmp_path / "b", WorldData(batch_size=7), **options)
    same(records, again.records)
    other = world_run(tmp_path / "c", WorldData(), seed=1, **options)
    assert value(other.records, "truth/rmse", 0.75, "tweedie") != value(
        records, "truth/rmse", 0.75, "tweedie"
    )


def test_as_many_images_have_truth_as_are_asked_for(tmp_path: Path) -> None:
    """Also where their number does not divide that of the images; all where there are fewer."""
    for wanted in (7, 40):
        options = {"truth_images": wanted, "truth_rollouts": 2, "truth_steps": 2, "sigmas": [0.5]}
        module = world_run(tmp_path / str(wanted), WorldData(n=10), **options)
        found = {r["n"] for r in module.records if r["metric"] == "truth/r2"}
        assert found == {min(wanted, 10)}


def test_roll_outs_are_scored_one_by_one_where_no_average_can_be(tmp_path: Path) -> None:
    estimators = {
        "mean": MonteCarloFactory(rollouts=4, steps=3),
        "soft": MonteCarloFactory(rollouts=4, steps=3, reduction="log_mean_exp"),
    }
    options = {"sigmas": [0.6], "truth_images": 30, "truth_rollouts": 4, "truth_steps": 3}
    module = run(
        tmp_path,
        WorldData(),
        estimators,
        reward=lambda: BentReward(known()),
        generator=lambda: WorldGenerator(mixture()),
        vae=None,
        plot=False,
        **options,
    )
    z_0 = torch.stack([s["pixels"] for s in WorldData().samples])
    eps = keyed_normal([(0, "noise", i, "0.6") for i in range(60)], (2, 1, 1))
    z_t, t = FlowPath.interpolate(z_0, eps, 0.6), torch.full((60,), 0.6)
    target = torch.tensor([s["score"] for s in WorldData().samples])
    for name, estimator in module.values.items():
        streams = [keyed_generator(0, name, i, "0.6") for i in range(60)]
        expected = spearman_corrcoef(estimator.bind(generator=streams)(z_t, t), target)
        found = value(module.records, "aesthetic/srcc", 0.6, name)
        assert found == pytest.approx(float(expected), abs=1e-4)


def test_roll_outs_of_the_truth_come_in_batches(tmp_path: Path, monkeypatch) -> None:
    rows: list[int] = []
    decode = WorldGenerator.velocity

    def spy(self: Any, z_t: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        rows.append(len(z_t))
        return decode(self, z_t, *args, **options)

    monkeypatch.setattr(WorldGenerator, "velocity", spy)
    data = WorldData(n=4, batch_size=4)
    options = {"sigmas": [0.5], "truth_images": 4, "truth_rollouts": 4, "truth_steps": 3}
    whole = world_run(tmp_path / "whole", data, **options)
    assert 16 in rows
    rows.clear()
    parts = world_run(tmp_path / "parts", data, truth_batch_size=3, **options)
    assert rows.count(3) == 15 and 16 not in rows  # five whole batches of three steps
    same(whole.records, parts.records)
    with pytest.raises(ValueError, match="truth_batch_size = 0"):
        world_run(tmp_path / "none", data, truth_batch_size=0, **options)


def test_two_processes_measure_the_same(tmp_path: Path) -> None:
    """Seven samples on two processes: Lightning's sampler repeats one, which must not count."""
    data = WorldData(n=7, batch_size=2)
    options = {"sigmas": [0.5], "truth_images": 3, "truth_rollouts": 4, "truth_steps": 3}
    alone = world_run(tmp_path / "one", data, **options)
    module = ValueEvaluation(
        {"tweedie": TweedieFactory(), "monte_carlo": MonteCarloFactory(rollouts=8, steps=6)},
        reward=lambda: ClosedFormReward(known()),
        generator=lambda: WorldGenerator(mixture()),
        plot=False,
        **options,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path / "two"),
    )
    trainer.test(module, data, verbose=False)
    content = json.loads((tmp_path / "two" / "metrics.json").read_text())
    together = content["records"]
    same([r | {"stderr": 0} for r in alone.records], [r | {"stderr": 0} for r in together])
    assert {r["n"] for r in together if r["metric"] == "aesthetic/srcc"} == {7}
