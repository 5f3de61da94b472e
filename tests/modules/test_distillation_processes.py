"""Distillation in real processes: killed and resumed, on two processes with DDP and with FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.modules import runs
from tests.modules.runs import FSDP2, fit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def make(tiny_sd3, tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    images = runs.write_images(folder / "images")

    def config(name: str, batch_size: int = 4, strategy=None, max_steps: int = 6, **model) -> Path:
        made = runs.distillation_config(tiny_sd3, tiny_clip, images, folder / name, **model)
        made["data"]["init_args"]["batch_size"] = batch_size
        return runs.write_run(made, folder / name, strategy, max_steps)

    return config


@pytest.fixture(scope="module")
def single(make):
    """The uninterrupted run on one process."""
    return fit(make("single"))


def assert_same(one: dict, two: dict) -> None:
    assert one["global_step"] == two["global_step"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    states = [c["optimizer_states"][0]["state"] for c in (one, two)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][number][key]), (number, key)


def assert_close(one: dict, two: dict) -> None:
    """Same weights up to rounding. A key bias of attention has no gradient at all: Adam moves it by rounding."""
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        other = two["state_dict"][key]
        if key.endswith("attn.in_proj_bias"):
            value, other = (
                torch.cat([b[: len(b) // 3], b[-len(b) // 3 :]]) for b in (value, other)
            )
        torch.testing.assert_close(
            other, value, rtol=2e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_a_killed_run_resumes_bit_for_bit_in_the_middle_of_an_epoch(make, single):
    root = make("killed", max_steps=100_000)
    four = runs.killed_at(root, 4)
    make("killed")
    assert_same(single, fit(root, "--ckpt_path", str(four)))


def test_last_resumes_and_a_finished_run_is_not_written_over(make, single):
    root = make("last", max_steps=4)
    fit(root)
    make("last")
    refused = runs.start("fit", "--config", root.with_suffix(".yaml"))
    output, _ = refused.communicate(timeout=240)
    assert refused.returncode == 1
    assert "--ckpt_path last" in output and "Traceback" not in output
    assert_same(single, fit(root, "--ckpt_path", "last"))


def test_two_processes_with_ddp_equal_one(make, single):
    assert_close(single, fit(make("ddp", batch_size=2, strategy="ddp")))
    compiled = make("ddp_compiled", batch_size=2, strategy="ddp", compile="aot_eager")
    assert_close(single, fit(compiled))


def test_two_processes_with_fsdp2_equal_one_and_checkpoints_are_exchanged(make, single):
    root = make("fsdp", batch_size=2, strategy=FSDP2, max_steps=4)
    half = fit(root)
    assert not any(key.startswith(("teacher.", "vae.")) for key in half["state_dict"])
    make("fsdp")  # goes on with one process
    assert_close(single, fit(root, "--ckpt_path", "last"))
    compiled = make("compiled", batch_size=2, strategy=FSDP2, compile="aot_eager")
    assert_close(single, fit(compiled))
    root = make("ddp_first", batch_size=2, strategy="ddp", max_steps=2)
    fit(root)
    make("ddp_first", batch_size=2, strategy=FSDP2)
    assert_close(single, fit(root, "--ckpt_path", "last"))
