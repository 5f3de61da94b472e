"""What a Trainer iterates over: a `DataLoader` that starts where the run stands.

Lightning resumes its counters in the middle of an epoch, but a map-style `DataLoader` would begin the epoch again. A
`Loader` asks where to begin when its first batch is wanted, not when it is made: by then the Trainer has restored its
progress (it makes iterators earlier, in `estimated_stepping_batches` even before it loads a checkpoint). What counts as
consumed are batches handed over, whatever the workers have prefetched.

It is deliberately no subclass of `DataLoader`: Lightning would put its padding `DistributedSampler` into one, and the
samplers here divide the data among the devices themselves, so that `use_distributed_sampler` does not matter. For the
same reason the loader looks stateful to Lightning, which otherwise warns that resuming is inexact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from stitchvm.data.base import Batch, Sample, collate, to_float
from stitchvm.data.datasets import BadImages
from stitchvm.data.sampling import EpochSampler, EvaluationSampler


class Loader:
    """Iterates over a data set in the order of a sampler, counting unreadable images.

    Arguments:
        dataset: The samples, by index.
        sampler: The batches of this rank: a sampler, or a list of lists of indices.
        num_workers: Worker processes; they live as long as the loader.
        bad: Counts the unreadable images.
        start: Returns the (epoch, batch) to begin at, asked at the first batch of each iteration. By default a
            complete iteration is followed by the next epoch, an abandoned one by the same epoch from its beginning.
        on_batch: Called with (epoch, batches handed over in it) before each batch is handed over.
        as_float: Whether to turn uint8 pixels into float32 here.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: EpochSampler | EvaluationSampler | Sequence[list[int]],
        *,
        num_workers: int = 0,
        bad: BadImages | None = None,
        start: Callable[[], tuple[int, int]] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
        as_float: bool = True,
    ) -> None:
        self.dataset = dataset
        self.batch_sampler = sampler
        self.bad = bad
        self.start = start
        self.on_batch = on_batch
        self.as_float = as_float
        self.epoch = 0
        self.batch = 0
        self._resume: tuple[int, int] | None = None
        self.loader: DataLoader[Sample] = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            # Its own stream: a worker seed drawn from the global one would shift the model's noise after a resume.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        """Returns the batches of a whole epoch on this rank."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing below runs before the first batch is asked for.
        sampler = self.batch_sampler
        if isinstance(sampler, EpochSampler):
            self.epoch, self.batch = (
                self.start() if self.start is not None else self._next_position()
            )
            sampler.seek(self.epoch, self.batch)
        else:
            self.batch = 0
        for batch in self.loader:
            names = batch.pop("bad")
            if self.bad is not None:
                self.bad.add(names, len(batch["index"]) + len(names))
            self.batch += 1
            if isinstance(sampler, EpochSampler):
                batch["epoch"] = self.epoch
            if self.on_batch is not None:
                self.on_batch(self.epoch, self.batch)
            yield to_float(batch) if self.as_float else batch

    @property
    def _iterator(self) -> Any:
        # Lightning ends the workers of what has this attribute when a run ends. Left to the garbage collector, which
        # may take their queues away first, each would be waited for in vain.
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: None) -> None:
        self.loader._iterator = iterator

    def _next_position(self) -> tuple[int, int]:
        epoch, batch = self._resume or (self.epoch, self.batch)
        resumed, self._resume = self._resume is not None, None
        if batch >= len(self):
            return epoch + 1, 0
        return epoch, batch if resumed else 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, for loops without a Trainer (with one, the data module keeps it)."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the next iteration go on from a position of `state_dict`."""
        self._resume = state["epoch"], state["batch"]
