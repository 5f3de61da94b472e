"""Rewards: every published layout is ok as it stands, and every fault is told."""

from __future__ import annotations

import pytest
import torch
from rehearsal_hub import snapshot

from stitchvm.preflight.walk import check
from stitchvm.rewards import aesthetic
from tests.preflight.conftest import change, part, replace, run

CLIP, DFN = "ViT-L-14-336-quickgelu", "ViT-H-14-378-quickgelu"
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
PICK, IMAGE = "yuvalkirstain/PickScore_v1", "THUDM/ImageReward"


def bad(reward):
    """The one finding that is not ok."""
    found = [f for f in check(run(reward=reward)) if f.state != "ok"]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    "reward",
    [
        part("CLIPReward", model=CLIP, checkpoint="openai"),
        part("CLIPReward", model=DFN, checkpoint="dfn5b"),
        part("HPSv2Reward"),
        part("AestheticReward"),
        part("PickScoreReward"),
        part("ImageReward"),
        part("CLIPReward", model="world:clip"),
        part("HPSv2Reward", model="world:hps"),
        part("AestheticReward", model="world:aesthetic"),
    ],
    ids=lambda r: r["class_path"].rpartition(".")[2] + r["init_args"].get("model", ""),
)
def test_published_layouts_are_ok(hub, reward):
    found = check(run(reward=reward))
    assert found and {f.state for f in found} == {"ok"}


def test_a_file_and_a_folder_of_ones_own(hub, tmp_path):
    file = snapshot(hub, "xswu/HPSv2") / "HPS_v2.1_compressed.pt"
    own = part("HPSv2Reward", checkpoint=file)
    assert {f.state for f in check(run(reward=own))} == {"ok"}
    finding = bad(part("HPSv2Reward", checkpoint=tmp_path / "hps.pt"))
    assert finding.state == "missing" and finding.what.endswith("hps.pt")
    finding = bad(part("CLIPReward", model=f"local-dir:{tmp_path}"))
    assert finding.state == "missing" and finding.what.endswith("open_clip_config.json")


def test_names_that_open_clip_does_not_have(hub):
    assert "no architecture" in bad(part("CLIPReward", model="ViT-Z-99")).detail
    finding = bad(part("CLIPReward", model=CLIP, checkpoint="openia"))
    assert finding.state == "wrong" and "openia" in finding.detail
    finding = bad(part("HPSv2Reward", version="v9"))
    assert finding.state == "wrong" and "v2.1" in finding.remedy


def test_the_other_activation(hub):
    finding = bad(part("CLIPReward", model="ViT-L-14-336", checkpoint="openai"))
    assert finding.state == "wrong" and "QuickGELU mismatch" in finding.detail
    assert "ViT-L-14-336-quickgelu" in finding.detail


def test_weights_of_another_architecture(hub):
    """The tower of 336 pixels in the place of the one of 224."""
    file = snapshot(hub, "timm/vit_large_patch14_clip_336.openai") / "open_clip_model.safetensors"
    finding = bad(part("CLIPReward", model="ViT-L-14-quickgelu", checkpoint=file))
    assert finding.state == "wrong" and "visual.positional_embedding" in finding.detail


def test_truncated_torch_files(hub, copy, tmp_path):
    file = snapshot(hub, "xswu/HPSv2") / "HPS_v2.1_compressed.pt"
    half = tmp_path / "half.pt"
    half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    finding = bad(part("HPSv2Reward", checkpoint=half))
    assert finding.state == "wrong" and "truncated" in finding.detail
    half.write_text("<!doctype html>")
    assert "web page" in bad(part("HPSv2Reward", checkpoint=half)).detail
    old = tmp_path / "old.pt"  # before torch 1.6: a pickle
    torch.save({"a": torch.zeros(1)}, old, _use_new_zipfile_serialization=False)
    assert {f.state for f in check(run(reward=part("HPSv2Reward", checkpoint=old)))} == {"ok"}


def test_the_aesthetic_head(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(aesthetic, "SHA256", {HEAD: "0" * 64})
    finding = bad(part("AestheticReward"))
    assert finding.what == HEAD and finding.state == "wrong" and "SHA-256" in finding.detail
    monkeypatch.setenv("STITCHVM_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert bad(part("AestheticReward")).state == "download"
    finding = bad(part("AestheticReward", head=tmp_path / "head.pth"))
    assert finding.state == "missing" and finding.what.endswith("head.pth")
    given = part("AestheticReward", head=hub / "cache" / HEAD)
    assert {f.state for f in check(run(reward=given))} == {"ok"}


def test_pickscore(copy, monkeypatch, tmp_path):
    folder = copy(PICK)
    change(folder / "config.json", model_type="siglip")
    assert "'siglip'" in bad(part("PickScoreReward", model=folder)).detail
    change(folder / "config.json", model_type="clip")
    finding = bad(part("PickScoreReward", model=folder, processor=tmp_path))
    assert finding.state == "missing" and "tokenizer" in finding.what
    (folder / "model.safetensors").unlink()
    assert bad(part("PickScoreReward", model=folder)).what.endswith("model.safetensors")


def test_imagereward(copy):
    folder = copy(IMAGE)
    replace(folder / "med_config.json", {"hidden_size": 768})
    assert "vocab_size" in bad(part("ImageReward", model=folder)).detail
    (folder / "med_config.json").unlink()
    assert bad(part("ImageReward", model=folder)).what.endswith("med_config.json")
