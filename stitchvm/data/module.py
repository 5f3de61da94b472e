"""The data module that trainings use: loaders that resume exactly (`stitchvm/data/resume.py` says how)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from stitchvm.data.base import Batch, Sample, to_float
from stitchvm.data.checks import check_arguments, count_bad, evaluation_loader, ranks
from stitchvm.data.datasets import BadImages
from stitchvm.data.latents import LatentDataset, build_latent_cache
from stitchvm.data.loader import Loader
from stitchvm.data.resume import ConvertProgress, Stream
from stitchvm.data.sampling import EpochSampler, check_one_batch


class DataModule(LightningDataModule):
    """Images for training, with a validation split. A subclass says which: `fit_data`.

    Attributes:
        train_data: The training set, after `setup`.
        val_data: The validation set, after `setup`.
        bad: Counts the missing and unreadable training images, after `setup`.

    Arguments:
        resolution: The side of the square images, in pixels.
        batch_size: Samples per batch and device.
        num_workers: Worker processes per loader and device.
        seed: Fixes the order of the training samples.
        max_bad_fraction: The fraction of missing and unreadable images above which the run stops.
    """

    train_data: Dataset[Sample]
    val_data: Dataset[Sample]
    bad: BadImages

    def __init__(
        self,
        resolution: int = 512,
        batch_size: int = 8,
        num_workers: int = 4,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self._position: Stream | None = None

    def fit_data(self) -> tuple[Dataset[Sample], Dataset[Sample]]:
        """Returns the training and the validation set. Raises ValueError if they are not there."""
        raise TypeError(
            f"{type(self).__name__} must define fit_data() -> (training set, validation set)."
        )

    def setup(self, stage: str | None = None) -> None:
        """Lists the images, once.

        Raises:
            ValueError: If an argument is out of range, files are not where they should be, too many are missing, or
                there are fewer than one batch.
        """
        check_arguments(self.resolution, self.batch_size, self.num_workers)
        if stage in (None, "fit", "validate") and not hasattr(self, "bad"):
            self.train_data, self.val_data = self.fit_data()
            self.bad = count_bad(self.train_data, self.max_bad_fraction)
        if stage == "fit" and self.trainer is not None:
            # said now, before networks are loaded and validated
            check_one_batch(self._num_train(), self._train_batch_size(), ranks(self.trainer)[1])
            callbacks = self.trainer.callbacks
            if not any(isinstance(callback, ConvertProgress) for callback in callbacks):
                callbacks.insert(0, ConvertProgress(type(self).__qualname__, self._stream))

    def train_dataloader(self) -> Loader:
        """Returns this device's training batches, beginning where the Trainer stands."""
        trainer = self.trainer
        stream = self._stream()
        return Loader(
            self.train_data,
            EpochSampler(self._num_train(), self._train_batch_size(), self.seed, *ranks(trainer)),
            num_workers=self.num_workers,
            bad=self.bad,
            start=None if trainer is None else partial(stream.start, trainer),
            on_batch=partial(stream.record, trainer),
            as_float=trainer is None,  # on_after_batch_transfer does it, on the device
        )

    def val_dataloader(self) -> Loader:
        """Returns this device's validation batches, unpadded."""
        return evaluation_loader(self, self.val_data)

    def probe_dataloader(self, num_images: int = 400) -> Loader:
        """Returns the first held-out (validation) images, the same on every device: stage 1's probe set.

        Raises:
            ValueError: If there are fewer validation images.
        """
        there = len(self.val_data)  # type: ignore[arg-type]
        if num_images > there:
            raise ValueError(
                f"stage 1 needs {num_images} held-out probe images, but the validation set has {there}: "
                "raise data.val_size, or lower model.num_probes and model.num_held_out"
            )
        batches = [part.tolist() for part in torch.arange(num_images).split(self.batch_size)]
        return Loader(self.val_data, batches, num_workers=self.num_workers, bad=self.bad)

    def cache_latents(self, vae: Any, folder: str, device: str | torch.device = "cpu") -> None:
        """Adds `latents` to training batches from a cache on disk, made first where it is not complete.

        Call it after `setup` and before the first training batch, on every device: each makes a part.

        Arguments:
            vae: The VAE, on `device` (see `stitchvm.data.latents.Encoder`).
            folder: The cache folder.
            device: Where to encode.

        Raises:
            ValueError: If the folder holds a cache of another VAE, data set or resolution.
        """
        rank, world_size = ranks(self.trainer)
        data: Any = self.train_data
        sizes = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        build_latent_cache(
            data,
            vae,
            folder,
            device=device,
            bad=self.bad,
            rank=rank,
            world_size=world_size,
            **sizes,
        )
        if self.trainer is not None:
            self.trainer.strategy.barrier("latent cache")
        self.train_data = LatentDataset(data, vae, folder)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turns uint8 pixels into float32 in [0, 1], on the device."""
        return to_float(batch)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the stream of training batches and what it depends on."""
        return self._stream().state_dict(self.trainer) if hasattr(self, "train_data") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the position of `state_dict`, in batches of the present size."""
        if hasattr(self, "train_data"):  # a test or predict run has none
            self._stream().load_state_dict(state_dict)

    def _train_batch_size(self) -> int:
        """Returns the training samples per batch and device."""
        return self.batch_size

    def _num_train(self) -> int:
        return len(self.train_data)  # type: ignore[arg-type]

    def _stream(self) -> Stream:
        """Returns the position in the training data, in batches of the present number of devices."""
        size = self._train_batch_size() * ranks(self.trainer)[1]
        if self._position is None:
            self._position = Stream(self.seed, self._num_train(), size)
        self._position.global_batch = size
        return self._position
