"""Files of prompts: one a line, JSON lines, a JSON list, DrawBench, GenEval's metadata.

- Text: UTF-8, one prompt a line, nothing quoted and no columns. DrawBench as it goes round (`test.txt`) has 1,000
  lines of which 200 are distinct; with `unique` each is kept once, in the order of appearance.
- JSON lines or a JSON list: strings, or objects with the prompt under a key (HPDv2's train.json).
- GenEval's evaluation_metadata.jsonl: objects with "tag" and "include"; the whole object is kept with the prompt,
  since the evaluation needs it. Other projects' copies repeat the 553 lines four times.

Lines end with a line feed, nothing else: prompts from the web contain form feeds and Unicode line separators, at which
Python's `splitlines` would cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stitchvm.data.annotations import field, read_json
from stitchvm.metrics.geneval_metadata import check_metadata, is_metadata

__all__ = ["Entry", "distinct", "read_entries", "read_prompts"]

TABLES = (".csv", ".tsv", ".parquet", ".xlsx", ".arrow")


class Entry(NamedTuple):
    """A prompt, and its GenEval metadata if it has any."""

    prompt: str
    metadata: dict[str, Any] | None = None


def read_prompts(path: str | Path, key: str = "prompt", unique: bool = True) -> list[str]:
    """Returns the prompts of a file, blank ones left out; see `read_entries`."""
    return [entry.prompt for entry in read_entries(path, key, unique)]


def read_entries(path: str | Path, key: str = "prompt", unique: bool = True) -> list[Entry]:
    """Returns the prompts of a file with their metadata, blank ones left out.

    Arguments:
        path: A .json or .jsonl file; any other is text, one prompt a line.
        key: The key of the prompt in JSON objects.
        unique: Whether to keep each prompt once.

    Raises:
        ValueError: If there is no such file, it is malformed, it has no prompts, only some of its entries are
            GenEval metadata, or with `unique` one prompt has two different metadata.
    """
    file = Path(path)
    if not file.exists():
        raise ValueError(
            f"there is no file of prompts {file}: expected a .txt file with one prompt a line, or .jsonl or .json; "
            "correct data.path."
        )
    if file.is_dir():
        raise ValueError(f"{file} is a folder; expected a .txt, .jsonl or .json file of prompts.")
    if file.suffix.lower() in TABLES:
        raise ValueError(
            f"{file} is a table; expected a .txt file with one prompt a line, or .jsonl or .json with the key "
            f"{key!r}. Export its column of prompts."
        )
    entries = []
    for where, item in _items(file):
        prompt = field(item, (key,), file, where) if isinstance(item, dict) else item
        if not isinstance(prompt, str):
            raise ValueError(
                f"Entry {where} of {file}: expected a text, or an object with a text under {key!r}; got "
                f"{prompt!r}."
            )
        metadata = item if is_metadata(item) else None
        if metadata is not None:
            check_metadata(metadata, f"Entry {where} of {file}")
        if prompt.strip():
            entries.append(Entry(prompt.strip(), metadata))
    if not entries:
        raise ValueError(
            f"{file} has no prompts; expected one a line, or objects with the key {key!r}."
        )
    plain = [entry.prompt for entry in entries if entry.metadata is None]
    if 0 < len(plain) < len(entries):
        raise ValueError(
            f"{file}: {len(entries) - len(plain)} entries are GenEval metadata and {len(plain)} are not, such as "
            f"{plain[0]!r}. Give one kind per file."
        )
    return distinct(entries, file) if unique else entries


def distinct(entries: Sequence[Entry], file: Path) -> list[Entry]:
    """Returns each prompt once. Raises ValueError if one has two different metadata."""
    kept: dict[str, Entry] = {}
    for entry in entries:
        first = kept.setdefault(entry.prompt, entry)
        if first.metadata != entry.metadata:
            raise ValueError(
                f"{file} has the prompt {entry.prompt!r} twice with different metadata: which one counts? "
                "Mend the file, or set unique to false to use both."
            )
    return list(kept.values())


def _items(file: Path) -> Iterable[tuple[int | str, Any]]:
    """Yields where an entry stands, for messages, and what it is: a text, or what JSON holds there."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        yield from enumerate(read_json(file, list))
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if suffix != ".jsonl":
            yield f"in line {number}", line
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} of {file} is not valid JSON ({error}).") from error
        yield f"in line {number}", item
