"""Validation splits by the hash of file names: a data set that grows keeps nearly the same split."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Sequence

from stitchvm.data.datasets import ImageDataset


def split_images(
    listed: tuple[Sequence[str], Sequence[str]], val_size: int, resolution: int
) -> tuple[ImageDataset, ImageDataset]:
    """Returns training and validation sets of (files, missing): validation has the `val_size` smallest name hashes.

    It has them in the order of the hashes, so that its first images are a sample of all folders, not of the first.

    Raises:
        ValueError: If that leaves no training images, or none for validation.
    """
    files, missing = listed
    val = validation_split([os.path.basename(file) for file in files], val_size)
    chosen = set(val)
    train_files = [file for i, file in enumerate(files) if i not in chosen]
    val_files = [files[i] for i in val]
    return ImageDataset(train_files, resolution, missing=missing), ImageDataset(
        val_files, resolution
    )


def validation_split(names: Sequence[str], val_size: int) -> list[int]:
    """Returns the positions of the `val_size` names with the smallest hashes, the smallest first.

    Raises:
        ValueError: If `val_size` is not between 1 and one less than the number of names.
    """
    if not 0 < val_size < len(names):
        raise ValueError(
            f"val_size={val_size} of {len(names)} images: it must be at least 1 and leave images to train on."
        )
    hashes = [hashlib.sha1(os.fsencode(name)).digest() for name in names]
    return heapq.nsmallest(val_size, range(len(names)), key=lambda i: (hashes[i], i))
