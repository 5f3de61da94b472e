"""Which sample goes into which batch on which device.

**Training.** The order of an epoch is a permutation fixed by (seed, epoch) alone. With W devices of batch size B the
b-th global batch is positions b·B·W ... (b + 1)·B·W − 1 of it, and rank r takes every W-th of them, from the r-th on.
So a global batch has the same samples however it is divided, and a run that goes on with another W at the same B·W sees
the same global batches. The ragged tail (fewer than B·W samples) is dropped; another epoch drops others.

**Evaluation.** Rank r takes samples r, r + W, r + 2W, ... in order, unpadded. All ranks must take the same number of
steps, since a sharded network's forward is a collective; a rank with one sample fewer therefore splits its last batch
in two where another has one batch more. Only when even that is impossible (batch size 1, or fewer samples than
devices) does a rank repeat one sample, which metrics drop by its `index`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from stitchvm.randomness import keyed_generator


def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Returns the permutation of an epoch, int64 with shape (num_samples,), fixed by (seed, epoch)."""
    return torch.randperm(num_samples, generator=keyed_generator(seed, "order", epoch))


def check_one_batch(num_samples: int, batch_size: int, world_size: int) -> None:
    """Raises ValueError if a data set has fewer samples than one global batch."""
    if num_samples < batch_size * world_size:
        raise ValueError(
            f"The training set has {num_samples} samples, fewer than one global batch of {batch_size * world_size}"
            f" (batch_size {batch_size} on {world_size} devices): lower batch_size (of prompts: "
            "prompts_per_update), or give more data."
        )


class EpochSampler:
    """Batches of one rank, from any batch of any epoch on.

    Arguments:
        num_samples: The length of the data set.
        batch_size: Samples per batch and device, B.
        seed: Fixes the order of all epochs together.
        rank: This device's number r.
        world_size: The number of devices W.

    Raises:
        ValueError: If the data set has fewer samples than one global batch.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        check_one_batch(num_samples, batch_size, world_size)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.batch = 0

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Lets the next iteration begin with batch `batch` of epoch `epoch`."""
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        """Returns the batches of a whole epoch, wherever the next iteration begins."""
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.num_samples, self.seed, self.epoch)
        size = self.batch_size * self.world_size
        for b in range(self.batch, len(self)):
            yield order[b * size + self.rank : (b + 1) * size : self.world_size].tolist()


class EvaluationSampler:
    """One rank's part of an evaluation set, in order, in as many batches as every other rank has.

    Arguments:
        num_samples: The length of the data set.
        batch_size: The most samples in a batch.
        rank: This device's number r.
        world_size: The number of devices W.
    """

    def __init__(
        self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        # A rank beyond the last sample repeats one, so that it takes part in the collectives.
        share = list(range(rank, num_samples, world_size)) or [rank % num_samples]
        largest = -(-num_samples // world_size)
        self.batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        if len(self.batches) < -(-largest // batch_size):
            last = self.batches.pop()
            half = -(-len(last) // 2)
            self.batches += [last[:half], last[half:] or last]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
