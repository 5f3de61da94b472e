"""Checkpoint files of this machine, written and read without a second copy in memory.

Lightning serialises a checkpoint into a buffer, which holds it twice, and lets a file of the system's temporary folder
take its name: a copy, where that folder lies on another disk, and half a copy if the process is killed. Here the file
is written beside the one it replaces. What is read is mapped: weights are copied from the file into the module, and the
processes of one machine share its pages. A file is replaced, never written over, so that what is mapped stays as it was
read. Addresses such as s3:// go Lightning's way.
"""

from __future__ import annotations

import glob
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from stitchvm.writing import written

__all__ = ["LeanCheckpointIO", "check_checkpoint_file"]


class LeanCheckpointIO(TorchCheckpointIO):
    """Lightning's `TorchCheckpointIO` with one copy in memory less, for files of this machine; the same file format."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes `checkpoint` at `path`; until it is whole, `path` is what it was before.

        What a killed process has left half written of the same file is removed.

        Raises:
            OSError: If it cannot be written, such as to a full disk.
        """
        if storage_options is not None or not _local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        for half in file.parent.glob(f".{glob.escape(file.name)}.*.part"):
            half.unlink(missing_ok=True)
        with written(file) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Returns the checkpoint at `path`; its tensors are pages of the file, copied where they are changed.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is none, or a part of one.
        """
        if not _local(path) or not Path(path).is_file():
            return super().load_checkpoint(path, map_location, weights_only)
        check_checkpoint_file(path)
        if not zipfile.is_zipfile(path):
            return super().load_checkpoint(path, map_location, weights_only)
        checkpoint: dict[str, Any] = torch.load(
            path, map_location=map_location, weights_only=weights_only, mmap=True
        )
        return checkpoint


def check_checkpoint_file(path: str | Path) -> None:
    """Raises ValueError if a file is neither of PyTorch's formats to its end; reads a few bytes of it."""
    with open(path, "rb") as file:
        old = file.read(2) == b"\x80\x02"  # before zip files: a pickle
    if not old and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a checkpoint, or only a part of one ({Path(path).stat().st_size} bytes): expected a file "
            "that a run has left, such as RUN/checkpoints/last.ckpt; give another with --ckpt_path"
        )


def _local(path: str | Path) -> bool:
    return "://" not in str(path)
