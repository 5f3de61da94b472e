"""The world as data: fixed by seed and index, splits apart, labels right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stitchvm.data.loader import Loader
from stitchvm.data.world import (
    SceneStream,
    World,
    WorldAesthetic,
    WorldBenchmark,
    WorldPreference,
    WorldRetrieval,
    wordings,
)
from stitchvm.world.render import render
from stitchvm.world.scenes import parse
from stitchvm.world.scores import aesthetic_score


def test_images_are_fixed_by_seed_and_index() -> None:
    few, many = (
        World(train_size=40, val_size=4, batch_size=8),
        World(train_size=80, val_size=4, batch_size=8),
    )
    other = World(train_size=40, val_size=4, batch_size=8, seed=1)
    for data in (few, many, other):
        data.setup("fit")
    a, b, c = (data.train_data[7]["pixels"] for data in (few, many, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    batch = next(iter(few.train_dataloader()))
    assert set(batch) == {"index", "pixels", "epoch"} and batch["pixels"].dtype == torch.float32
    i = int(batch["index"][0])
    assert torch.equal(batch["pixels"][0], few.train_data[i]["pixels"] / 255)
    drawn = render([SceneStream("train", 40, 0)[i]])[0]
    assert float(np.abs(batch["pixels"][0].numpy() - drawn).max()) <= 0.5 / 255 + 1e-6


def test_splits_share_no_key() -> None:
    keys = [
        {scene.key for scene in SceneStream(split, 300, 0)} for split in ("train", "tune", "test")
    ]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_validation_is_labelled() -> None:
    data = World(train_size=40, val_size=5, batch_size=4)
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert [len(batch["index"]) for batch in batches] == [4, 1]
    scene = data.val_data.scenes[4]  # type: ignore[attr-defined]
    assert batches[1]["prompt"] == [scene.caption]
    assert float(batches[1]["score"][0]) == pytest.approx(aesthetic_score(scene), abs=1e-5)


@pytest.mark.parametrize("cls", [WorldRetrieval, WorldPreference, WorldAesthetic])
def test_benchmarks(cls: type[WorldBenchmark]) -> None:
    data = cls(num_images=42, batch_size=16)
    data.setup("test")
    task = data.task
    assert data.benchmarks == ["world"]
    loader = data.test_dataloader()
    assert isinstance(loader, Loader)
    batches = list(loader)
    if task == "retrieval":
        captions = [texts for batch in batches for texts in batch["captions"]]
        assert len(captions) == 42 and len({text for texts in captions for text in texts}) > 60
        assert all(len({parse(text).key for text in texts}) == 1 for texts in captions)
    elif task == "preference":
        group = torch.cat([batch["group"] for batch in batches])
        rank = torch.cat([batch["rank"] for batch in batches])
        assert len(group) == 40
        assert all(sorted(rank[group == g].tolist()) == [0, 1, 2, 3] for g in range(10))
    else:
        score = torch.cat([batch["score"] for batch in batches])
        assert len(score) == 42 and 0.5 < float(score.std()) < 3
        assert all(len(batch["prompt"]) == len(batch["index"]) for batch in batches)


def test_both_wordings_of_a_pair() -> None:
    assert wordings(parse("a red circle left of a blue cross on a grey background")) == [
        "a red circle left of a blue cross on a grey background",
        "a blue cross right of a red circle on a grey background",
    ]
    assert len(wordings(parse("a red circle on a dark background"))) == 1


def test_errors() -> None:
    with pytest.raises(ValueError, match="train_size=0 and val_size=256 must be at least 1"):
        World(train_size=0).setup("fit")
    with pytest.raises(ValueError, match="0 images"):
        WorldPreference(num_images=3).setup("test")
    with pytest.raises(ValueError, match="distinct"):
        WorldRetrieval(num_images=10**6).setup("test")
    with pytest.raises(ValueError, match="split 'holdout'"):
        SceneStream("holdout", 3, 0)
