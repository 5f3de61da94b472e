"""Each way in which a pipeline can be incomplete or wrong is told, with its remedy, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stitchvm.preflight.walk import check
from tests.preflight.conftest import FLUX, MEDIUM, change, part, replace, run

LARGE = "stabilityai/stable-diffusion-3.5-large"


def states(**parts):
    """What is found of a configuration, by what was looked at."""
    return {f.what: f for f in check(run(**parts))}


def bad(**parts):
    """The one finding that is not ok."""
    found = [f for f in check(run(**parts)) if f.state != "ok"]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("id", [MEDIUM, LARGE, FLUX])
def test_a_whole_pipeline_is_ok(hub, id):
    found = states(generator=part("Generator", path=id))
    assert {f.state for f in found.values()} == {"ok"}
    inner = {what.removeprefix(f"{id}/") for what in found}
    encoders = {"text_encoder", "text_encoder_2"} | ({"text_encoder_3"} if id != FLUX else set())
    assert inner == {"transformer", "vae", "scheduler/scheduler_config.json"} | encoders


def test_a_path_that_is_not_there(hub, tmp_path):
    finding = bad(generator=part("Generator", path=tmp_path / "nowhere"))
    assert finding.state == "missing" and "path" in finding.remedy


@pytest.mark.parametrize(
    ("id", "token", "offline", "state"),
    [
        (MEDIUM, None, "0", "gated"),
        (FLUX, None, "0", "gated"),
        (MEDIUM, "hf_x", "0", "download"),
        ("someone/else", None, "0", "download"),
        ("someone/else", None, "1", "missing"),
    ],
)
def test_what_is_not_in_the_cache(hub, tmp_path, monkeypatch, id, token, offline, state):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    finding = bad(generator=part("Generator", path=id))
    assert finding.state == state and f"hf download {id}" in finding.remedy
    assert ("hf auth login" in finding.remedy) == (state == "gated")


def test_a_class_that_the_part_does_not_take(hub):
    finding = states(backbone=part("SD3Backbone", path=FLUX))[f"{FLUX}/transformer"]
    assert finding.state == "wrong" and finding.remedy == "use FluxBackbone"
    finding = states(backbone=part("FluxBackbone", path=MEDIUM))[f"{MEDIUM}/transformer"]
    assert finding.state == "wrong" and finding.remedy == "use SD3Backbone"


@pytest.mark.parametrize(
    ("id", "changes", "told"),
    [
        (MEDIUM, {"num_layers": 24}, "the weights have 6 transformer_blocks, config.json 24"),
        (MEDIUM, {"num_attention_heads": 24}, "pos_embed.proj.weight"),
        (MEDIUM, {"joint_attention_dim": 4096}, "context_embedder.weight"),
        (FLUX, {"num_single_layers": 38}, "single_transformer_blocks"),
        (FLUX, {"in_channels": 128}, "x_embedder.weight"),
    ],
)
def test_weights_of_another_model_than_config_json(copy, id, changes, told):
    folder = copy(id)
    change(folder / "transformer" / "config.json", **changes)
    finding = states(generator=part("Generator", path=folder))[f"{folder}/transformer"]
    assert finding.state == "wrong" and told in finding.detail


def test_a_shard_that_the_index_names_and_is_not_there(copy):
    folder = copy(FLUX)
    lost = "diffusion_pytorch_model-00002-of-00003.safetensors"
    (folder / "transformer" / lost).unlink()
    finding = bad(backbone=part("FluxBackbone", path=folder))
    assert finding.state == "missing" and finding.what == f"{folder}/transformer/{lost}"
    assert "index.json names" in finding.detail


def test_a_shard_of_another_download(copy):
    folder = copy(FLUX) / "transformer"
    first, last = (
        folder / f"diffusion_pytorch_model-0000{k}-of-00003.safetensors" for k in (1, 3)
    )
    replace(last, first.read_bytes())
    finding = bad(backbone=part("FluxBackbone", path=folder.parent))
    assert finding.state == "wrong" and "different downloads" in finding.detail


def test_no_index_but_one_file_is_looked_for(copy):
    folder = copy(FLUX)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    finding = bad(backbone=part("FluxBackbone", path=folder))
    assert finding.what.endswith("transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("keep", [0.5, 0.0001, 0])
def test_a_truncated_file(copy, keep):
    folder = copy(MEDIUM)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    replace(file, whole[: int(len(whole) * keep)])
    finding = states(generator=part("Generator", path=folder))[f"{folder}/transformer"]
    assert finding.state == "wrong" and finding.remedy == "download it again"
    assert "truncated" in finding.detail or "holds no weights" in finding.detail


def test_a_pointer_of_git_lfs(copy):
    folder = copy(MEDIUM)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 4939\n"
    replace(folder / "vae" / "diffusion_pytorch_model.safetensors", pointer)
    finding = states(vae=part("VAE", path=folder))[f"{folder}/vae"]
    assert finding.state == "wrong" and "Git LFS" in finding.detail


def test_only_a_variant_was_downloaded(copy):
    folder = copy(MEDIUM)
    (folder / "text_encoder" / "model.safetensors").unlink()
    finding = bad(generator=part("Generator", path=folder))
    assert (
        finding.state == "missing" and "only the variant model.fp16.safetensors" in finding.detail
    )


def test_text_encoders_of_another_model(copy):
    folder = copy(MEDIUM)
    shapes = {"shared.weight": (8, 48)}
    from rehearsal_weights import write_safetensors

    for file in (folder / "text_encoder_3").glob("model*"):
        file.unlink()
    write_safetensors(folder / "text_encoder_3" / "model.safetensors", shapes, "float16")
    finding = bad(generator=part("Generator", path=folder))
    assert finding.state == "wrong" and "width 48, the transformer reads 32" in finding.detail


def test_a_tokenizer_without_words_and_a_missing_scheduler(copy):
    folder = copy(MEDIUM)
    (folder / "tokenizer_2" / "vocab.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    found = states(generator=part("Generator", path=folder))
    assert found[f"{folder}/tokenizer_2/*"].state == "missing"
    assert found[f"{folder}/scheduler/scheduler_config.json"].state == "missing"


def test_null_embeddings_need_no_text_encoders(copy):
    folder = copy(MEDIUM)
    (folder / "model_index.json").unlink()
    finding = bad(backbone=part("SD3Backbone", path=folder))
    assert finding.state == "missing" and finding.what.endswith("model_index.json")
    given = part("SD3Backbone", path=folder, null_embeddings="null.safetensors")
    assert {f.state for f in check(run(backbone=given))} == {"ok"}


def test_the_vae_of_another_latent_space(hub):
    """As many channels, other constants: what a run would take without a word."""
    parts = {"backbone": part("SD3Backbone", path=MEDIUM), "vae": part("VAE", path=FLUX)}
    finding = bad(**parts)
    assert finding.state == "wrong" and "1.5305" in finding.detail and "0.3611" in finding.detail
    parts = {"backbone": part("SD3Backbone", path=MEDIUM), "vae": part("VAE", path=LARGE)}
    assert {f.state for f in check(run(**parts))} == {"ok"}


def test_the_vae_of_other_channels(copy, hub):
    folder = copy(MEDIUM)
    change(folder / "vae" / "config.json", latent_channels=4)
    found = check(run(generator=part("Generator", path=folder)))
    told = " ".join(f.detail for f in found if f.state == "wrong")
    assert "16 channels, config.json 4" in told and "16 channels, its VAE makes 4" in told
    parts = {"backbone": part("LatentBackbone", channels=4), "vae": part("VAE", path=FLUX)}
    assert "reads 4 channels" in bad(**parts).detail


def test_json_that_is_none(copy):
    folder = copy(MEDIUM)
    replace(folder / "transformer" / "config.json", "<html>")
    finding = states(generator=part("Generator", path=folder))[f"{folder}/transformer"]
    assert finding.state == "wrong" and "not JSON" in finding.detail


def test_the_world_is_whole_and_named_when_it_is_not(hub):
    assert {f.state for f in check(run(generator=part("Generator", path="world:sd3")))} == {"ok"}
    finding = bad(generator=part("Generator", path="world:sd9"))
    assert finding.state == "missing" and "embedded world" in finding.detail


def test_reads_headers_only(hub, monkeypatch):
    """Nothing reads more of a weight file than its header."""
    read = Path.open
    most = {}

    class Counting:
        def __init__(self, handle, name):
            self.handle, self.name = handle, name

        def __enter__(self):
            self.handle.__enter__()
            return self

        def __exit__(self, *args):
            return self.handle.__exit__(*args)

        def read(self, n=-1):
            data = self.handle.read(n)
            most[self.name] = most.get(self.name, 0) + len(data)
            return data

    def opened(self, mode="r", *args, **kwargs):
        handle = read(self, mode, *args, **kwargs)
        return Counting(handle, self) if self.suffix == ".safetensors" else handle

    monkeypatch.setattr(Path, "open", opened)
    check(run(generator=part("Generator", path=MEDIUM)))
    assert len(most) == 6
    for file, read_bytes in most.items():
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert read_bytes == 8 + header < file.stat().st_size
        assert json.loads(file.read_bytes()[8 : 8 + header])
