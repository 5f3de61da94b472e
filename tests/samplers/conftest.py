"""Tiny generators, a tiny reward and a value model on them, made once a session. Read only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward
from stitchvm.value_model import StitchedValueModel


@pytest.fixture(scope="session")
def sd3(tiny_sd3: Path) -> Generator:
    """Returns a generator with classifier-free guidance."""
    return Generator(str(tiny_sd3), text_tokens=12, guidance_scale=4.5)


@pytest.fixture(scope="session")
def flux(tiny_flux: Path) -> Generator:
    """Returns a generator with distilled guidance."""
    return Generator(str(tiny_flux), text_tokens=12, guidance_scale=3.5)


@pytest.fixture(scope="session")
def clip(tiny_clip: Path) -> CLIPReward:
    """Returns a frozen CLIP reward."""
    return CLIPReward(model=f"local-dir:{tiny_clip}").requires_grad_(False)


@pytest.fixture(scope="session")
def value_folder(
    tiny_sd3: Path, clip: CLIPReward, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Returns the folder of a value model on the SD3 generator's first two blocks, with random weights."""
    torch.manual_seed(0)
    backbone = SD3Backbone(str(tiny_sd3), max_depth=3, dtype="float32", null_tokens=12)
    model = StitchedValueModel(backbone, clip, (2, 1))
    torch.nn.init.normal_(model.stitch.F.weight, std=0.3)
    return model.save_pretrained(tmp_path_factory.mktemp("value"))
