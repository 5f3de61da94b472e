"""Preference benchmarks: HPDv2's test set and ImageReward's.

HPDv2 (400 prompts, 3,700 images) is described in `stitchvm/data/hpdv2.py`. ImageReward (466 prompts, 2,720 images):
`test.json` of the repository's `data` folder (also called `ImageReward_test.json`), a list of {"id", "prompt",
"generations": [n names], "ranking": [n integers 1 ... 5, lower is better, with ties]}, and the images of
test_images.zip in `test_images`.
"""

from __future__ import annotations

from typing import Any

from stitchvm.data.annotations import Located
from stitchvm.data.benchmark import BenchmarkModule
from stitchvm.data.datasets import ImageDataset
from stitchvm.data.hpdv2 import hpdv2_test_data, ranked_images
from stitchvm.data.reading import require

WHERE = (
    "data/test.json of the GitHub repository THUDM/ImageReward and the test images of the hub's"
    " `THUDM/ImageRewardDB`"
)


class Preference(BenchmarkModule):
    """Images of a prompt with their human ranking: batches with `prompt`, `group` and `rank`.

    Arguments:
        hpdv2: The folder of HPDv2 ("hpdv2"), or None to leave it out.
        imagereward: The folder of ImageReward's test set ("imagereward"), or None to leave it out.
        **kwargs: Those of `BenchmarkModule`.
    """

    task = "preference"

    def __init__(
        self, hpdv2: str | None = None, imagereward: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.hpdv2 = hpdv2
        self.imagereward = imagereward

    def test_data(self) -> dict[str, ImageDataset]:
        data: dict[str, ImageDataset] = {}
        if self.hpdv2 is not None:
            data["hpdv2"] = hpdv2_test_data(self.hpdv2, self.resolution)
        if self.imagereward is not None:
            data["imagereward"] = imagereward_test_data(self.imagereward, self.resolution)
        return data


def imagereward_test_data(root: str, resolution: int) -> ImageDataset:
    """Returns ImageReward's test images with `prompt`, `group` (the prompt's number) and `rank`.

    Raises:
        ValueError: If a file is missing or malformed.
    """
    names = ["test.json", "ImageReward_test.json", "data/test.json"]
    path = require(root, names, "ImageReward's list of test rankings", WHERE)
    folders = ["test_images", "data/test_images", ""]
    images = Located(root, folders, "ImageReward's test images", WHERE)
    return ranked_images(path, images, ("generations",), ("ranking",), resolution)
