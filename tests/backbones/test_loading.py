"""Tests of loading the first blocks only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stitchvm.backbones import loading
from stitchvm.backbones.sd3 import SD3Backbone
from tests.tiny import read_json, sd3_folder

SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD35_MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
FLUX_DEV = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}


@pytest.mark.parametrize(
    ("config", "depth", "millions"),
    [
        (SD35_MEDIUM, 4, 421),
        (SD35_MEDIUM, None, 2243),
        (SD35_LARGE, 4, 880),
        (SD35_LARGE, None, 8057),
        (FLUX_DEV, 19, 6502),
        (FLUX_DEV, None, 11901),
    ],
)
def test_parameters_of_the_published_models(
    config: dict[str, object], depth: int | None, millions: int
) -> None:
    model = loading.build_truncated(config, depth)
    assert all(p.is_meta for p in model.parameters())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny SD3 checkpoint in many shards."""
    return sd3_folder(tmp_path / "sharded", shard_size="60KB")


def test_only_the_shards_that_are_needed_are_opened(sharded: Path) -> None:
    index = read_json(sharded / "transformer" / f"{loading._WEIGHTS}.index.json")["weight_map"]
    whole = SD3Backbone(str(sharded), dtype="float32", null_tokens=12)
    needed = {
        file
        for key, file in index.items()
        if not key.startswith(("norm_out", "proj_out", "transformer_blocks."))
        or key.startswith("transformer_blocks.0.")
    }
    others = set(index.values()) - needed
    assert len(needed) > 1 and others
    for file in others:
        (sharded / "transformer" / file).unlink()
    cut = SD3Backbone(str(sharded), max_depth=1, dtype="float32", null_tokens=12)
    z_t, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    assert torch.equal(cut(z_t, t, 1), whole(z_t, t, 1))
    with pytest.raises(FileNotFoundError, match="complete the download"):
        SD3Backbone(str(sharded), dtype="float32", null_tokens=12)


def test_only_what_is_needed_is_downloaded(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id: configuration, the shards of the first block, and (once) the text encoders."""
    import huggingface_hub

    local = tmp_path / "hub" / "snapshots" / "0123abcd"

    def download(name: str, *, revision: str | None, allow_patterns: list[str] | None) -> str:
        assert (name, revision) == ("org/name", None)
        files = [f.relative_to(sharded).as_posix() for f in sharded.rglob("*") if f.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns
        ):
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(sharded / file, local / file)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    settings = {"max_depth": 1, "dtype": "float32", "null_tokens": 12}
    first = SD3Backbone("org/name", **settings)
    assert not (local / "vae").exists()
    assert (local / "text_encoder_3" / "model.safetensors").exists()
    there = len(list((local / "transformer").glob("*.safetensors")))
    assert 0 < there < len(list((sharded / "transformer").glob("*.safetensors")))
    shutil.rmtree(local)
    second = SD3Backbone("org/name", **settings)
    assert not list(local.glob("text_encoder*"))
    z_t, t = torch.randn(1, 4, 8, 8), torch.rand(1)
    assert torch.equal(first(z_t, t, 1), second(z_t, t, 1))
    assert first.init_args["path"] == "org/name"


def edited(source: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """Copies a pipeline and changes tensors of its transformer (None removes one)."""
    shutil.copytree(source, folder)
    file = folder / "transformer" / loading._WEIGHTS
    tensors = load_file(file)
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    file.unlink()
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("key", ["transformer_blocks.0.attn.to_q.weight", "pos_embed.pos_embed"])
def test_missing_and_misshapen_tensors_are_named(key: str, tiny_sd3: Path, tmp_path: Path) -> None:
    folder = edited(tiny_sd3, tmp_path / "missing", **{key: None})
    with pytest.raises(ValueError, match=f"no tensor '{key}'"):
        SD3Backbone(str(folder), max_depth=1, null_tokens=12)
    folder = edited(tiny_sd3, tmp_path / "shape", **{key: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=rf"tensor '{key}' has shape \(2, 2\), expected"):
        SD3Backbone(str(folder), max_depth=1, null_tokens=12)


def test_a_tensor_missing_from_the_index_is_named(sharded: Path) -> None:
    index = sharded / "transformer" / f"{loading._WEIGHTS}.index.json"
    index.write_text(index.read_text().replace("context_embedder.bias", "context_embedder.bios"))
    with pytest.raises(ValueError, match=r"no tensor 'context_embedder.bias'"):
        SD3Backbone(str(sharded), max_depth=1, null_tokens=12)


def test_tensors_of_blocks_that_are_not_wanted_may_be_missing(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    folder = edited(
        tiny_sd3, tmp_path / "missing", **{"transformer_blocks.3.attn.to_q.weight": None}
    )
    assert SD3Backbone(str(folder), max_depth=3, null_tokens=12).loaded_blocks == 3


def test_wrong_arguments(tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_depth 9, expected 0 ... 5"):
        SD3Backbone(str(tiny_sd3), max_depth=9)
    with pytest.raises(ValueError, match="dtype 'half', expected one of"):
        SD3Backbone(str(tiny_sd3), dtype="half")
    with pytest.raises(FileNotFoundError, match="no diffusers pipeline"):
        SD3Backbone(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        SD3Backbone(str(tmp_path / "none"))
