"""Reading the published annotation files: JSON with checks, and names matched with the files that are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stitchvm.data.reading import list_images, require


def read_json(path: Path, expected: type) -> Any:
    """Returns the content of a JSON file whose top level is a non-empty list or dict, as `expected`.

    Raises:
        ValueError: If it is not JSON, not of that type, or empty.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): was the download cut short?"
        ) from error
    if not isinstance(content, expected) or not content:
        kind = "a non-empty list of entries" if expected is list else "a non-empty object"
        raise ValueError(f"{path} must hold {kind}, got {_shorten(content)}.")
    return content


def field(entry: Any, names: Sequence[str], path: Path, position: int | str) -> Any:
    """Returns the entry's value under the first of `names` that it has.

    Raises:
        ValueError: If it has none; the message says which keys it has and which were expected.
    """
    if isinstance(entry, dict):
        for name in names:
            if name in entry:
                return entry[name]
    has = sorted(entry) if isinstance(entry, dict) else _shorten(entry)
    wanted = " or ".join(repr(name) for name in names)
    raise ValueError(
        f"Entry {position} of {path} has no key {wanted}, only {has}: is it the right file?"
    )


def same_length(a: Sequence[Any], b: Sequence[Any], names: str, path: Path, position: int) -> None:
    """Raises ValueError if two lists of an entry, called `names`, differ in length."""
    if len(a) != len(b):
        raise ValueError(
            f"Entry {position} of {path} has {names} of lengths {len(a)} and {len(b)}; expected the same."
        )


class Located:
    """The image files below a folder, found by the names that annotations use.

    A name may be the path below the folder, or carry folders that the unpacked data set does not have (or lack those
    it has), as long as its last part is unique.

    Arguments:
        root: The data set's folder.
        folders: Alternative names of the folder of images below it ("" is `root` itself).
        what: What the images are, for messages.
        where: Where to get them, in words.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """

    def __init__(self, root: str, folders: list[str], what: str, where: str) -> None:
        folder = require(root, folders, what, where)
        names = list_images(folder)
        if not names:
            raise ValueError(f"No images below {folder}: expected {what} there, from {where}.")
        self.folder = folder
        self.names = set(names)
        self.by_last: dict[str, str | None] = {}
        for name in names:
            last = name.rsplit("/", 1)[-1]
            self.by_last[last] = None if last in self.by_last else name

    def find(self, name: str) -> str | None:
        """Returns the path of the image called `name`, None if it is missing."""
        found = name if name in self.names else self.by_last.get(name.rsplit("/", 1)[-1])
        return None if found is None else str(self.folder / found)

    def split(self, names: Sequence[str]) -> tuple[list[int], list[str], list[str]]:
        """Returns the positions in `names` whose images are there, their paths, and the names of the others."""
        paths = [self.find(name) for name in names]
        kept = [i for i, path in enumerate(paths) if path is not None]
        missing = [str(self.folder / names[i]) for i, path in enumerate(paths) if path is None]
        return kept, [paths[i] or "" for i in kept], missing


def _shorten(content: Any) -> str:
    text = repr(content)
    return text if len(text) < 60 else text[:57] + "..."
