"""What both kinds of data modules share: checks of their arguments, the count of bad images, evaluation loaders."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.utils.data import Dataset

from stitchvm.data.base import Sample
from stitchvm.data.datasets import BadImages
from stitchvm.data.loader import Loader
from stitchvm.data.sampling import EvaluationSampler


def check_arguments(resolution: int, batch_size: int, num_workers: int) -> None:
    """Raises ValueError if a number is out of range."""
    numbers = {
        "resolution": (resolution, 1),
        "batch_size": (batch_size, 1),
        "num_workers": (num_workers, 0),
    }
    for name, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def count_bad(dataset: Dataset[Sample], max_fraction: float) -> BadImages:
    """Returns the counter for a data set. Raises ValueError if too many of its images are missing already."""
    if not 0 <= max_fraction <= 1:
        raise ValueError(
            f"max_bad_fraction is a fraction of the images, from 0 to 1; got {max_fraction}."
        )
    return BadImages(len(dataset), getattr(dataset, "missing", ()), max_fraction)  # type: ignore[arg-type]


def evaluation_loader(data: Any, dataset: Dataset[Sample]) -> Loader:
    """Returns the batches of one evaluation set for the device that `data`, a data module, runs on."""
    sampler = EvaluationSampler(len(dataset), data.batch_size, *ranks(data.trainer))  # type: ignore[arg-type]
    bad = count_bad(dataset, data.max_bad_fraction)
    return Loader(dataset, sampler, num_workers=data.num_workers, bad=bad)


def ranks(trainer: Trainer | None) -> tuple[int, int]:
    """Returns (rank, number of devices) among which data is divided: the Trainer's.

    Without a Trainer, those of the process group, and (0, 1) where there is none.
    """
    if trainer is None:
        grouped = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    kwargs = trainer.distributed_sampler_kwargs
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)
