"""A run's folder: it can be written into, and one run at a time does."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_folder", "claimed"]

ANOTHER = "choose another folder with --trainer.default_root_dir"


def check_folder(folder: str | Path) -> None:
    """Raises PermissionError if nothing can be written into `folder`, which need not be there yet."""
    if "://" in str(folder):
        return
    path = Path(folder).absolute()
    there = next(above for above in (path, *path.parents) if above.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "read-only for you" if there.is_dir() else "a file"
        raise PermissionError(f"{there} is {what}: a run needs a folder to write into; {ANOTHER}")


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Holds `folder`, made if need be, against other runs; whatever ends the process gives it back.

    Where the file system knows no locks nothing is held.

    Raises:
        FileExistsError: If another run holds it.
    """
    if "://" in str(folder):
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another run is writing into {folder}, and their files would mix: let it end, or {ANOTHER}"
            ) from None
        except OSError:  # some network file systems
            pass
        yield
    finally:
        os.close(descriptor)
