"""Tiny sampling runs, in this process and through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image

from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.data.prompts import Prompts
from stitchvm.generator import Generator
from stitchvm.modules.sampling import Sampling
from stitchvm.rewards.clip import CLIPReward
from stitchvm.samplers.base import Sampler
from stitchvm.samplers.plain import PlainSampler
from stitchvm.value_model import StitchedValueModel

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square")]
# of a sample, what another run need not have the same
COSTS = ("seconds", "cpu_seconds", "peak_memory_gib", "peak_memory_of", "batch")


def generator(sd3: Path) -> Callable[[], Generator]:
    """Returns what builds the tiny SD3 generator."""
    return partial(Generator, str(sd3), text_tokens=12, guidance_scale=2.0)


def reward(clip: Path) -> Callable[[], CLIPReward]:
    """Returns what builds the tiny CLIP reward."""
    return partial(CLIPReward, model=f"local-dir:{clip}")


def value_model(sd3: Path, clip: Path, folder: Path) -> Path:
    """Writes a value model of the tiny generator's first two blocks, with random weights."""
    torch.manual_seed(0)
    backbone = SD3Backbone(str(sd3), max_depth=3, dtype="float32", null_tokens=12)
    model = StitchedValueModel(backbone, CLIPReward(model=f"local-dir:{clip}"), (2, 1))
    torch.nn.init.normal_(model.stitch.F.weight, std=0.3)
    return model.save_pretrained(folder)


def predict(
    root: Path,
    *,
    sampler: Sampler | None = None,
    prompts: list[str] | Any = PROMPTS,
    batch_size: int = 2,
    trainer: dict[str, Any] | None = None,
    **arguments: Any,
) -> Sampling:
    """Samples prompts (or a data module's) into a folder, in this process, and returns the module."""
    module = Sampling(sampler or PlainSampler(num_steps=3), **arguments)
    data = prompts
    if isinstance(prompts, list):
        data = Prompts(prompts=prompts, batch_size=batch_size, unique=False)
    options: dict[str, Any] = {"enable_progress_bar": False} | (trainer or {})
    Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=str(root),
        **options,
    ).predict(module, datamodule=data)
    return module


def lines(root: Path) -> list[dict[str, Any]]:
    """Returns the lines of samples.jsonl."""
    return [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]


def same(root: Path, other: Path, exact: bool = True) -> None:
    """Requires two folders to have the same samples: all but what they cost, and the images."""
    ours, theirs = lines(root), lines(other)
    names = [sorted(p.name for p in (r / "images").iterdir()) for r in (root, other)]
    assert names[0] == names[1], "other image files"
    assert [line["index"] for line in ours] == [line["index"] for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        one, two = ({k: v for k, v in x.items() if k not in COSTS} for x in (one, two))
        if exact:
            assert one == two
        else:
            assert one.keys() == two.keys()
            for name, score in one["rewards"].items():
                # one grey level of one pixel may differ, no more
                assert abs(score - two["rewards"][name]) < 1e-3
            assert np.allclose(values(one), values(two), atol=1e-4)
        difference = np.abs(pixels(root, one["file"]) - pixels(other, two["file"]))
        assert difference.max() <= (0 if exact else 1)


def values(line: dict[str, Any]) -> np.ndarray:
    """Returns the values along a trajectory."""
    return np.array(line["values"]).reshape(-1, 2)


def pixels(root: Path, file: str) -> np.ndarray:
    """Returns an image as integers."""
    return np.asarray(Image.open(root / file)).astype(int)


def config(root: Path, sd3: Path, clip: Path, value: Path, **changes: Any) -> dict[str, Any]:
    """Returns a run's configuration for the command line: FK steering with a stitched value.

    Arguments:
        root: The run's folder.
        sd3: The tiny generator.
        clip: The tiny reward.
        value: The tiny value model.
        changes: "model", "data" and "trainer": what differs.
    """
    clip_reward = {
        "class_path": "stitchvm.rewards.clip.CLIPReward",
        "init_args": {"model": f"local-dir:{clip}"},
    }
    arguments = {
        "sampler": {
            "class_path": "stitchvm.samplers.fk.FKSteering",
            "init_args": {"num_steps": 6, "particles": 2, "resample_every": 1},
        },
        "generator": {
            "class_path": "stitchvm.generator.Generator",
            "init_args": {"path": str(sd3), "text_tokens": 12, "guidance_scale": 2.0},
        },
        "value": {
            "class_path": "stitchvm.values.stitched.StitchedFactory",
            "init_args": {"path": str(value), "share_generator": True},
        },
        "reward": clip_reward,
        "rewards": {"clip": clip_reward},
        "samples_per_prompt": 2,
    }
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "stitchvm.modules.sampling.Sampling",
            "init_args": arguments | changes.get("model", {}),
        },
        "data": {
            "class_path": "stitchvm.data.prompts.Prompts",
            "init_args": {
                "prompts": [
                    f"a {colour} {shape}" for colour in ("red", "blue") for shape in SHAPES
                ],
                "batch_size": 3,
                **changes.get("data", {}),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": str(root),
            **changes.get("trainer", {}),
        },
    }


SHAPES = ("circle", "square", "left", "right")
