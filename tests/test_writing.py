"""A file is whole or what it was before, and a full disk is called that, whoever writes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from stitchvm.writing import written

WRITERS: dict[str, Callable[[Path], Any]] = {
    "torch": lambda part: torch.save(torch.zeros(2**20), part),
    "safetensors": lambda part: save_file({"x": torch.zeros(2**20)}, part),
    "text": lambda part: part.write_text("x" * 2**20),
    "pillow": lambda part: Image.fromarray(np.zeros((64, 64), np.uint8)).save(part, format="PNG"),
}


def refused(part: Path) -> None:
    """Does what safetensors does on a full disk: it clears up what it has written, and says why in words."""
    part.unlink()
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


FULL = WRITERS | {"safetensors": refused}


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_is_whole_takes_the_place(
    tmp_path: Path, write: Callable[[Path], Any], sync: bool
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"as it was")
    with written(file, sync) as part:
        write(part)
        assert file.read_bytes() == b"as it was"
    assert file.stat().st_size > len(b"as it was") and list(tmp_path.iterdir()) == [file]
    (tmp_path / "usual").touch()  # who may read it is the system's matter, not the writer's
    assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("write", FULL.values(), ids=FULL)
def test_a_full_disk_is_called_that(
    tmp_path: Path, write: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, name = tmp_path / "file", UUID(int=1)
    file.write_bytes(b"as it was")
    monkeypatch.setattr("stitchvm.writing.uuid4", lambda: name)
    (tmp_path / f".file.{name.hex}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, written(file) as part:
        write(part)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(file)
    assert file.read_bytes() == b"as it was" and list(tmp_path.iterdir()) == [file]


def test_what_has_another_reason_keeps_its_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(RuntimeError, match="of another kind"), written(file):
        raise RuntimeError("of another kind")
    with pytest.raises(KeyboardInterrupt), written(file) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match="nowhere"), written(file):
        Path("nowhere").read_text()
    assert not list(tmp_path.iterdir())
