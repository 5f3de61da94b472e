from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stitchvm.world.checker import check_batch
from stitchvm.world.gates import draw, load_pipeline
from stitchvm.world.render import render
from stitchvm.world.scenes import sample_scenes
from stitchvm.world.train.clip import normalise
from stitchvm.world.train.common import WEIGHTS

CLIP_FOLDERS = ("clip", "aesthetic", "hps")


def test_weights_stay_small() -> None:
    files = {p.resolve() for p in WEIGHTS.rglob("*") if p.is_file()}  # the generators share a VAE
    assert sum(p.stat().st_size for p in files) <= 25e6
    assert all(p.is_relative_to(WEIGHTS) for p in files)


@pytest.mark.parametrize("name", ["sd3", "sd3_large", "flux"])
def test_pipeline_opens_and_draws(name: str) -> None:
    scenes = sample_scenes("test", 4, 0)
    images = draw(load_pipeline(name), [s.caption for s in scenes], seed=0, guidance=4.0, steps=8)
    assert images.shape == (4, 3, 32, 32)
    assert np.isfinite(images).all() and images.std(axis=(1, 2, 3)).min() > 0.02
    results = check_batch(images, scenes)
    assert np.mean([r.attributes["background"] for r in results]) >= 0.5


def test_default_call_of_the_sd3_pipeline_agrees_with_one_silent_token() -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(WEIGHTS / "sd3")  # no further argument
    call = {"num_inference_steps": 4, "output_type": "np"}
    caption = "a red circle on a dark background"
    one = pipeline(
        caption, max_sequence_length=1, generator=torch.Generator().manual_seed(0), **call
    )
    many = pipeline(caption, generator=torch.Generator().manual_seed(0), **call)
    assert one.images.shape == (1, 32, 32, 3)
    assert np.abs(one.images - many.images).mean() < 0.03


@pytest.mark.parametrize("name", CLIP_FOLDERS)
def test_open_clip_folder_opens(name: str) -> None:
    import json

    import open_clip

    folder = WEIGHTS / name
    if name == "hps":
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        model = open_clip.CLIP(**config)
        state = torch.load(folder / "hps.pt", weights_only=True)
        assert set(state) == {"state_dict"}
        model.load_state_dict(state["state_dict"])
    else:
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = torch.from_numpy(render(sample_scenes("test", 3, 0)))
    assert model.encode_image(normalise(pixels)).shape == (3, 96)


def test_clip_retrieves_unseen_captions() -> None:
    import open_clip

    folder = f"local-dir:{WEIGHTS / 'clip'}"
    model, _, _ = open_clip.create_model_and_transforms(folder)
    tokenizer = open_clip.get_tokenizer(folder)
    scenes = sample_scenes("test", 64, 5, distinct=True)
    with torch.no_grad():
        image = model.encode_image(normalise(torch.from_numpy(render(scenes))), normalize=True)
        text = model.encode_text(tokenizer([s.caption for s in scenes]), normalize=True)
    assert ((image @ text.T).argmax(dim=1) == torch.arange(64)).float().mean() > 0.9


def test_aesthetic_head_has_the_published_keys() -> None:
    head = torch.load(Path(WEIGHTS) / "aesthetic" / "aesthetic.pth", weights_only=True)
    assert set(head) == {f"layers.{i}.{k}" for i in (0, 2, 4, 6, 7) for k in ("weight", "bias")}


def test_no_shipped_file_names_a_path_of_the_machine_it_was_made_on() -> None:
    for config in WEIGHTS.rglob("*.json"):
        if config.name != "tokenizer.json":
            assert "_name_or_path" not in config.read_text(), config
