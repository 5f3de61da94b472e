"""The aesthetic benchmark: AVA's test split of Hentschel et al. (layout in `stitchvm/data/ava.py`)."""

from __future__ import annotations

from typing import Any

from stitchvm.data.ava import ava_test_data
from stitchvm.data.benchmark import BenchmarkModule
from stitchvm.data.datasets import ImageDataset


class Aesthetic(BenchmarkModule):
    """Images with their mean human rating: batches with `score`.

    Arguments:
        ava: The folder with AVA's images and `AVA_test.csv` ("ava").
        **kwargs: Those of `BenchmarkModule`.
    """

    task = "aesthetic"

    def __init__(self, ava: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ava = ava

    def test_data(self) -> dict[str, ImageDataset]:
        return {"ava": ava_test_data(self.ava, self.resolution)}
