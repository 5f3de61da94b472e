"""What a fine-tuning left is looked at from headers, against the pipeline it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stitchvm.adapters.export import export_lora
from stitchvm.adapters.export_full import export_transformer
from stitchvm.adapters.full import PolicyWeights
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.backbones.finetuned import LORA
from stitchvm.backbones.loading import read_model_class
from stitchvm.preflight.findings import BAD
from stitchvm.preflight.walk import check
from tests.preflight.conftest import FLUX, MEDIUM, part, replace, run
from tests.preflight.conftest import snapshot as folder_of

LARGE = "stabilityai/stable-diffusion-3.5-large"


def network(cache: Path, id: str):
    """The transformer of the rehearsal's small checkpoint."""
    import diffusers

    folder = folder_of(cache, id)
    kind = getattr(diffusers, read_model_class(id, folder))
    return kind.from_pretrained(folder, subfolder="transformer")


def found(path: Path, id: str = MEDIUM, **more: str):
    """What is found of a generator with it, apart from the pipeline's own parts."""
    findings = check(run(generator=part("Generator", path=id, finetuned=path, **more)))
    return [f for f in findings if f.part.endswith(".finetuned")]


@pytest.fixture
def lora(hub: Path, tmp_path: Path) -> Path:
    return export_lora(PolicyAdapters(network(hub, MEDIUM)), tmp_path / "lora", base_model=MEDIUM)


def test_what_is_for_the_pipeline_is_ok(hub: Path, lora: Path, tmp_path: Path) -> None:
    (finding,) = found(lora)
    assert (finding.state, finding.what) == ("ok", f"{lora}/{LORA}")
    whole = tmp_path / "full"
    export_transformer(PolicyWeights(network(hub, MEDIUM)), whole, base_model=MEDIUM)
    (finding,) = found(whole)
    assert (finding.state, finding.what) == ("ok", f"{whole}/transformer")
    (finding,) = found(whole, LARGE)
    assert (
        finding.state == "wrong" and "of another model: its num_attention_heads" in finding.detail
    )
    (finding,) = found(whole, FLUX)
    assert finding.state == "wrong" and "holds a SD3Transformer2DModel" in finding.detail
    (finding,) = found(lora, FLUX)
    assert finding.state == "wrong" and "the transformer has no" in finding.detail


def test_a_pipeline_of_another_revision(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the cache has nothing else."""
    whole = tmp_path / "full"
    export_transformer(PolicyWeights(network(hub, MEDIUM)), whole, base_model=MEDIUM)
    snapshots = tmp_path / "hub" / f"models--{MEDIUM.replace('/', '--')}" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / "v1").symlink_to(folder_of(hub, MEDIUM))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (finding,) = found(whole, revision="v1")
    assert finding.state == "ok", finding.detail


def test_what_is_not(lora: Path, tmp_path: Path) -> None:
    (finding,) = found(tmp_path / "nowhere")
    assert finding.state == "missing"
    (tmp_path / "empty").mkdir()
    (finding,) = found(tmp_path / "empty")
    assert finding.state == "missing" and LORA in finding.what
    state = load_file(lora / LORA)
    key = next(iter(state))
    save_file(state | {key: torch.zeros(3, 3)}, lora / LORA)
    (finding,) = found(lora)
    assert finding.state in BAD and "of another model" in finding.detail
    content = (lora / LORA).read_bytes()
    replace(lora / LORA, content[:-4])
    (finding,) = found(lora)
    assert finding.state == "wrong" and "truncated" in finding.detail
