"""Checkpoints of alignment runs: exact resuming, what they hold, and which are refused."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from stitchvm.modules.draft import DRaFT
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
