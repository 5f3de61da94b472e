"""Every data module can be written in a config file."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule

MODULES: dict[str, dict[str, Any]] = {
    "images.ImageFolder": {"root": "x", "val_size": 3, "resolution": 64, "seed": 1},
    "images.ConcatImages": {"roots": ["x", "y"], "exclude_test": False, "max_bad_fraction": 0.02},
    "ava.AVA": {"root": "x", "batch_size": 3},
    "hpdv2.HPDv2": {"root": "x", "num_workers": 0},
    "retrieval.Retrieval": {"coco": "x", "flickr30k": None, "captions_per_image": 5},
    "preference.Preference": {"hpdv2": "x", "resolution": 1024},
    "aesthetic.Aesthetic": {"ava": "x", "max_bad_fraction": 0.0},
    "prompts.Prompts": {"path": "x", "unique": False},
    "samples.SampleFolder": {"root": "x", "prompts": "y", "resolution": None},
    "world_prompts.WorldPrompts": {"num_prompts": 3, "split": "tune"},
    "world.World": {"train_size": 10, "batch_size": 2},
    "world.WorldRetrieval": {"num_images": 10, "split": "tune"},
    "world.WorldPreference": {"seed": 3},
    "world.WorldAesthetic": {},
}


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser


@pytest.mark.parametrize("name", MODULES)
def test_configs_build_without_touching_the_disk(name: str) -> None:
    given = {"class_path": f"stitchvm.data.{name}", "init_args": MODULES[name]}
    config = parser().parse_object({"data": given})
    data = parser().instantiate_classes(config).data
    assert all(getattr(data, key) == value for key, value in MODULES[name].items())


def test_an_unknown_key_is_refused() -> None:
    given = {
        "class_path": "stitchvm.data.images.ImageFolder",
        "init_args": {"root": "x", "resolutoin": 3},
    }
    with pytest.raises(ArgumentError, match="resolutoin"):
        parser().parse_object({"data": given})
