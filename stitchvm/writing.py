"""Files that are whole or not there, and the system's reason where one cannot be written.

What torch and safetensors raise on a full disk is none of Python's own errors ("unexpected pos 156480 vs 156374").
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

__all__ = ["readable", "written"]


@contextmanager
def written(file: Path, sync: bool = False) -> Iterator[Path]:
    """Gives a path beside a file to write to, which takes the file's place once it is whole.

    Arguments:
        file: The file; what it holds stays until then.
        sync: Whether to wait until the disk has it.

    Raises:
        OSError: If it cannot be written, such as to a full disk, whoever was writing and whatever was raised.
    """
    part = file.with_name(
        f".{file.name}.{uuid4().hex}.part"
    )  # processes of two nodes may have one number
    try:
        part.touch()
        mode = part.stat().st_mode
        try:
            yield part
        except Exception as error:
            number = _reason(part, error)
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(file)) from error
        if sync:
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
        part.chmod(mode)  # as any new file's: safetensors leaves its own for the owner's eyes only
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def readable(*folders: Path) -> None:
    """Gives the safetensors files in folders the mode of any new file, for what other libraries have written there."""
    for folder in folders:
        probe = folder / f".{uuid4().hex}"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        for file in folder.glob("*.safetensors"):
            with suppress(PermissionError):  # somebody else's, beside them
                file.chmod(mode)


def _reason(part: Path, error: Exception) -> int | None:
    """Returns the system's number of what kept a file from being written; None if that was something else."""
    if isinstance(error, OSError):  # of a write, it knows no name
        return error.errno if error.filename is None else None
    said = re.search(r"\(os error (\d+)\)", str(error))  # safetensors, which has cleared up
    if said is not None:
        return int(said[1])
    try:
        with part.open("ab") as stream:
            stream.write(bytes(2**20))
    except OSError as own:
        return own.errno
    return None
