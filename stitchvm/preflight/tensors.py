"""Headers of weight files: names, shapes and whether the file is as long as its header says.

A safetensors file is 8 bytes with the length of the header, the header (JSON: name → dtype, shape, places), the data.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "BrokenFile",
    "Shapes",
    "check_torch_file",
    "find_weights",
    "read_header",
    "read_weights",
]

Shapes = dict[str, tuple[int, ...]]
LONGEST = 100_000_000  # bytes of a header that is one
AGAIN = "download it again"


class BrokenFile(ValueError):
    """A file is there and is not what its name says."""


class Weights(NamedTuple):
    """Where a network's tensors are.

    Attributes:
        files: The files, absent ones too.
        table: The index that names them, if they are shards.
        names: The file of each tensor as the index has it.
    """

    files: tuple[Path, ...]
    table: Path | None = None
    names: dict[str, str] | None = None


def find_weights(folder: Path, stem: str) -> Weights:
    """Returns the files of a network: its shards if it has an index, else STEM.safetensors.

    Raises:
        BrokenFile: If the index is no index.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return Weights((folder / f"{stem}.safetensors",))
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = tuple(folder / name for name in sorted(set(names.values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFile(f"{index.name} is no index of shards ({type(error).__name__})") from error
    return Weights(files, index, names)


def read_weights(weights: Weights) -> Shapes:
    """Returns names and shapes of all tensors, from the headers.

    Raises:
        BrokenFile: If a file is truncated, or a shard lacks a tensor that the index says it has.
        FileNotFoundError: If a file is not there.
    """
    shapes: Shapes = {}
    for file in weights.files:
        own = read_header(file)
        if weights.names is not None:
            lost = [k for k, name in weights.names.items() if name == file.name and k not in own]
            if lost:
                raise BrokenFile(
                    f"{file.name} lacks '{lost[0]}' and {len(lost) - 1} more tensors that the index puts there: "
                    "shards and index are of different downloads"
                )
        shapes |= own
    return shapes


def read_header(file: Path) -> Shapes:
    """Returns names and shapes of a safetensors file's tensors.

    Raises:
        BrokenFile: If it is truncated or no safetensors file.
        FileNotFoundError: If it is not there.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        first = handle.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version " or size < 8:
            raise BrokenFile(_not_data(file, size))
        if length > LONGEST:
            raise BrokenFile(f"{file.name} is no safetensors file")
        if size < 8 + length:
            raise BrokenFile(
                f"{file.name} is truncated: {size:,} bytes, its header alone has {8 + length:,}"
            )
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise BrokenFile(f"{file.name} is no safetensors file ({error})") from error
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size != end:
        kind = "truncated" if size < end else "longer than it should be"
        raise BrokenFile(f"{file.name} is {kind}: {size:,} bytes of {end:,}")
    return {name: tuple(entry["shape"]) for name, entry in tensors.items()}


def check_torch_file(file: Path) -> None:
    """Checks that a torch file is whole: a zip archive has its list of contents at the end.

    Raises:
        BrokenFile: If it is cut off or no torch file.
        FileNotFoundError: If it is not there.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        first = handle.read(8)
    if first[:2] == b"PK":
        if not zipfile.is_zipfile(file):
            raise BrokenFile(
                f"{file.name} is truncated: {size:,} bytes, without its list of contents"
            )
    elif first[:1] != b"\x80":  # the older format is a pickle
        raise BrokenFile(_not_data(file, size))


def _not_data(file: Path, size: int) -> str:
    return f"{file.name} holds no weights ({size:,} bytes): a pointer of Git LFS, a web page, or cut off"


def blocks(shapes: Shapes, prefix: str) -> int:
    """Returns how many numbered parts a list of modules has."""
    return 1 + max(_numbers(shapes, prefix), default=-1)


def _numbers(shapes: Shapes, prefix: str) -> Iterator[int]:
    for name in shapes:
        if name.startswith(prefix):
            number = name[len(prefix) :].partition(".")[0]
            if number.isdigit():
                yield int(number)
