"""Tests of the null text and its cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import save_file

from stitchvm.backbones.null_text import PromptStore, fingerprint, null_condition, write_condition
from stitchvm.backbones.pipeline_text import PipelineEncoders
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.backbones.text import Condition, TextEncoders
from tests.tiny import read_json

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture
def folder(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline of its own, with an empty cache."""
    monkeypatch.setenv("STITCHVM_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_sd3, tmp_path / "model"))


def encoders(
    folder: Path, num_tokens: int = 12, dtype: torch.dtype = torch.float32
) -> TextEncoders:
    return TextEncoders(str(folder), "sd3", num_tokens, dtype)


@torch.no_grad()
def test_null_text_is_the_empty_prompt_of_the_pipeline(folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    tokens, _, pooled, _ = pipeline.encode_prompt(
        "", "", "", do_classifier_free_guidance=False, max_sequence_length=12
    )
    null = null_condition(encoders(folder))
    assert torch.equal(null.tokens, tokens)
    assert torch.equal(null.pooled, pooled)
    assert null.tokens.shape == (1, 16 + 12, 32)
    assert not torch.equal(tokens, torch.zeros_like(tokens))


def test_encoders_are_never_loaded_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SD3Backbone(str(folder), max_depth=1, dtype="float32", null_tokens=12)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(TextEncoders, "_load", refuse)
    second = SD3Backbone(str(folder), max_depth=2, dtype="float32", null_tokens=12)
    assert torch.equal(first.null_context, second.null_context)
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        SD3Backbone(str(folder), max_depth=1, dtype="float32", null_tokens=13)


def test_encoders_are_freed_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    text = encoders(folder)
    load = TextEncoders._load

    def watch(self: TextEncoders, name: str, **options: object) -> object:
        seen.append(len(self._loaded))
        return load(self, name, **options)

    monkeypatch.setattr(TextEncoders, "_load", watch)
    text([""], keep=False)
    assert seen and set(seen) == {0}
    text([""], keep=True)
    assert len(text._loaded) == 3
    text.free()
    assert not text._loaded


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_autocast_outside_changes_no_condition(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept, on disk too, does not depend on who asks for it first."""
    monkeypatch.setenv("STITCHVM_CACHE", str(tmp_path / "cache"))
    path = request.getfixturevalue(f"tiny_{family}")
    pipe = DiffusionPipeline.from_pretrained(path)
    for text in (
        TextEncoders(str(path), family, 12, torch.float32),
        PipelineEncoders(pipe, family, 12),
    ):
        expected = text(["a red circle"])
        with torch.autocast("cpu", torch.bfloat16):
            found = [text(["a red circle"]), *text.ahead(["a red circle"])]
        for cond in found:
            assert torch.equal(cond.tokens, expected.tokens)
            assert torch.equal(cond.pooled, expected.pooled)
    text = TextEncoders(str(path), family, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        null_condition(text)
    assert torch.equal(null_condition(text).tokens, text([""]).tokens)


def test_the_cache_knows_length_dtype_and_weights(folder: Path) -> None:
    marks = [
        fingerprint(encoders(folder)),
        fingerprint(encoders(folder, num_tokens=13)),
        fingerprint(encoders(folder, dtype=torch.bfloat16)),
    ]
    file = folder / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    marks.append(fingerprint(encoders(folder)))
    assert len(set(marks)) == 4


def test_the_cache_records_what_it_holds(folder: Path) -> None:
    null_condition(encoders(folder))
    with safe_open(PromptStore(encoders(folder)).file(""), framework="pt") as handle:
        assert handle.metadata() == {
            "model": str(folder),
            "text_tokens": "12",
            "dtype": "float32",
            "prompt": "",
        }


def test_a_hub_snapshot_is_told_by_its_commit(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    shutil.copy(folder / "model_index.json", snapshot)
    other = tmp_path / "snapshots" / "4567"
    shutil.copytree(snapshot, other)
    assert fingerprint(encoders(snapshot)) != fingerprint(encoders(other))


def test_an_explicit_file_needs_no_encoders(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "null.safetensors"
    given = Condition(torch.randn(1, 20, 32), torch.randn(1, 28))
    write_condition(file, given, {})
    for name in ENCODERS:
        shutil.rmtree(folder / name)
    settings = {"max_depth": 1, "dtype": "float32"}
    backbone = SD3Backbone(str(folder), null_embeddings=str(file), **settings)
    assert torch.equal(backbone.null_context, given.tokens)
    with pytest.raises(FileNotFoundError, match=r"lacks text_encoder/.*null_embeddings"):
        SD3Backbone(str(folder), **settings)
    with pytest.raises(FileNotFoundError, match="leave `null_embeddings` out"):
        SD3Backbone(str(folder), null_embeddings=str(tmp_path / "none"), **settings)
    write_condition(file, Condition(torch.randn(1, 20, 48), torch.randn(1, 28)), {})
    with pytest.raises(ValueError, match=r"\(48, 28\), expected batch 1 and widths \(32, 28\)"):
        SD3Backbone(str(folder), null_embeddings=str(file), **settings)
    save_file({"tokens": torch.randn(2, 20, 32), "pooled": torch.randn(2, 28)}, file)
    with pytest.raises(ValueError, match="no file of prompt embeddings"):
        SD3Backbone(str(folder), null_embeddings=str(file), **settings)
    file.write_text("garbage")
    with pytest.raises(ValueError, match="no file of prompt embeddings"):
        SD3Backbone(str(folder), null_embeddings=str(file), **settings)


def test_without_t5_its_tokens_are_zeros(folder: Path) -> None:
    index = read_json(folder / "model_index.json")
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    tokens = encoders(folder)(["a red circle"]).tokens
    assert tokens.shape == (1, 28, 32)
    assert not tokens[:, 16:].any() and tokens[:, :16].any()


def test_a_folder_that_cannot_be_written_to_is_a_warning(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = PromptStore(encoders(folder), tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot keep prompt embeddings"):
        store.put("", null_condition(encoders(folder)))


def test_conditions_are_selected_and_repeated() -> None:
    cond = Condition(torch.randn(3, 2, 4), torch.randn(3, 5))
    assert torch.equal(cond.select(torch.tensor([2, 2])).pooled, cond.pooled[[2, 2]])
    assert torch.equal(cond.repeat(2).tokens, cond.tokens[[0, 0, 1, 1, 2, 2]])
    assert torch.equal(Condition.cat([cond, cond]).pooled, torch.cat([cond.pooled] * 2))
    assert len(cond.select(slice(0, 1)).repeat(7)) == 7
    assert cond.to(torch.bfloat16).tokens.dtype == torch.bfloat16
