"""Prompts for sampling and fine-tuning: a text file (DrawBench), JSON lines, or the prompts of HPDv2."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from stitchvm.data.annotations import field, read_json
from stitchvm.data.base import Sample
from stitchvm.data.checks import evaluation_loader
from stitchvm.data.loader import Loader
from stitchvm.data.module import DataModule
from stitchvm.data.reading import require


class PromptDataset(Dataset[Sample]):
    """Prompts by their index."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the prompts."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        return {"index": index, "prompt": self.prompts[index]}


class Prompts(DataModule):
    """Batches with `prompt` alone: shuffled for training, in order for validation, test and predict.

    Arguments:
        path: A .txt file with one prompt a line, or a .jsonl file or .json list (HPDv2's train.json) of objects
            with `key`.
        val_path: The prompts for validation, test and predict; by default the same.
        key: The key of the prompt in JSON.
        unique: Whether to keep each prompt once, as DrawBench's 1,000-line files and HPDv2's pairs repeat them.
        batch_size: Prompts per batch and device.
        seed: Fixes the order of the training prompts.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        key: str = "prompt",
        unique: bool = True,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(resolution=1, batch_size=batch_size, num_workers=0, seed=seed)
        self.path = path
        self.val_path = val_path
        self.key = key
        self.unique = unique

    def fit_data(self) -> tuple[PromptDataset, PromptDataset]:
        train = read_prompts(self.path, self.key, self.unique)
        val = (
            train if self.val_path is None else read_prompts(self.val_path, self.key, self.unique)
        )
        return PromptDataset(train), PromptDataset(val)

    def setup(self, stage: str | None = None) -> None:
        super().setup("fit" if stage == "fit" else None)

    def test_dataloader(self) -> Loader:
        """Returns this device's part of the prompts, in order, unpadded."""
        return evaluation_loader(self, self.val_data)

    def predict_dataloader(self) -> Loader:
        """Returns the same as `test_dataloader`."""
        return evaluation_loader(self, self.val_data)


def read_prompts(path: str | Path, key: str = "prompt", unique: bool = True) -> list[str]:
    """Returns the prompts of a file, blank ones left out.

    Raises:
        ValueError: If there is no such file, it is malformed, or it has no prompts.
    """
    file = require(
        path, [""], "The file of prompts", "wherever your prompts are (.txt, .jsonl or .json)"
    )
    if file.is_dir():
        raise ValueError(f"{file} is a folder; expected a .txt, .jsonl or .json file of prompts.")
    if file.suffix == ".json":
        prompts = [field(entry, (key,), file, i) for i, entry in enumerate(read_json(file, list))]
    elif file.suffix == ".jsonl":
        prompts = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"Line {number} of {file} is not valid JSON ({error})."
                    ) from error
                prompts.append(field(entry, (key,), file, f"in line {number}"))
    else:
        prompts = file.read_text(encoding="utf-8").splitlines()
    prompts = [str(prompt).strip() for prompt in prompts]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(
            f"{file} has no prompts; expected one a line, or objects with the key {key!r}."
        )
    return list(dict.fromkeys(prompts)) if unique else prompts
