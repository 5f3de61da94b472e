"""Generated images among the world's training images: made once, resumed, spread evenly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stitchvm.data import world, world_generated
from stitchvm.data.world import MixedDataset, SceneDataset, SceneStream, World
from stitchvm.data.world_generated import generated_images


def test_images_are_made_once_and_do_not_depend_on_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_generated, "CHUNK", 2)
    monkeypatch.setattr(world_generated, "STEPS", (2, 3))
    three = generated_images(3, folder=tmp_path)
    assert three.shape == (3, 3, 32, 32) and three.dtype == np.uint8
    assert not np.array_equal(three[0], three[1])
    files = sorted(tmp_path.rglob("*.npy"))
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()  # as if it had been interrupted
    again = generated_images(3, folder=tmp_path)
    assert np.array_equal(again, three)
    assert files[1].stat().st_mtime_ns == times[1]
    monkeypatch.setattr(world_generated, "_make", lambda *_: pytest.fail("made again"))
    assert np.array_equal(generated_images(2, folder=tmp_path), three[:2])


def test_generated_images_are_spread_among_the_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = SceneDataset(SceneStream("train", 12, 0))
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 32, 32), np.uint8)
    mixed = MixedDataset(drawn, images, 0.25)
    samples = mixed.__getitems__(list(range(12)))
    assert [s["index"] for s in samples] == list(range(12))
    generated = [i for i, s in enumerate(samples) if s["pixels"].unique().numel() == 1]
    assert generated == [3, 7, 11]
    assert [int(samples[i]["pixels"][0, 0, 0]) for i in generated] == [0, 1, 2]
    assert torch.equal(samples[5]["pixels"], drawn[5]["pixels"])
    assert torch.equal(mixed[7]["pixels"], samples[7]["pixels"])
    assert mixed.fingerprint != MixedDataset(drawn, images, 0.5).fingerprint
    monkeypatch.setattr(world, "generated_images", lambda count: images)
    train, val = World(train_size=12, val_size=4, generated=3).fit_data()
    assert isinstance(train, MixedDataset) and len(train) == 12 and len(val) == 4


def test_errors() -> None:
    with pytest.raises(ValueError, match="generated=-1"):
        World(generated=-1).fit_data()
    with pytest.raises(ValueError, match="share in"):
        World(generated=4, generated_share=0.0).fit_data()
