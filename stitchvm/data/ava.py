"""AVA: 255,000 photographs with the counts of their ratings from 1 to 10 (Murray et al. 2012).

Layout: `AVA.txt` (15 columns separated by blanks: row, image id, counts of the ratings 1 ... 10, two semantic tags,
challenge) and `images/<id>.jpg` (or the images beside AVA.txt). The score of an image is its mean rating
Σ_k k·n_k / Σ_k n_k.

The test split for aesthetics is that of Hentschel et al. (2022), 25,551 images: `AVA_test.csv` of the repository
shiemn/CLIP-knows-IA, a header "0,1,...,10", then image id and rating counts (or shares) 1 ... 10.

The photographs belong to their authors and may not be passed on: nothing is downloaded here.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stitchvm.data.annotations import Located
from stitchvm.data.datasets import ImageDataset
from stitchvm.data.module import DataModule
from stitchvm.data.reading import require
from stitchvm.data.splits import split_images

WHERE = "the hub (`Iceclear/AVA`, `trojblue/AVA-Huggingface`) or the AVA downloader imfing/ava_downloader on GitHub"
WHERE_TEST = "the GitHub repository shiemn/CLIP-knows-IA"


class AVA(DataModule):
    """AVA's images without labels, for distillation.

    Arguments:
        root: The folder with `AVA.txt` and `images`.
        exclude_test: Whether to leave out the images of `AVA_test.csv`, on which the aesthetic score is measured.
        val_size: How many images are kept for validation, as in `ImageFolder`.
        **kwargs: Those of `DataModule`.
    """

    def __init__(
        self, root: str, exclude_test: bool = True, val_size: int = 256, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.exclude_test = exclude_test
        self.val_size = val_size

    def fit_data(self) -> tuple[ImageDataset, ImageDataset]:
        return split_images(
            ava_training_files(self.root, self.exclude_test), self.val_size, self.resolution
        )


def ava_training_files(root: str, exclude_test: bool) -> tuple[list[str], list[str]]:
    """Returns (files, missing files) of the images of AVA.txt.

    Raises:
        ValueError: If a file is missing or malformed.
    """
    scores = read_ava_txt(require(root, ["AVA.txt"], "AVA's list of ratings", WHERE))
    if exclude_test:
        hint = WHERE_TEST + ", or set exclude_test to false to train on all images"
        for image in read_ava_csv(require(root, ["AVA_test.csv"], "The test split of AVA", hint)):
            scores.pop(image, None)
    _, files, missing = ava_images(root).split([f"{image}.jpg" for image in scores])
    return files, missing


def ava_test_data(root: str, resolution: int) -> ImageDataset:
    """Returns the test split of Hentschel et al. with `score`, the mean rating.

    Raises:
        ValueError: If a file is missing or malformed.
    """
    scores = read_ava_csv(require(root, ["AVA_test.csv"], "The test split of AVA", WHERE_TEST))
    kept, files, missing = ava_images(root).split([f"{image}.jpg" for image in scores])
    values = list(scores.values())
    return ImageDataset(files, resolution, {"score": [values[i] for i in kept]}, missing)


def ava_images(root: str) -> Located:
    """Returns AVA's images, in `images` or beside AVA.txt. Raises ValueError if there are none."""
    return Located(root, ["images", ""], "AVA's images", WHERE)


def read_ava_txt(path: Path) -> dict[int, float]:
    """Returns the mean rating of every image id of AVA.txt, in the file's order.

    Raises:
        ValueError: If a line does not have the 15 columns, or there are no lines.
    """
    scores: dict[int, float] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 15:
            raise ValueError(f"Line {number} of {path} has {len(words)} columns; AVA.txt has 15.")
        scores[_image_id(words[1], path, number)] = _mean_rating(words[2:12], path, number)
    if not scores:
        raise ValueError(f"{path} is empty; AVA.txt has one line for each image.")
    return scores


def read_ava_csv(path: Path) -> dict[int, float]:
    """Returns the mean rating of every image id of a split of Hentschel et al., in the file's order.

    Raises:
        ValueError: If the header is not 0 ... 10, a row is malformed, or there are no rows.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    header = rows[0] if rows else []
    extra = len(header) - 11  # an unnamed column of row numbers may stand before
    if extra not in (0, 1) or header[extra:] != [str(k) for k in range(11)]:
        raise ValueError(
            f"{path} must begin with the header 0,1,...,10, got {','.join(header)[:60]!r}."
        )
    scores: dict[int, float] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ValueError(
                f"Line {number} of {path} has {len(row)} columns, its header {len(header)}."
            )
        scores[_image_id(row[extra], path, number)] = _mean_rating(row[extra + 1 :], path, number)
    if not scores:
        raise ValueError(f"{path} has a header but no images.")
    return scores


def _image_id(word: str, path: Path, number: int) -> int:
    try:
        return int(float(word))  # one split writes the ids as 12345.0
    except ValueError:
        raise ValueError(f"Line {number} of {path}: expected an image id, got {word!r}.") from None


def _mean_rating(words: Sequence[str], path: Path, number: int) -> float:
    try:
        counts = [float(word) for word in words]
    except ValueError:
        raise ValueError(
            f"Line {number} of {path}: expected the counts of 10 ratings, got {words}."
        ) from None
    total = sum(counts)
    if not total > 0:
        raise ValueError(f"Line {number} of {path} has no ratings.")
    return sum(k * count for k, count in enumerate(counts, 1)) / total
