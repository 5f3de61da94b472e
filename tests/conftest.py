"""Set-up of every test: offline, one thread, its own cache; tiny checkpoints made once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def stitchvm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sends the library's cache of prompt embeddings to a folder of this session."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["STITCHVM_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Gives each test the same random numbers, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a tiny SD3 pipeline folder. Read only."""
    from tests.tiny import sd3_folder

    return sd3_folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a tiny FLUX pipeline folder. Read only."""
    from tests.tiny import flux_folder

    return flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a tiny open_clip folder (4 blocks of width 32, a 4 x 4 grid). Read only."""
    from tests.rewards.tiny import clip_folder

    folder = tmp_path_factory.mktemp("clip")
    clip_folder(folder)
    return folder
