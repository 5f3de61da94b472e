"""Captions of the world as prompts: distinct, of their split, and readable by the exact checker."""

from __future__ import annotations

import numpy as np
import pytest

from stitchvm.data.world_prompts import WorldPrompts, world_captions
from stitchvm.world.checker import check_batch, pass_rate
from stitchvm.world.render import render
from stitchvm.world.scenes import dress, keys, parse, split_of


@pytest.mark.parametrize("split", ["test", "tune"])
def test_captions_are_distinct_scenes_of_the_split(split: str) -> None:
    data = WorldPrompts(num_prompts=200, split=split, batch_size=64)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [len(batch["prompt"]) for batch in batches] == [64, 64, 64, 8]
    assert set(batches[0]) == {"index", "prompt"}
    captions = [prompt for batch in batches for prompt in batch["prompt"]]
    assert [i for batch in batches for i in batch["index"].tolist()] == list(range(200))
    found = [parse(caption).key for caption in captions]
    assert len(set(found)) == 200 and {split_of(key) for key in found} == {split}
    assert any(len(key) == 3 for key in found), "single objects occur, too"


def test_more_prompts_contain_fewer() -> None:
    assert world_captions("test", 50)[:20] == world_captions("test", 20)
    assert world_captions("test", 20, seed=1) != world_captions("test", 20)


def test_the_checker_passes_true_pictures_and_no_others() -> None:
    captions = world_captions("test", 60)
    rng = np.random.default_rng(0)
    scenes = [dress(parse(caption).key, rng) for caption in captions]
    images = np.asarray(render(scenes))
    assert pass_rate(check_batch(images, captions)) == 1.0
    assert pass_rate(check_batch(images, captions[1:] + captions[:1])) == 0.0


def test_training_prompts_are_those_of_the_training_split() -> None:
    data = WorldPrompts(num_prompts=4, batch_size=100, seed=2)
    data.setup("fit")
    prompts = [prompt for batch in data.train_dataloader() for prompt in batch["prompt"]]
    every = sum(map(len, keys("train")))
    assert len(set(prompts)) == every // 100 * 100
    assert {split_of(parse(prompt).key) for prompt in prompts} == {"train"}
    assert [len(batch["prompt"]) for batch in data.val_dataloader()] == [4]


def test_errors() -> None:
    there = sum(map(len, keys("test")))
    for arguments, message in [
        ({"num_prompts": there + 1}, rf"{there + 1} distinct scenes .* only {there} keys"),
        ({"split": "val"}, "split 'val'; expected one of"),
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            WorldPrompts(**arguments).setup("predict")


def test_own_captions() -> None:
    mine = [
        "a red circle on a dark background",
        "a blue cross left of a red circle on a grey background",
    ]
    data = WorldPrompts(prompts=mine, batch_size=1)
    data.setup("predict")
    assert [batch["prompt"] for batch in data.predict_dataloader()] == [[p] for p in mine]
    for wrong, message in (([], "not empty"), (mine * 2, "2 times"), (["a dog"], "a dog")):
        with pytest.raises(ValueError, match=message):
            WorldPrompts(prompts=wrong)
