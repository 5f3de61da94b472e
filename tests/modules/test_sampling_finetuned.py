"""`Sampling` with what a fine-tuning left: the images of that policy, and none of another in the same folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stitchvm.adapters.export import WEIGHTS, export_lora
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.generator import Generator
from stitchvm.samplers.plain import PlainSampler
from tests.modules.sampling_runs import generator, lines, pixels, predict, reward


@torch.no_grad()
def lora(path: Path, folder: Path) -> PolicyAdapters:
    """Writes LoRA weights that do something; returns their policy."""
    policy = PolicyAdapters(generator(path)().transformer, copies=("ema",))
    source = torch.Generator().manual_seed(2)
    for key, p in policy.parameters("ema").items():
        if ".lora_B." in key:
            p.copy_(0.3 * torch.randn(p.shape, generator=source))
    export_lora(policy, folder, base_model=str(path), name="ema", overwrite=True)
    return policy


def test_images_are_those_of_the_policy_and_of_no_other(tiny_sd3, tiny_clip, tmp_path) -> None:
    folder = tmp_path / "lora"
    policy = lora(tiny_sd3, folder)
    make = generator(tiny_sd3)
    tuned = partial(make.func, *make.args, **make.keywords, finetuned=str(folder))
    arguments = {"generator": tuned, "rewards": {"clip": reward(tiny_clip)}}
    run = tmp_path / "run"
    predict(run, **arguments)

    first = lines(run)[0]
    trained: Generator = make()
    trained.transformer = policy.transformer
    with policy.use("ema"):
        samples = PlainSampler(num_steps=3)(trained, [first["prompt"]], seeds=[first["stream"]])
    image = (255 * trained.vae.decode(samples.latents, clamp=True)).round()[0]
    written = torch.from_numpy(pixels(run, first["file"])).permute(2, 0, 1)
    assert (written - image).abs().max() <= 1
    predict(tmp_path / "plain", **arguments | {"generator": make})
    assert (pixels(tmp_path / "plain", first["file"]) != pixels(run, first["file"])).mean() > 0.1
    known = json.loads((run / "sampling.json").read_text())["weights"]
    assert known[f"generator from {folder}"]["sha256"]

    state = load_file(folder / WEIGHTS)
    save_file({key: 2 * x for key, x in state.items()}, folder / WEIGHTS)
    for more in ({"samples_per_prompt": 2}, {}):
        with pytest.raises(FileExistsError, match=r"generator from .*sha256"):
            predict(run, **arguments | more)
