"""HPDv2: 430,000 generated images (and some photographs) with human preferences (Wu et al. 2023).

Layout of the hub's `ymhao/HPDv2`, unpacked: `train.json`, `test.json`, `train/<id>.jpg`, `test/<id>.jpg` (the archives
put the two folders into `HPD/`; both are found).

    train.json: [{"prompt", "file_path": [2 names], "human_preference": [0/1, 0/1]}, ...]
    test.json:  [{"prompt", "image_path": [n names], "rank": [n numbers, lower is better]}, ...]

Published copies differ in whether the names stand under `file_path` or `image_path`; both are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stitchvm.data.annotations import Located, field, read_json, same_length
from stitchvm.data.datasets import ImageDataset
from stitchvm.data.module import DataModule
from stitchvm.data.reading import require
from stitchvm.data.splits import split_images

WHERE = "the hub data set `ymhao/HPDv2` (train.json and train.tar.gz, test.json and test.tar.gz)"
NAMES = ("file_path", "image_path")


class HPDv2(DataModule):
    """HPDv2's training images without labels, for distillation.

    Arguments:
        root: The folder with `train.json` and `train`.
        val_size: How many images are kept for validation, as in `ImageFolder`.
        **kwargs: Those of `DataModule`.
    """

    def __init__(self, root: str, val_size: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.val_size = val_size

    def fit_data(self) -> tuple[ImageDataset, ImageDataset]:
        return split_images(hpdv2_training_files(self.root), self.val_size, self.resolution)


def hpdv2_training_files(root: str) -> tuple[list[str], list[str]]:
    """Returns (files, missing files) of the images that train.json names, each once.

    Raises:
        ValueError: If a file is missing or malformed.
    """
    path = require(root, ["train.json"], "HPDv2's list of training pairs", WHERE)
    names: dict[str, None] = {}
    for i, entry in enumerate(read_json(path, list)):
        names.update(dict.fromkeys(field(entry, NAMES, path, i)))
    _, files, missing = hpdv2_images(root, "train").split(list(names))
    return files, missing


def hpdv2_test_data(root: str, resolution: int) -> ImageDataset:
    """Returns HPDv2's test images with `prompt`, `group` (the prompt's number) and `rank`.

    Raises:
        ValueError: If a file is missing or malformed.
    """
    path = require(root, ["test.json"], "HPDv2's list of test rankings", WHERE)
    return ranked_images(path, hpdv2_images(root, "test"), NAMES, ("rank",), resolution)


def hpdv2_images(root: str, split: str) -> Located:
    """Returns the images of a split. Raises ValueError if there are none."""
    return Located(root, [split, f"HPD/{split}"], f"HPDv2's {split} images", WHERE)


def ranked_images(
    path: Path,
    images: Located,
    name_keys: tuple[str, ...],
    rank_keys: tuple[str, ...],
    resolution: int,
) -> ImageDataset:
    """Returns the images of a JSON list of {prompt, names, ranks}, one sample for each image.

    Arguments:
        path: The JSON file.
        images: The images that it names.
        name_keys: The key of an entry's image names, and its alternatives.
        rank_keys: The key of an entry's ranks (lower is better), and its alternatives.
        resolution: The side of the square images, in pixels.

    Raises:
        ValueError: If the file is malformed.
    """
    names: list[str] = []
    columns: dict[str, list[Any]] = {"prompt": [], "group": [], "rank": []}
    for i, entry in enumerate(read_json(path, list)):
        prompt = field(entry, ("prompt",), path, i)
        entry_names, ranks = field(entry, name_keys, path, i), field(entry, rank_keys, path, i)
        same_length(entry_names, ranks, "image names and ranks", path, i)
        names += entry_names
        columns["prompt"] += [prompt] * len(ranks)
        columns["group"] += [i] * len(ranks)
        columns["rank"] += [float(rank) for rank in ranks]
    kept, files, missing = images.split(names)
    return ImageDataset(
        files, resolution, {key: [v[i] for i in kept] for key, v in columns.items()}, missing
    )
