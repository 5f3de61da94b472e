"""Unlabelled images from folders: any folder, and several together (the paper trains on AVA and HPDv2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stitchvm.data.ava import ava_training_files
from stitchvm.data.datasets import ImageDataset
from stitchvm.data.hpdv2 import hpdv2_training_files
from stitchvm.data.module import DataModule
from stitchvm.data.reading import list_images, require
from stitchvm.data.splits import split_images


class ImageFolder(DataModule):
    """All images below a folder, without labels.

    Arguments:
        root: The folder; images are looked for in all folders below it.
        val_size: How many images are kept for validation: those whose names have the smallest hashes, so that a
            folder that grows keeps nearly the same split.
        **kwargs: Those of `DataModule`.
    """

    def __init__(self, root: str, val_size: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.val_size = val_size

    def fit_data(self) -> tuple[ImageDataset, ImageDataset]:
        return split_images(folder_files(self.root), self.val_size, self.resolution)


class ConcatImages(DataModule):
    """The images of several folders as one data set, without labels.

    Each folder is read by its own layout: one with `AVA.txt` as AVA, one with `train.json` as HPDv2, any other as a
    folder of images.

    Arguments:
        roots: The folders.
        exclude_test: Whether to leave out AVA's test split (HPDv2's lies in a folder of its own).
        val_size: How many images are kept for validation, as in `ImageFolder`.
        **kwargs: Those of `DataModule`.
    """

    def __init__(
        self, roots: list[str], exclude_test: bool = True, val_size: int = 256, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.roots = roots
        self.exclude_test = exclude_test
        self.val_size = val_size

    def fit_data(self) -> tuple[ImageDataset, ImageDataset]:
        if not self.roots:
            raise ValueError(
                "ConcatImages got an empty list of roots: give at least one folder of images."
            )
        files: list[str] = []
        missing: list[str] = []
        for root in self.roots:
            more, lost = self._read(root)
            files += more
            missing += lost
        return split_images((files, missing), self.val_size, self.resolution)

    def _read(self, root: str) -> tuple[list[str], list[str]]:
        if (Path(root) / "AVA.txt").is_file():
            return ava_training_files(root, self.exclude_test)
        if (Path(root) / "train.json").is_file():
            return hpdv2_training_files(root)
        return folder_files(root)


def folder_files(root: str) -> tuple[list[str], list[str]]:
    """Returns the paths of all images below `root`, and no missing ones.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """
    folder = require(root, [""], "The folder of images", "wherever your images are")
    files = [str(folder / name) for name in list_images(folder)]
    if not files:
        raise ValueError(
            f"No images below {folder}: expected files such as .jpg, .png or .webp there."
        )
    return files, []
