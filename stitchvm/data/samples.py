"""Finished images as data, to be measured by `stitchvm test`; `stitchvm/data/sample_files.py` says how they lie.

Missing and unreadable images are treated as in every data set: named, counted, replaced by the next readable one
(whose `index` then occurs twice), and an error when they are more than 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor

from stitchvm.data.base import Sample
from stitchvm.data.checks import check_arguments, count_bad, evaluation_loader
from stitchvm.data.datasets import ImageDataset
from stitchvm.data.loader import Loader
from stitchvm.data.reading import read_uint8
from stitchvm.data.sample_files import SampleFile, read_folder

__all__ = ["SampleDataset", "SampleFolder"]


class SampleDataset(ImageDataset):
    """Finished images with what is known of each.

    A sample has `index` (its running number in the list: the line of samples.jsonl, from 0), `pixels`, `file`,
    `group`, `seed`, and, where known, `prompt` and `metadata`.

    Arguments:
        root: The folder.
        samples: Its images.
        resolution: The side to which they are resized and cropped, in pixels; None leaves them as they are.

    Attributes:
        samples: Those of the images that are there.
        missing: The paths of the others.

    Raises:
        ValueError: If none is there.
    """

    def __init__(
        self, root: str | Path, samples: Sequence[SampleFile], resolution: int | None = None
    ) -> None:
        root = Path(root)
        there = [(root / sample.file).is_file() for sample in samples]
        self.samples = [sample for sample, here in zip(samples, there, strict=True) if here]
        columns: dict[str, list[Any]] = {
            "index": [sample.number for sample in self.samples],
            "group": [sample.group for sample in self.samples],
            "seed": [sample.seed for sample in self.samples],
            "file": [sample.file for sample in self.samples],
        }
        if all(sample.prompt is not None for sample in self.samples):
            columns["prompt"] = [sample.prompt for sample in self.samples]
        if any(sample.metadata is not None for sample in self.samples):
            columns["metadata"] = [sample.metadata for sample in self.samples]
        super().__init__(
            [str(root / sample.file) for sample in self.samples],
            0 if resolution is None else resolution,
            columns,
            [str(root / s.file) for s, here in zip(samples, there, strict=True) if not here],
        )

    def _read(self, path: str) -> Tensor:
        return read_uint8(path, self.resolution or None)

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Returns the samples of a batch (what a DataLoader calls).

        Raises:
            ValueError: If they have different sizes.
        """
        samples = [self[i] for i in indices]
        for sample in samples[1:]:
            first, size = samples[0]["pixels"].shape[1:], sample["pixels"].shape[1:]
            if first != size:
                raise ValueError(
                    f"{samples[0]['file']} has {tuple(first)} and {sample['file']} {tuple(size)} pixels: images of "
                    "different sizes do not go into one batch. Set data.resolution to resize and crop all of them, "
                    "or data.batch_size to 1."
                )
        return samples


class SampleFolder(LightningDataModule):
    """A folder of finished images: one that `stitchvm predict` wrote, one in GenEval's layout, or any.

    Batches have `index`, `pixels`, `file`, `group` (the prompt's number), `seed`, and, where known, `prompt` and
    `metadata`; each device gets its own part, unpadded.

    Arguments:
        root: The folder.
        prompts: A file with the prompt of each image, for a folder of images only.
        key: The key of the prompt in that file, if it is JSON.
        resolution: The side to which images are resized and cropped, in pixels; None leaves them as they are.
        batch_size: Images per batch and device.
        num_workers: Worker processes and device.
        max_bad_fraction: The fraction of missing and unreadable images above which the run stops.

    Attributes:
        dataset: The images, after `setup`; `dataset.samples[i].line` is all that samples.jsonl says of one.
    """

    task = "samples"
    benchmarks = ("samples",)
    dataset: SampleDataset

    def __init__(
        self,
        root: str,
        prompts: str | None = None,
        key: str = "prompt",
        resolution: int | None = None,
        batch_size: int = 8,
        num_workers: int = 4,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        self.root = root
        self.prompts = prompts
        self.key = key
        self.resolution = resolution
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_bad_fraction = max_bad_fraction

    def setup(self, stage: str | None = None) -> None:
        """Lists the images, once.

        Raises:
            ValueError: If an argument is out of range, the folder is not there or malformed, or too many images are
                missing.
        """
        size = 1 if self.resolution is None else self.resolution
        check_arguments(size, self.batch_size, self.num_workers)
        if hasattr(self, "dataset"):
            return
        samples = read_folder(self.root, self.prompts, self.key)
        dataset = SampleDataset(self.root, samples, self.resolution)
        count_bad(dataset, self.max_bad_fraction)
        self.dataset = dataset

    def test_dataloader(self) -> Loader:
        """Returns this device's part of the images, in order, unpadded."""
        return evaluation_loader(self, self.dataset)
