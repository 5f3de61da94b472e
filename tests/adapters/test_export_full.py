"""Fine-tuned transformers: diffusers loads them, and the images are identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from stitchvm.adapters.export_full import export_transformer
from stitchvm.adapters.full import PolicyWeights
from stitchvm.data.prompts import Prompts
from stitchvm.generator import Generator
from stitchvm.hub import resolve
from stitchvm.modules.draft import DRaFT
from stitchvm.rewards.clip import CLIPReward
from tests.adapters.test_export import picture, pipeline_of
from tests.adapters.test_policy import make
from tests.modules import alignment_runs as runs


@torch.no_grad()
def test_a_pipeline_loads_it_and_paints_the_same_image(tmp_path: Path) -> None:
    pipeline = pipeline_of("sd3")
    before = picture(pipeline)
    policy = PolicyWeights(pipeline.transformer, copies=("ema",))
    for name, p in policy.parameters("ema").items():
        p.add_(0.01 if name.endswith("bias") else 0.0)
    with policy.use("ema"):
        ema = picture(pipeline)
    assert not torch.equal(before, ema)
    folder = export_transformer(policy, tmp_path / "full", base_model="world:sd3", name="ema")
    loaded = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    other = StableDiffusion3Pipeline.from_pretrained(resolve("world:sd3"), transformer=loaded)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(picture(other), ema)
    assert torch.equal(picture(pipeline), before)
    card = (folder / "README.md").read_text()
    assert "StableDiffusion3Pipeline, SD3Transformer2DModel" in card and '"ema" weights' in card
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_transformer(policy, folder, base_model="world:sd3")
    export_transformer(policy, folder, base_model="world:sd3", overwrite=True)
    again = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    own = pipeline.transformer.state_dict()
    assert all(torch.equal(again[key], value) for key, value in own.items())


def test_a_run_leaves_its_average(tmp_path: Path) -> None:
    module = DRaFT(
        generator=lambda: Generator("world:sd3", text_tokens=1),
        reward=lambda: CLIPReward("world:clip"),
        policy=PolicyWeights,
        num_steps=2,
        lam=0.0,
        lr=1e-3,
    )
    data = Prompts(prompts=["a red circle on a dark background"], batch_size=1)
    runs.fit(module, tmp_path, data=data, max_steps=1)
    loaded: Any = SD3Transformer2DModel.from_pretrained(tmp_path / "full", subfolder="transformer")
    average = module.policy.weights("ema")
    changed = 0
    for key, value in loaded.named_parameters():
        assert torch.equal(value, average[key])
        changed += not torch.equal(value, module.policy.weights("default")[key])
    assert changed > 0


def test_unknown_transformers_have_no_pipeline(tmp_path: Path) -> None:
    policy = make("full")
    policy.transformer.__class__ = type("Other", (torch.nn.Module,), {})
    with pytest.raises(ValueError, match="no pipeline is known for a Other"):
        export_transformer(policy, tmp_path, base_model="x")
