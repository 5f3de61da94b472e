"""DiffusionNFT and Flow-GRPO in real processes: killed and resumed, on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.modules import alignment_runs, runs
from tests.modules.alignment_runs import assert_close, assert_same
from tests.modules.runs import FSDP2, fit
from tests.modules.sampling_runs import value_model

pytestmark = pytest.mark.slow

METHODS = {
    # stopped at a value on the trained transformer; two terms of the loss; the old policy lags behind
    "nft": {"class_path": "stitchvm.modules.nft.DiffusionNFT", "stop": [2, 3], "decay_type": 1},
    # two steps an update, plain and with the frozen model
    "grpo": {
        "class_path": "stitchvm.modules.grpo.FlowGRPO",
        "window": 1,
        "bounds": [0, 2],
        "inner_steps": 2,
        "kl": 0.1,
    },
}


@pytest.fixture(scope="module", params=sorted(METHODS))
def make(request, tiny_sd3, tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    settings = dict(METHODS[request.param])
    if "stop" in settings:
        value_model(tiny_sd3, tiny_clip, folder / "value")
        settings["value"] = {
            "class_path": "stitchvm.values.stitched.StitchedFactory",
            "init_args": {"path": str(folder / "value"), "share_generator": True},
        }

    def config(name: str, strategy: Any = None, max_steps: int = 6) -> Path:
        made = alignment_runs.draft_config(tiny_sd3, tiny_clip, folder / name)
        init_args = made["model"]["init_args"] | settings
        made["model"]["class_path"] = init_args.pop("class_path")
        if "grpo" in folder.name:
            init_args.pop("lam")
        made["model"]["init_args"] = init_args
        return runs.write_run(made, folder / name, strategy, max_steps)

    return config


@pytest.fixture(scope="module")
def single(make):
    """The uninterrupted run on one process."""
    return fit(make("single"))


def test_a_killed_run_resumes_bit_for_bit(make, single):
    """Policy, old policy, average, optimiser and counters, from a checkpoint in the middle of the run."""
    root = make("killed", max_steps=100_000)
    four = runs.killed_at(root, 4)
    make("killed")
    resumed = fit(root, "--ckpt_path", str(four))
    assert_same(single, resumed)
    names = {key.split(".", 1)[0] for key in single["policy"]}
    assert names == ({"default", "old", "ema"} if "nft" in str(root) else {"default", "ema"})


@pytest.mark.parametrize("strategy", ["ddp", FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(make, single, strategy):
    """The same groups, advantages over all of them, the same gradient up to rounding."""
    name = "ddp" if strategy == "ddp" else "fsdp2"
    assert_close(single, fit(make(name, strategy=strategy)))
