"""One GPU and the paper's sixteen make the same updates; what is sharded differs in nothing else than it must."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.configs.test_all import CONFIGS, parse

TRAINER = CONFIGS / "trainer"
TABLE_3 = ["grpo_fast", *(f"draft{K}{s}" for K in (1, 3) for s in ("", "_stitched"))]
TABLE_3 += ["nft", "nft_stitched"]
SHARDED = [
    (method, network)
    for method in ("draft1", "draft1_stitched", "nft", "nft_stitched")
    for network in ("sd35l", "flux")
]


def run(name: str, *more: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    return parse(CONFIGS / f"{name}.yaml", *more, monkeypatch=monkeypatch).config.fit


@pytest.mark.parametrize("name", TABLE_3)
def test_every_row_of_table_3_on_one_gpu_and_on_sixteen(name, monkeypatch):
    """DRaFT: 8 per device × 16 accumulated × 16 (Appendix D.3); the others: 72 images per device, 8 passes of 9."""
    file = yaml.safe_load((CONFIGS / f"{name}_sd35m.yaml").read_text())
    assert file["trainer"]["devices"] == 1 and not {"num_nodes", "strategy"} & set(file["trainer"])
    more = ["--config", str(TRAINER / "paper16.yaml")]
    config = run(f"{name}_sd35m", *more, monkeypatch=monkeypatch)
    devices = config.trainer.num_nodes * config.trainer.devices
    assert devices == 16 and config.trainer.strategy == "ddp"
    model, prompts = config.model.init_args, config.data.init_args.prompts_per_update
    assert prompts == file["data"]["init_args"]["prompts_per_update"]
    assert prompts % devices == 0
    images = prompts // devices * model.group_size
    assert images % model.micro_batch == 0
    passes = (images // model.micro_batch, model.micro_batch)
    assert passes == ((16, 8) if name.startswith("draft") else (8, 9))


def test_back_to_one_gpu(monkeypatch):
    more = ["--config", str(TRAINER / "paper16.yaml"), "--config", str(TRAINER / "one_gpu.yaml")]
    trainer = run("nft_stitched_sd35m", *more, monkeypatch=monkeypatch).trainer
    assert (trainer.num_nodes, trainer.devices, trainer.strategy) == (1, 1, "auto")


@pytest.mark.parametrize("name", ["one_gpu", "paper16", "paper16_fsdp2"])
def test_nothing_but_devices_is_set(name):
    overlay = yaml.safe_load((TRAINER / f"{name}.yaml").read_text())
    assert set(overlay) == {"trainer"}
    assert set(overlay["trainer"]) == {"accelerator", "num_nodes", "devices", "strategy"}


@pytest.mark.parametrize(
    "windows", ["nft_stitched_sd35m", "nft_stitched_sd35l", "nft_stitched_flux"]
)
def test_the_windows_of_figure_7_are_said(windows):
    text = (CONFIGS / f"{windows}.yaml").read_text()
    assert yaml.safe_load(text)["model"]["init_args"]["stop"] == [12, 17]
    assert all(f"'[{low}, {high}]'" in text for low, high in ((12, 25), (2, 12), (20, 25)))


@pytest.mark.parametrize(("method", "network"), SHARDED, ids=map("_".join, SHARDED))
def test_larger_networks_are_sharded_and_trained_alike(method, network):
    own, medium = (
        yaml.safe_load((CONFIGS / f"{method}_{which}.yaml").read_text())
        for which in (network, "sd35m")
    )
    sharded = own["trainer"].pop("strategy")
    assert sharded["class_path"].endswith("ModelParallelStrategy")
    assert sharded["init_args"] == {
        "data_parallel_size": own["trainer"].pop("devices"),
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,
    }
    for config in (own, medium):
        for key in ("accelerator", "devices", "default_root_dir"):
            config["trainer"].pop(key, None)
        del config["data"]["init_args"]["batch_size"]
    assert own["trainer"] == medium["trainer"] and own["data"] == medium["data"]
    mine, theirs = own["model"]["init_args"], medium["model"]["init_args"]
    assert mine.pop("generator") == f"generators/{network}.yaml"
    assert mine.pop("gradient_checkpointing") is True
    if "stitched" in method:
        assert mine.pop("value") == f"values/{network}_dfn_clip_hpsv2.yaml"
    different = {"generator", "value", "gradient_checkpointing", "micro_batch"}
    if network == "flux":  # its own levels, and a guidance that is told
        assert (mine["grid"], mine["guidance_scale"]) == ("pipeline", 3.5)
        assert mine["evaluation"]["sampler"]["init_args"] == {
            "num_steps": 28,
            "guidance_scale": 3.5,
        }
        different |= {"grid", "shift", "guidance_scale", "evaluation"}
    left = [{k: v for k, v in each.items() if k not in different} for each in (mine, theirs)]
    if "stitched" in method:
        left[1].pop("value", None)
    else:
        assert mine["value"] == theirs["value"]
    assert left[0] == left[1]


@pytest.mark.parametrize(("method", "network"), SHARDED, ids=map("_".join, SHARDED))
def test_sharded_over_sixteen(method, network, monkeypatch):
    more = ["--config", str(TRAINER / "paper16_fsdp2.yaml")]
    if method.startswith("draft"):
        more += ["--model.backprop_steps", "3"]  # as its head says of DRaFT-3
    config = run(f"{method}_{network}", *more, monkeypatch=monkeypatch)
    trainer, sizes = config.trainer, config.trainer.strategy.init_args
    assert (trainer.num_nodes, trainer.devices, sizes.data_parallel_size) == (4, 4, 16)
    assert (sizes.tensor_parallel_size, sizes.save_distributed_checkpoint) == (1, False)
    assert config.data.init_args.prompts_per_update % 16 == 0
    if "stitched" in method:
        terms = config.model.init_args.value.init_args.terms
        found = {name: term["value"]["init_args"]["path"] for name, term in terms.items()}
        assert found == {
            reward: f"runs/distill_{network}_{reward}/value_model"
            for reward in ("dfn_clip", "hpsv2")
        }
        assert all(term["value"]["init_args"]["share_generator"] for term in terms.values())
    if method.startswith("draft"):
        assert config.model.init_args.backprop_steps == 3
