"""DRaFT in real processes: killed and resumed, on two processes with DDP and with FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.modules import alignment_runs, runs
from tests.modules.alignment_runs import assert_close, assert_same
from tests.modules.runs import FSDP2, fit
from tests.modules.sampling_runs import value_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def make(tiny_sd3, tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    value_model(tiny_sd3, tiny_clip, folder / "value")
    stitched = {  # on the trained transformer, with gradients through its blocks
        "value": {
            "class_path": "stitchvm.values.stitched.StitchedFactory",
            "init_args": {"path": str(folder / "value"), "share_generator": True},
        },
        "stop": [2, 3],
        "backprop_steps": 2,
    }

    def config(
        name: str,
        strategy: Any = None,
        max_steps: int = 5,
        precision: str = "32-true",
        **model: Any,
    ) -> Path:
        made = alignment_runs.draft_config(
            tiny_sd3, tiny_clip, folder / name, **(stitched | model)
        )
        if precision != "32-true":
            made["model"]["init_args"]["generator"]["init_args"]["dtype"] = "bfloat16"
        made["trainer"]["precision"] = precision
        return runs.write_run(made, folder / name, strategy, max_steps)

    return config


@pytest.fixture(scope="module")
def single(make):
    """The uninterrupted run on one process."""
    return fit(make("single"))


def test_a_killed_run_resumes_bit_for_bit(make, single):
    root = make("killed", max_steps=100_000)
    three = runs.killed_at(root, 3)
    make("killed")
    assert_same(single, fit(root, "--ckpt_path", str(three)))


def test_last_resumes_and_another_lora_is_refused(make, single):
    root = make("last", max_steps=3)
    fit(root)
    other = {"class_path": "stitchvm.adapters.lora.PolicyAdapters", "init_args": {"r": 3}}
    make("last", policy=other)
    refused = runs.start("fit", "--config", root.with_suffix(".yaml"), "--ckpt_path", "last")
    output, _ = refused.communicate(timeout=240)
    assert refused.returncode == 1 and "Traceback" not in output
    assert "alpha 4.0 (here 64.0)" in output and "r 2 (here 3)" in output
    make("last")
    assert_same(single, fit(root, "--ckpt_path", "last"))


def test_two_processes_with_ddp_equal_one(make, single):
    assert_close(single, fit(make("ddp", strategy="ddp")))


def test_two_processes_with_fsdp2_equal_one_and_checkpoints_are_exchanged(make, single):
    root = make("fsdp", strategy=FSDP2, max_steps=2)
    half = fit(root)
    assert half["state_dict"] == {} and half["policy"].keys() == single["policy"].keys()
    make("fsdp", strategy=FSDP2, max_steps=4)  # on shards again, then with one process
    fit(root, "--ckpt_path", "last")
    make("fsdp")
    assert_close(single, fit(root, "--ckpt_path", "last"))
    root = make("ddp_first", strategy="ddp", max_steps=2)
    fit(root)
    make("ddp_first", strategy=FSDP2)
    assert_close(single, fit(root, "--ckpt_path", "last"))


def test_all_weights_go_on_from_one_process_to_shards_and_back(make):
    full = {
        "policy": {"class_path": "stitchvm.adapters.full.PolicyWeights"},
        "value": {"class_path": "stitchvm.values.terminal.TerminalFactory"},
        "stop": None,
        "backprop_steps": 1,
        "lr": 1e-3,
    }
    whole = fit(make("full", max_steps=4, **full))
    root = make("shards", max_steps=2, **full)
    fit(root)
    make("shards", strategy=FSDP2, max_steps=3, **full)
    fit(root, "--ckpt_path", "last")
    make("shards", max_steps=4, **full)
    found = fit(root, "--ckpt_path", "last")
    assert_close(whole, found)
    moments = [s["optimizer_states"][0]["state"] for s in (whole, found)]
    assert moments[0].keys() == moments[1].keys()
    for number, state in moments[0].items():
        torch.testing.assert_close(
            moments[1][number]["exp_avg"], state["exp_avg"], rtol=1e-2, atol=1e-4
        )


def test_frozen_weights_in_bfloat16_on_shards(make, single):
    """LoRA is float32 beside them; the updates are those of one process, up to what bfloat16 leaves."""
    found = {}
    for name, strategy in (("bf16", None), ("bf16_fsdp", FSDP2)):
        made = make(name, strategy=strategy, precision="bf16-mixed", max_steps=2)
        found[name] = fit(made)["policy"]
    one, two = (
        torch.cat(
            [p.flatten() for k, p in each.items() if k.startswith("default") and "lora_B" in k]
        )
        for each in found.values()
    )
    assert one.dtype == torch.float32 and one.norm() > 0.1
    assert torch.cosine_similarity(one, two, dim=0) > 0.95
