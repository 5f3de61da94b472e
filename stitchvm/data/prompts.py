"""Prompts for sampling and fine-tuning: from a file (see `stitchvm/data/prompt_files.py`) or given as they are."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from stitchvm.data.base import Sample
from stitchvm.data.checks import evaluation_loader, ranks
from stitchvm.data.loader import Loader
from stitchvm.data.module import DataModule
from stitchvm.data.prompt_files import Entry, read_entries, read_prompts

__all__ = ["PromptDataset", "PromptModule", "Prompts", "check_given", "read_prompts"]


class PromptDataset(Dataset[Sample]):
    """Prompts by their index.

    Arguments:
        prompts: The prompts.
        metadata: GenEval's entry of each; samples then have `metadata`.
    """

    def __init__(
        self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None
    ) -> None:
        self.prompts = list(prompts)
        self.metadata = None if metadata is None else list(metadata)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the prompts."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = {"index": index, "prompt": self.prompts[index]}
        return sample if self.metadata is None else sample | {"metadata": self.metadata[index]}


class PromptModule(DataModule):
    """Batches with `prompt` and no images: shuffled for training, in order for validation, test and predict.

    A subclass says which prompts: `fit_data`. With several devices each gets its own part of the prompts, unpadded:
    only with a batch size of 1, or more devices than prompts, may one be given out twice (the same `index`).

    Arguments:
        batch_size: Prompts per batch and device.
        seed: Fixes the order of the training prompts.
        prompts_per_update: Prompts per training batch on all devices together; `batch_size` on each by default.
    """

    def __init__(
        self, batch_size: int = 8, seed: int = 0, prompts_per_update: int | None = None
    ) -> None:
        super().__init__(resolution=1, batch_size=batch_size, num_workers=0, seed=seed)
        if prompts_per_update is not None and prompts_per_update < 1:
            raise ValueError(
                f"data.prompts_per_update = {prompts_per_update}: expected at least 1, or null for batch_size on each "
                "device."
            )
        self.prompts_per_update = prompts_per_update

    def setup(self, stage: str | None = None) -> None:
        """Lists the prompts, once.

        Raises:
            ValueError: If there are none, or an update's prompts cannot be divided among the devices.
        """
        if stage == "fit":
            self._train_batch_size()
        super().setup("fit" if stage == "fit" else None)

    def _train_batch_size(self) -> int:
        if self.prompts_per_update is None:
            return self.batch_size
        devices = ranks(self.trainer)[1]
        if self.prompts_per_update % devices:
            near = [n for n in range(1, devices + 1) if self.prompts_per_update % n == 0]
            raise ValueError(
                f"data.prompts_per_update = {self.prompts_per_update} on {devices} devices: expected a multiple of the "
                f"number of devices, so that each has as many. Take {near[-1]} devices, or "
                f"{-(-self.prompts_per_update // devices) * devices} prompts."
            )
        return self.prompts_per_update // devices

    def test_dataloader(self) -> Loader:
        """Returns this device's part of the prompts, in order, unpadded."""
        return evaluation_loader(self, self.val_data)

    def predict_dataloader(self) -> Loader:
        """Returns the same as `test_dataloader`."""
        return evaluation_loader(self, self.val_data)


class Prompts(PromptModule):
    """Prompts of a file, or given: batches with `prompt`, from GenEval's file also `metadata`.

    Arguments:
        path: A .txt file with one prompt a line (DrawBench), or a .jsonl file or .json list of texts or of objects
            with `key` (HPDv2's train.json, GenEval's evaluation_metadata.jsonl).
        prompts: The prompts themselves, in place of `path`.
        val_path: The prompts for validation, test and predict; by default the same.
        key: The key of the prompt in JSON.
        unique: Whether each prompt comes once. From a file, which may repeat them (DrawBench's 1,000 lines, HPDv2's
            pairs), the first of each is kept; in `prompts` a repetition is an error.
        batch_size: Prompts per batch and device.
        seed: Fixes the order of the training prompts.
        prompts_per_update: Prompts per training batch on all devices together; `batch_size` on each by default.

    Raises:
        ValueError: If not exactly one of `path` and `prompts` is given, or `prompts` has none, an empty one, or,
            with `unique`, one twice.
    """

    def __init__(
        self,
        path: str | None = None,
        prompts: list[str] | None = None,
        val_path: str | None = None,
        key: str = "prompt",
        unique: bool = True,
        batch_size: int = 8,
        seed: int = 0,
        prompts_per_update: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, prompts_per_update)
        if (path is None) == (prompts is None):
            raise ValueError(
                f"got path = {path!r} and prompts = {prompts!r}: give exactly one of them, a file "
                '(--data.path) or the prompts themselves (--data.prompts \'["a", "b"]\'); null takes back the other.'
            )
        if prompts is not None:
            check_given(prompts, unique)
        self.path = path
        self.prompts = prompts
        self.val_path = val_path
        self.key = key
        self.unique = unique

    def fit_data(self) -> tuple[PromptDataset, PromptDataset]:
        if self.prompts is not None:
            train = PromptDataset([prompt.strip() for prompt in self.prompts])
        else:
            train = self._read(self.path)
        return train, train if self.val_path is None else self._read(self.val_path)

    def _read(self, path: str | None) -> PromptDataset:
        assert path is not None
        return dataset_of(read_entries(path, self.key, self.unique))


def dataset_of(entries: Sequence[Entry]) -> PromptDataset:
    """Returns the data set of entries of which all have metadata, or none."""
    metadata = [entry.metadata for entry in entries if entry.metadata is not None]
    return PromptDataset([entry.prompt for entry in entries], metadata or None)


def check_given(prompts: Sequence[str], unique: bool) -> None:
    """Raises ValueError if given prompts are no list of texts, one is empty, or, with `unique`, one comes twice."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list, got one text: [{prompts!r}]")
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts must be a list of texts that are not empty, got {prompts!r}.")
    counts = Counter(prompt.strip() for prompt in prompts)
    twice = [prompt for prompt, count in counts.items() if count > 1]
    if twice and unique:
        raise ValueError(
            f"prompts has {twice[0]!r} {counts[twice[0]]} times: set unique to false to sample it as often."
        )
