"""The images of an update: which prompt, which of its images, and the random numbers that belong to each.

An update has P prompts of K images. A device has whole prompts, so that a group of images never straddles two, and
row p·K + n is image n of its p-th prompt. Random numbers are keyed by (purpose, seed, update, prompt index, n): they
depend neither on the number of devices nor on micro-batches, and nothing has to be stored to resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stitchvm.randomness import keyed_generator, keyed_normal, keyed_uniform

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """Images of an update on this device.

    Attributes:
        seed: The run's seed.
        update: The number of the update, skipped ones counted.
        index: The prompts' indices in the data set, one per image.
        number: Which image of its prompt each is, 0 … K − 1.
        prompts: The prompts, one per image.
        device: Where random numbers go.
        place: The images' positions among those of the device.
    """

    seed: int
    update: int
    index: tuple[int, ...]
    number: tuple[int, ...]
    prompts: tuple[str, ...]
    device: torch.device
    place: tuple[int, ...]

    @classmethod
    def of(
        cls, batch: dict[str, Any], group_size: int, seed: int, update: int, device: torch.device
    ) -> Rows:
        """Returns the rows of a batch of prompts.

        Arguments:
            batch: The batch, with `index` and `prompt`.
            group_size: The images K of a prompt.
            seed: The run's seed.
            update: The number of the update.
            device: Where random numbers go.
        """
        index, prompts = batch["index"].tolist(), batch["prompt"]
        return cls(
            seed,
            update,
            tuple(i for i in index for _ in range(group_size)),
            tuple(range(group_size)) * len(index),
            tuple(p for p in prompts for _ in range(group_size)),
            device,
            tuple(range(len(index) * group_size)),
        )

    def __len__(self) -> int:
        return len(self.index)

    def split(self, size: int | None) -> Iterator[Rows]:
        """Yields micro-batches of at most `size` images; all at once for None."""
        size = size or len(self)
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    def take(self, places: Iterable[int]) -> Rows:
        """Returns some of these images, by their places among them."""
        i = list(places)
        index, number, place = (
            tuple(each[k] for k in i) for each in (self.index, self.number, self.place)
        )
        prompts = tuple(self.prompts[k] for k in i)
        return Rows(self.seed, self.update, index, number, prompts, self.device, place)

    @property
    def positions(self) -> Tensor:
        """The images' positions among those of the device, int64 with shape (B,), on the device."""
        return torch.tensor(self.place, device=self.device)

    @property
    def groups(self) -> Tensor:
        """An integer for each image that its prompt's images share on all ranks, int64 with shape (B,)."""
        return torch.tensor(self.index, device=self.device)

    def normal(self, purpose: str, shape: tuple[int, ...], *more: int | str) -> Tensor:
        """Returns standard normal noise (B, *shape), float32, of a purpose such as "z_1"; `more` keys further draws."""
        return keyed_normal(self._keys(purpose, more), shape, self.device)

    def uniform(self, purpose: str, n: int, *more: int | str) -> Tensor:
        """Returns uniforms in [0, 1) with shape (B, n), float32."""
        return keyed_uniform(self._keys(purpose, more), n).to(self.device)

    def streams(self, purpose: str) -> list[torch.Generator]:
        """Returns one random stream per image, for values that roll out."""
        return [keyed_generator(*key) for key in self._keys(purpose, ())]

    def _keys(self, purpose: str, more: tuple[int | str, ...]) -> list[tuple[int | str, ...]]:
        return [
            (purpose, self.seed, self.update, i, n, *more)
            for i, n in zip(self.index, self.number, strict=True)
        ]
