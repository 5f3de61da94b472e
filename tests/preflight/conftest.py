"""A hub cache with every published checkpoint at reduced width, and the data sets, made once by the rehearsal."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from rehearsal import write
from rehearsal_hub import snapshot
from rehearsal_tiny import ARCHITECTURES

MEDIUM, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the rehearsal's folder. Read only."""
    root = tmp_path_factory.mktemp("rehearsal")
    write(root, "tiny")
    return root


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes that folder the hub's cache, the library's and the working directory, small towers the known ones."""
    import open_clip

    from stitchvm.rewards import aesthetic

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setenv("STITCHVM_CACHE", str(cache / "cache"))
    heads = [cache / "cache" / name for name in aesthetic.SHA256]  # written with random weights
    known = {h.name: hashlib.sha256(h.read_bytes()).hexdigest() for h in heads if h.is_file()}
    assert known
    monkeypatch.setattr(aesthetic, "SHA256", known)
    for name, config in ARCHITECTURES.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    monkeypatch.chdir(cache)
    return cache


@pytest.fixture
def copy(hub: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Returns what copies a repository into a folder of its own, to spoil it: hard links, so replace files whole."""

    def copied(id: str) -> Path:
        target = tmp_path / id.rpartition("/")[2]
        return Path(shutil.copytree(snapshot(hub, id), target, copy_function=os.link))

    return copied


def replace(path: Path, content: bytes | str | dict[str, Any]) -> None:
    """Gives a file another content without touching what it was linked to."""
    if isinstance(content, dict):
        content = json.dumps(content)
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def change(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file."""
    replace(path, json.loads(path.read_text()) | changes)


def part(kind: str, **arguments: Any) -> dict[str, Any]:
    """Returns a component as a configuration has it."""
    homes = {
        "Generator": "stitchvm.generator",
        "SD3Backbone": "stitchvm.backbones.sd3",
        "FluxBackbone": "stitchvm.backbones.flux",
        "LatentBackbone": "stitchvm.backbones.latent",
        "VAE": "stitchvm.vae",
        "CLIPReward": "stitchvm.rewards.clip",
        "HPSv2Reward": "stitchvm.rewards.hpsv2",
        "AestheticReward": "stitchvm.rewards.aesthetic",
        "PickScoreReward": "stitchvm.rewards.pickscore",
        "ImageReward": "stitchvm.rewards.imagereward",
        "StitchedFactory": "stitchvm.values.stitched",
    }
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
    return {"class_path": f"{homes[kind]}.{kind}", "init_args": arguments}


def run(**parts: Any) -> dict[str, Any]:
    """Returns a configuration whose model has these parts."""
    return {"model": {"class_path": "stitchvm.modules.sampling.Sampling", "init_args": parts}}
