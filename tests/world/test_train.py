from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stitchvm.world.scenes import sample_scenes
from stitchvm.world.tokens import clip_tokenizer, encode, t5_tokenizer, words
from stitchvm.world.train import sd3, vae
from stitchvm.world.train.common import Stage, replace_folder, run


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STITCHVM_WORLD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("STITCHVM_WORLD_WEIGHTS", str(tmp_path / "weights"))
    latents = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    captions = [s.caption for s in sample_scenes("train", 64, 0)]
    monkeypatch.setattr(sd3, "cached_latents", lambda: (latents, captions))
    monkeypatch.setattr(sd3, "load_vae", vae.build_vae)
    monkeypatch.setattr(sd3, "BATCH", 4)
    monkeypatch.setattr(sd3, "MICRO", 2)
    monkeypatch.setattr(sd3.SD3Stage, "layers", 2)
    monkeypatch.setattr(sd3.SD3Stage, "width", 48)
    monkeypatch.setattr(sd3.SD3Stage, "evaluate", lambda self: {})
    monkeypatch.setattr(sd3.SD3Stage, "export", lambda self, folder: None)
    return tmp_path


def same(a: Stage, b: Stage) -> bool:
    one, two = a.nets.state_dict(), b.nets.state_dict()
    return all(torch.equal(one[k], two[k]) for k in one) and all(
        torch.equal(a.ema[k], b.ema[k]) for k in a.ema
    )


def test_training_goes_on_after_a_stop_as_if_nothing_had_happened(toy: Path) -> None:
    whole = run(sd3.SD3Stage(0), max_steps=6, folder=toy / "whole")
    run(sd3.SD3Stage(0), max_steps=3, folder=toy / "cut")
    resumed = sd3.SD3Stage(0)
    assert not same(resumed, whole)
    run(resumed, max_steps=6, folder=toy / "cut")
    assert resumed.step == 6 and same(resumed, whole)


def test_two_processes_compute_what_one_does(toy: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, two = sd3.SD3Stage(0), sd3.SD3Stage(0, workers=2)
        for _ in range(2):
            assert one.update() == two.update()
        assert same(one, two)
        two.helper.process.kill()
    finally:
        torch.set_num_threads(threads)


def test_generators_share_what_is_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("STITCHVM_WORLD_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()

    def write(own: bytes) -> Any:
        def inner(target: Path) -> None:
            for part, content in (("vae", b"the same"), ("transformer", own)):
                (target / part).mkdir()
                (target / part / "w.safetensors").write_bytes(content)

        return inner

    for name, own in (("sd3", b"1"), ("flux", b"2"), ("flux", b"3"), ("sd3", b"4")):
        replace_folder(write(own), tmp_path / "weights" / name)
    sd3, flux = tmp_path / "weights" / "sd3", tmp_path / "weights" / "flux"
    assert (flux / "vae" / "w.safetensors").is_symlink()
    assert (flux / "vae" / "w.safetensors").read_bytes() == b"the same"
    assert (flux / "transformer" / "w.safetensors").read_bytes() == b"3"
    assert not any(p.is_symlink() for p in sd3.rglob("*"))
    assert (sd3 / "transformer" / "w.safetensors").read_bytes() == b"4"


def test_one_weighted_token_equals_many_equal_tokens() -> None:
    net = sd3.build_transformer(2, 48, 3, 1, 0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z, t = torch.randn(2, 4, 16, 16), torch.tensor([300.0, 700.0])
    text, pooled = torch.randn(2, 5, 128), torch.randn(2, 128)
    with torch.no_grad():
        many = torch.cat([text, torch.zeros(2, 16, 128)], dim=1)
        wanted = net(z, many, pooled, t, return_dict=False)[0]
        attention = sd3.WeightedJointAttention()
        attention.count = 16
        for block in net.transformer_blocks:
            block.attn.set_processor(attention)
        one = torch.cat([text, torch.zeros(2, 1, 128)], dim=1)
        found = net(z, one, pooled, t, return_dict=False)[0]
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_grown_generator_starts_as_the_small_one() -> None:
    from stitchvm.world.train.sd3_large import SD3LargeStage

    small = sd3.build_transformer(8, 48, 3, 3, 0)
    for p in small.parameters():
        torch.nn.init.normal_(p, std=0.1)
    stage = SD3LargeStage.__new__(SD3LargeStage)
    stage.transformer = sd3.build_transformer(10, 48, 3, 3, 1)
    stage.grow(small)
    z, t = torch.randn(2, 4, 16, 16), torch.tensor([300.0, 700.0])
    call = (z, torch.randn(2, 5, 128), torch.randn(2, 128), t)
    with torch.no_grad():
        a, b = (net(*call, return_dict=False)[0] for net in (small, stage.transformer))
    assert torch.allclose(a, b, atol=1e-5 * a.abs().max().item())


def test_tokenizers_make_one_token_a_word() -> None:
    captions = [s.caption for s in sample_scenes("train", 100, 0)] + [""]
    rows = clip_tokenizer()(captions, padding="max_length", max_length=16, truncation=True)
    assert rows["input_ids"] == encode(captions)
    pieces = t5_tokenizer()(captions)["input_ids"]
    assert pieces[0] == [4 + words().index(w) for w in captions[0].split()] + [1]
