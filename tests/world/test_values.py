"""The shipped value models: what they name, how they are loaded, and that they see through the noise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from stitchvm.path import FlowPath
from stitchvm.vae import VAE
from stitchvm.value_model import StitchedValueModel
from stitchvm.world.render import render
from stitchvm.world.scenes import sample_scenes
from stitchvm.world.scores import preference_groups
from stitchvm.world.train.aesthetic import aesthetic_score, spearman
from stitchvm.world.train.common import WEIGHTS

SIGMA = 0.25


def noised(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z_0 = VAE("world:sd3").encode(pixels)
    t = torch.full((len(z_0),), SIGMA)
    return FlowPath.interpolate(z_0, torch.randn_like(z_0), t), t


@pytest.mark.parametrize("name", ["clip", "aesthetic", "hps"])
def test_configs_name_the_world_and_no_path(name: str) -> None:
    config = json.loads((WEIGHTS / f"value_{name}" / "config.json").read_text())
    assert config["backbone"]["init_args"]["path"] == "world:sd3"
    assert config["reward"]["init_args"]["model"] == f"world:{name}"
    card = (WEIGHTS / f"value_{name}" / "README.md").read_text()
    assert f'from_pretrained("world:value_{name}")' in card and "## Measured" in card


@torch.no_grad()
def test_clip_value_retrieves_unseen_captions_from_noisy_latents() -> None:
    model = StitchedValueModel.from_pretrained("world:value_clip")
    scenes = sample_scenes("test", 64, 5, distinct=True)
    pixels = torch.from_numpy(render(scenes))
    text = model.reward.encode_text([s.caption for s in scenes])
    right = torch.arange(64)

    def recall(e: torch.Tensor) -> float:
        return float(((normalize(e, dim=-1) @ text.T).argmax(1) == right).float().mean())

    clean, noisy = recall(model.reward.embed(pixels).image), recall(model(*noised(pixels)).image)
    assert clean > 0.9 and noisy > 0.9 * clean


@torch.no_grad()
def test_aesthetic_value_ranks_by_the_true_score() -> None:
    model = StitchedValueModel.from_pretrained("world:value_aesthetic")
    scenes = sample_scenes("test", 96, 6)
    pixels = torch.from_numpy(render(scenes))
    truth = np.array([aesthetic_score(s) for s in scenes])
    clean = spearman(model.reward.score(model.reward.embed(pixels).image, None).numpy(), truth)
    noisy = spearman(model.value(*noised(pixels)).numpy(), truth)
    assert clean > 0.9 and noisy > 0.9 * clean


@torch.no_grad()
def test_preference_value_orders_images_of_a_prompt() -> None:
    model = StitchedValueModel.from_pretrained("world:value_hps")
    groups = preference_groups("test", 24, 7)
    pixels = torch.from_numpy(render([s for g in groups for s in g.scenes]))
    prompts = [g.prompt for g in groups for _ in g.scenes]
    value = model.value(*noised(pixels), model.reward.encode_text(prompts)).view(24, 4)
    better = torch.tensor(np.array([g.scores for g in groups]))
    i, j = torch.triu_indices(4, 4, 1)
    agree = (value[:, i] > value[:, j]) == (better[:, i] > better[:, j])
    assert float(agree.float().mean()) > 0.8
