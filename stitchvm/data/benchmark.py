"""The data module that evaluations use: one loader per benchmark."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from stitchvm.data.base import Sample
from stitchvm.data.checks import check_arguments, count_bad, evaluation_loader
from stitchvm.data.loader import Loader


class BenchmarkModule(LightningDataModule):
    """Benchmarks of one task. A subclass says which: `task` and `test_data`.

    Attributes:
        task: "retrieval" (batches with `captions`), "preference" (`prompt`, `group`, `rank`) or "aesthetic" (`score`).
        benchmarks: The names of the benchmarks, in the order of the loaders, after `setup`.
        datasets: The data set of each, after `setup`.

    Arguments:
        resolution: The side of the square images, in pixels.
        batch_size: Samples per batch and device.
        num_workers: Worker processes per loader and device.
        max_bad_fraction: The fraction of missing and unreadable images above which the run stops.
    """

    task: str
    datasets: dict[str, Dataset[Sample]]

    def __init__(
        self,
        resolution: int = 512,
        batch_size: int = 8,
        num_workers: int = 4,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_bad_fraction = max_bad_fraction

    def test_data(self) -> Mapping[str, Dataset[Sample]]:
        """Returns the benchmarks by name. Raises ValueError if they are not there."""
        raise TypeError(f"{type(self).__name__} must define test_data() -> benchmarks by name.")

    @property
    def benchmarks(self) -> list[str]:
        return list(self.datasets)

    def setup(self, stage: str | None = None) -> None:
        """Lists the images, once.

        Raises:
            ValueError: If an argument is out of range, no benchmark is given, files are not where they should be, or
                too many are missing.
        """
        check_arguments(self.resolution, self.batch_size, self.num_workers)
        if hasattr(self, "datasets"):
            return
        datasets = dict(self.test_data())
        if not datasets:
            raise ValueError(
                f"{type(self).__name__} was given no data set: give the folder of at least one."
            )
        for dataset in datasets.values():
            count_bad(dataset, self.max_bad_fraction)
        self.datasets = datasets

    def test_dataloader(self) -> Loader | list[Loader]:
        """Returns this device's part of the benchmark, unpadded; with several benchmarks a list."""
        loaders = [evaluation_loader(self, dataset) for dataset in self.datasets.values()]
        return loaders[0] if len(loaders) == 1 else loaders

    def val_dataloader(self) -> Loader | list[Loader]:
        """Returns the same as `test_dataloader`, for `stitchvm validate`."""
        return self.test_dataloader()
