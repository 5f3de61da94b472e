"""Checkpoints of alignment runs: exact resuming, what they hold, and which are refused."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from stitchvm.data.prompts import Prompts
from stitchvm.modules.draft import DRaFT
from stitchvm.modules.held_out import Evaluation
from stitchvm.modules.rows import Rows
from stitchvm.rewards.clip import CLIPReward
from stitchvm.samplers.plain import PlainSampler
from tests.modules import alignment_runs as runs
from tests.modules.alignment_fakes import Broken, draft
from tests.modules.alignment_runs import load, save_every_step


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    """Also after a skipped update, and in the middle of the second epoch of two updates."""
    value = Broken("value", 4)
    runs.fit(
        draft(value, warmup_steps=3), tmp_path, max_steps=5, **save_every_step(tmp_path / "a")
    )
    whole = load(tmp_path / "a" / "step=5.ckpt")
    assert whole["alignment"]["skipped"] == 1
    middle = tmp_path / "a" / "step=2.ckpt"
    assert load(middle)["alignment"]["skipped"] == 1
    module = draft(warmup_steps=3)
    runs.fit(module, tmp_path, max_steps=5, ckpt_path=middle, **save_every_step(tmp_path / "b"))
    runs.assert_same(whole, load(tmp_path / "b" / "step=5.ckpt"))
    assert not torch.equal(
        whole["policy"]["default.W"], load(tmp_path / "a" / "step=4.ckpt")["policy"]["default.W"]
    )


def test_a_run_that_ends_between_two_checkpoints_leaves_its_last_step(tmp_path):
    def every_second(name):
        callback = ModelCheckpoint(tmp_path / name, every_n_train_steps=2, save_last=True)
        return {"callbacks": [callback], "enable_checkpointing": True}

    runs.fit(draft(), tmp_path, max_steps=3, **every_second("a"))
    assert load(tmp_path / "a" / "last.ckpt")["global_step"] == 3
    last = tmp_path / "a" / "last.ckpt"
    runs.fit(draft(), tmp_path, max_steps=5, ckpt_path=last, **save_every_step(tmp_path / "b"))
    runs.fit(draft(), tmp_path, max_steps=5, **save_every_step(tmp_path / "whole"))
    runs.assert_same(
        load(tmp_path / "whole" / "step=5.ckpt"), load(tmp_path / "b" / "step=5.ckpt")
    )


class Interrupted(DRaFT):
    """Gets a Ctrl-C in its fourth update."""

    where = "nowhere"

    def losses(self, rows: Rows, stop: int) -> Tensor:
        if self.where == "before the step" and rows.update == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().losses(rows, stop)

    def after_step(self, step: int) -> None:
        if self.where == "in the step" and step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        self.policy.update_ema(0.5)  # what an interrupt must not leave out

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if self.where == "after the step" and self.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["before the step", "in the step", "after the step"])
def test_a_run_that_ctrl_c_ends_goes_on_bit_for_bit(where, tmp_path, ctrl_c):
    """As the configurations say, it saves where it was."""
    module = draft(cls=Interrupted, warmup_steps=5)
    module.where = where
    kept = ModelCheckpoint(tmp_path / "a", save_last=True, save_on_exception=True)
    with pytest.raises(SystemExit):
        runs.fit(module, tmp_path, max_steps=6, enable_checkpointing=True, callbacks=[kept])
    last = tmp_path / "a" / "last.ckpt"
    assert load(last)["global_step"] == (3 if where == "before the step" else 4)
    for name, more in (("resumed", {"ckpt_path": last}), ("whole", {})):
        module = draft(cls=Interrupted, warmup_steps=5)
        runs.fit(module, tmp_path, max_steps=6, **more, **save_every_step(tmp_path / name))
    files = [load(tmp_path / name / "step=6.ckpt") for name in ("whole", "resumed")]
    runs.assert_same(*files)
    assert files[0]["Prompts"] == files[1]["Prompts"]


def test_a_resume_that_fails_leaves_the_checkpoint_as_it_was(tmp_path, monkeypatch):
    """When memory runs out while the optimiser's moments are loaded, the loops have counted the steps already."""

    def kept() -> dict[str, Any]:
        callback = ModelCheckpoint(tmp_path / "a", save_last=True, save_on_exception=True)
        return {"enable_checkpointing": True, "callbacks": [callback]}

    runs.fit(draft(), tmp_path, max_steps=2, **kept())
    last = tmp_path / "a" / "last.ckpt"
    before = last.read_bytes()

    def fails(self: Any, state: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.optim.Optimizer, "load_state_dict", fails)
        runs.fit(draft(), tmp_path, max_steps=4, ckpt_path=last, **kept())
    assert last.read_bytes() == before
    runs.fit(draft(), tmp_path, max_steps=4, ckpt_path=last, **kept())
    assert load(last)["global_step"] == 4


@pytest.mark.parametrize("before", [False, True], ids=["in an update", "in the evaluation before"])
def test_texts_are_encoded_whatever_their_neighbours(tiny_sd3, tmp_path, before):
    """In a batch they would be rounded with each other, and a run that goes on encodes others together."""
    prompts = [
        f"a {colour} {shape} on a {tone} background"
        for colour in ("red", "green")
        for shape in ("circle", "square")
        for tone in ("dark", "light")
    ]
    clip = partial(CLIPReward, "world:clip")
    sampler = PlainSampler(num_steps=1, guidance_scale=1.0, grid="single")
    module = DRaFT(
        generator=runs.generator(tiny_sd3),
        reward=clip,
        policy=runs.policy(),
        num_steps=2,
        micro_batch=None,
        prompts_ahead=1,
        evaluation=Evaluation({"clip": clip}, sampler=sampler),
    )
    data = Prompts(prompts=prompts, prompts_per_update=8)
    evaluated = {"limit_val_batches": None, "num_sanity_val_steps": -1} if before else {}
    runs.fit(module, tmp_path, max_steps=1, data=data, **evaluated)
    reward: Any = module._built.value.reward
    generator, other = runs.generator(tiny_sd3)(), CLIPReward("world:clip")
    for prompt in prompts:
        assert torch.equal(reward.encode_text([prompt]), other.encode_text([prompt]))
        kept, alone = (g.encode_prompts([prompt]) for g in (module.generator, generator))
        assert torch.equal(kept.tokens, alone.tokens) and torch.equal(kept.pooled, alone.pooled)


@pytest.fixture
def saved(tmp_path):
    runs.fit(draft(), tmp_path, max_steps=1, **save_every_step(tmp_path / "saved"))
    return tmp_path / "saved" / "step=1.ckpt"


def test_a_checkpoint_holds_the_policy_and_nothing_pretrained(saved):
    state = load(saved)
    assert state["state_dict"] == {}
    assert set(state["policy"]) == {
        f"{name}.{key}" for name in ("default", "ema", "base") for key in ("W", "b")
    }
    assert state["alignment"]["method"] == "DRaFT"
    assert len(state["optimizer_states"][0]["state"]) == 2
    # numbered as under FSDP2, where a mark comes before them
    assert [group["params"] for group in state["optimizer_states"][0]["param_groups"]] == [[1, 2]]


class OtherMethod(DRaFT):
    pass


def test_checkpoints_of_something_else_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"method DRaFT \(here OtherMethod\)"):
        runs.fit(draft(cls=OtherMethod), tmp_path, ckpt_path=saved)
    with pytest.raises(ValueError, match=r"copies \['ema', 'base'\] \(here \['ema'\]\)"):
        runs.fit(draft(lam=0.0), tmp_path, ckpt_path=saved)
    state = load(saved)
    state["alignment"]["policy"] = {"class": "PolicyAdapters", "r": 4, "layers": ["x"] * 9}
    torch.save(state, tmp_path / "lora.ckpt")
    with pytest.raises(
        ValueError, match=r"class PolicyAdapters \(here PolicyWeights\).*layers 9 of them.*r 4 \("
    ):
        runs.fit(draft(), tmp_path, ckpt_path=tmp_path / "lora.ckpt")
    del state["alignment"]
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="of no alignment run, DRaFT cannot go on from it"):
        runs.fit(draft(), tmp_path, ckpt_path=tmp_path / "other.ckpt")
