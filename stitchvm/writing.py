"""Files that are whole or not there, and the system's reason where one cannot be written.

What torch and safetensors raise on a full disk is none of Python's own errors ("unexpected pos 156480 vs 156374").
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written"]


@contextmanager
def written(file: Path, sync: bool = False) -> Iterator[Path]:
    """Gives a path beside a file to write to, which takes the file's place once it is whole.

    Arguments:
        file: The file; what it holds stays until then.
        sync: Whether to wait until the disk has it.

    Raises:
        OSError: If it cannot be written, such as to a full disk, whoever was writing and whatever was raised.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        try:
            yield part
        except OSError as error:
            if error.errno == errno.ENOSPC:  # of a write, which knows no name
                raise OSError(error.errno, error.strerror, str(file)) from error
            raise
        except Exception as error:
            _write_more(part, file, error)
            raise
        if sync:
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _write_more(part: Path, file: Path, cause: Exception) -> None:
    """Raises OSError with the system's reason if nothing more can be written."""
    try:
        with part.open("ab") as stream:
            stream.write(bytes(2**20))
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from cause
