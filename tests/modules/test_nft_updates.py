"""DiffusionNFT over several updates: steps, the old policy and the average, logs, skipped updates, going on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stitchvm.modules.grpo import FlowGRPO
from stitchvm.modules.nft import DiffusionNFT
from stitchvm.objectives.nft import ema_decay, old_decay
from stitchvm.values.terms import Scored
from tests.modules import alignment_runs as runs
from tests.modules.alignment_worlds import gaussian, in_a_world


def made(method: type = DiffusionNFT, **changes: Any) -> Any:
    """Returns a module in a Gaussian world: 3 steps, groups of 4, four prompts an update."""
    settings = {"group_size": 4, "lr": 0.02, "stop": [2, 3]} | changes
    return in_a_world(method, gaussian(), 3, **settings)


def test_the_old_policy_and_the_average_follow_by_their_schedules(tmp_path):
    """θ_old and θ_ema after each update, from the policies that training has gone through (71)."""

    class Watched(DiffusionNFT):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            path.append({name: self.policy.weights(name) for name in ("default", "old", "ema")})

    path: list = []
    module = made(Watched, decay_type=1)
    old = ema = module.policy.weights()
    runs.fit(module, tmp_path, max_steps=4, max_epochs=-1)
    assert len(path) == 4
    for step, found in enumerate(path, 1):
        theta, rho, d = found["default"], old_decay(step, 1), ema_decay(step)
        assert rho == 0.001 * step and d == (1 + step) / (10 + step)
        old = {k: rho * old[k] + (1 - rho) * theta[k] for k in theta}
        ema = {k: d * ema[k] + (1 - d) * theta[k] for k in theta}
        torch.testing.assert_close(found["old"]["shift"], old["shift"])
        torch.testing.assert_close(found["ema"]["shift"], ema["shift"])
    assert (path[3]["default"]["shift"] - path[0]["default"]["shift"]).abs().max() > 0.01


def test_inner_steps_share_the_images_and_the_old_policy_waits(tmp_path):
    """Two optimiser steps an update: each image in one of them, half a group in each, old moved after the second."""
    seen, moves = [], []

    class Watched(DiffusionNFT):
        def losses(self, some, cond, rolled, n):
            images = list(zip(some.index, some.number, strict=True))
            seen.append((self.trainer.global_step, n, images))
            return super().losses(some, cond, rolled, n)

        def after_step(self, step: int) -> None:
            before = self.policy.weights("old")["shift"]
            super().after_step(step)
            moves.append(not torch.equal(before, self.policy.weights("old")["shift"]))

    trainer = runs.fit(made(Watched, inner_steps=2, decay_type=0), tmp_path, max_steps=4)
    assert trainer.global_step == 4 and moves == [False, True, False, True]
    for step in range(4):
        images = [i for at, n, each in seen if at == step and n == 0 for i in each]
        assert sorted(number for _, number in images) == [step % 2] * 4 + [2 + step % 2] * 4
    updates = [
        {i for at, _, each in seen if at in pair for i, _ in each} for pair in ((0, 1), (2, 3))
    ]
    assert len(updates[0]) == len(updates[1]) == 4 and updates[0] != updates[1]


def test_the_stop_is_drawn_for_each_update(tmp_path):
    """All stops of the window come, and the levels are those above τ."""

    class Watched(DiffusionNFT):
        def rollout(self, some):
            rolled = super().rollout(some)
            found.append((float(rolled.tau), rolled.levels))
            return rolled

    found: list = []
    module = made(Watched, stop=[1, 3], fraction=1.0)
    runs.fit(module, tmp_path, max_steps=8, max_epochs=-1)
    sigmas = module.sigmas.tolist()
    assert {tau for tau, _ in found} == set(sigmas[1:])
    for tau, levels in found:
        above = torch.tensor([s for s in sigmas if s > tau])
        assert torch.equal(levels.sort(descending=True).values, above.expand(16, -1))


def test_what_is_logged(tmp_path):
    """The names the issue asks for, once an update, and a histogram of r."""
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    module = made(lam=0.1)
    runs.fit(module, tmp_path, max_steps=2, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    names = {"reward", "reward_std", "group_std", "zero_spread", "advantage_std", "adv_clipped"}
    names |= {"r", "tau", "positive", "negative", "regulariser", "loss", "grad_norm"}
    names |= {"distance_old", "distance_ema", "skipped"}
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in names} <= tags
    assert {f"seconds/{name}" for name in ("rollout", "value", "update")} <= tags
    histograms = events.Histograms("train/r")
    assert [h.step for h in histograms] == [0, 1]
    assert histograms[0].histogram_value.num == 16
    low, high = histograms[0].histogram_value.min, histograms[0].histogram_value.max
    assert 0 <= low < 0.5 < high <= 1
    distance = module.policy.distance("old")
    assert events.Scalars("train/distance_old")[-1].value == pytest.approx(float(distance))


def test_a_histogram_is_at_the_optimisers_step_as_everything_else_is(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    module = made(inner_steps=2)
    runs.fit(module, tmp_path, max_steps=6, max_epochs=-1, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in events.Scalars("train/r")] == [2, 4, 6]
    assert [h.step for h in events.Histograms("train/r")] == [0, 2, 4]  # drawn before the steps


def test_a_reward_that_is_not_finite_skips_the_update(tmp_path):
    """Weights, copies and counters stay; the next update goes on."""

    class Broken(DiffusionNFT):
        def scored(self, some, z, tau, name="reward"):
            found = super().scored(some, z, tau, name)
            return Scored(found.value * math.nan) if self.update == 1 else found

        def rollout(self, some):
            states.append(self.policy.state())
            return super().rollout(some)

    states: list = []
    module = made(Broken)
    trainer = runs.fit(module, tmp_path, max_steps=2, max_epochs=-1)
    assert trainer.global_step == 2 and module.skipped == 1 and len(states) == 3
    runs.assert_equal(states[1], states[2])
    assert any(not torch.equal(x, states[1][k]) for k, x in states[0].items())


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    trainer = runs.fit(made(FlowGRPO, window=1, bounds=[0, 2]), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "grpo.ckpt")
    with pytest.raises(ValueError, match=r"method FlowGRPO \(here DiffusionNFT\)"):
        runs.fit(made(), tmp_path, ckpt_path=tmp_path / "grpo.ckpt")


@pytest.mark.parametrize("method", [DiffusionNFT, FlowGRPO])
def test_resume_is_exact(tmp_path, method):
    """Two updates of two steps, and two more after a resume, are four updates, bit for bit."""
    own = {"window": 1, "bounds": [0, 2]} if method is FlowGRPO else {}
    files = []
    for name, more in (("whole", {}), ("resumed", {"ckpt_path": tmp_path / "whole/step=4.ckpt"})):
        kept = ModelCheckpoint(
            tmp_path / name, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=False
        )
        options = {"max_steps": 8, "callbacks": [kept], "enable_checkpointing": True}
        runs.fit(made(method, inner_steps=2, **own), tmp_path, **options, **more)
        files.append(torch.load(tmp_path / name / "step=8.ckpt", weights_only=True))
        torch.manual_seed(9)
    runs.assert_same(*files)
    names = {key.split(".", 1)[0] for key in files[0]["policy"]}
    assert names == {"default", "ema"} | ({"old", "base"} if method is DiffusionNFT else set())
