"""Folders of finished images, in three layouts.

1. As the sampling command writes it: `samples.jsonl` with one object a line,

       {"index": number of the prompt, "prompt": text, "seed": number, "file": "images/000012_s0.png", …}

   and the images where `file` says, below the folder. A run on several devices that was ended has left
   `samples.rank0.jsonl`, …; they are read after it. Of lines with the same index and seed the last one counts (a
   sample that was made again). A last line that was cut short, by the end of the run that wrote it, is left out.
2. GenEval's: `NNNNN/metadata.jsonl`, the prompt's entry, and `NNNNN/samples/0000.png`, `0001.png`, …
3. Any folder of images, with a file of as many prompts: they belong together in their order, which for the images is
   that of their names with numbers in them read as numbers (2.png before 10.png).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stitchvm.data.prompt_files import read_entries
from stitchvm.data.reading import list_images
from stitchvm.metrics.geneval_metadata import check_metadata

__all__ = ["SampleFile", "natural", "read_folder", "read_geneval", "read_plain", "read_samples"]

LINES = "samples.jsonl"


@dataclass(frozen=True)
class SampleFile:
    """One image.

    Attributes:
        file: Its path below the folder.
        number: Its running number in the list of samples.
        group: The number of its prompt.
        seed: Its seed, or its number among the images of its prompt.
        prompt: Its prompt, if known.
        metadata: GenEval's entry of its prompt, if there is one.
        line: All that samples.jsonl says of it.
    """

    file: str
    number: int
    group: int
    seed: int
    prompt: str | None = None
    metadata: dict[str, Any] | None = None
    line: dict[str, Any] = field(default_factory=dict)


def read_folder(
    root: str | Path, prompts: str | Path | None = None, key: str = "prompt"
) -> list[SampleFile]:
    """Returns the images of a folder in whichever layout it has. They need not be there, or readable.

    Arguments:
        root: The folder.
        prompts: A file of prompts, for a folder of images only.
        key: The key of the prompt in that file, if it is JSON.

    Raises:
        ValueError: If there is no such folder, it has no images, what it has is malformed, or prompts are given
            for a folder that has its own.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: give the folder of the samples.")
    own = LINES if _files(root) else None
    if own is None and next(root.glob("*/metadata.jsonl"), None) is not None:
        own = "metadata.jsonl"
    if own is None:
        return read_plain(root, prompts, key)
    if prompts is not None:
        raise ValueError(
            f"{root} has its prompts in {own}, but a file of prompts is given, too: leave it out."
        )
    return read_samples(root) if own == LINES else read_geneval(root)


def read_samples(root: Path) -> list[SampleFile]:
    """Returns the images that `samples.jsonl` and those of single devices name, in the order of prompts and seeds.

    Raises:
        ValueError: If a line is malformed, there is none, or one index has two prompts.
    """
    kept: dict[tuple[int, int], SampleFile] = {}
    prompts: dict[int, str | None] = {}
    for number, (line, where) in enumerate(_lines(root)):
        sample = _sample(line, number, where)
        first = prompts.setdefault(sample.group, sample.prompt)
        if first != sample.prompt:
            raise ValueError(
                f"{root} has two prompts with the index {sample.group}: {first!r} and, in {where}, "
                f"{sample.prompt!r}. Two runs wrote into one folder; keep them apart."
            )
        kept[sample.group, sample.seed] = sample
    if not kept:
        raise ValueError(f"{root / LINES} has no samples: did the run that wrote it end at once?")
    return [kept[key] for key in sorted(kept)]


def read_geneval(root: Path) -> list[SampleFile]:
    """Returns the images in GenEval's layout; a prompt without any counts as a missing image.

    Raises:
        ValueError: If an entry of metadata is missing or malformed.
    """
    samples: list[SampleFile] = []
    for folder in sorted(
        (p for p in root.iterdir() if p.is_dir() and p.name.isdigit()), key=natural
    ):
        path = folder / "metadata.jsonl"
        if not path.is_file():
            raise ValueError(f"{folder} has no metadata.jsonl: expected GenEval's layout.")
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}).") from error
        check_metadata(metadata, str(path))
        files = [p for p in (folder / "samples").glob("*.png") if p.stem.isdigit()]
        for file in sorted(files, key=natural) or [folder / "samples" / "0000.png"]:
            samples.append(
                SampleFile(
                    file=file.relative_to(root).as_posix(),
                    number=len(samples),
                    group=int(folder.name),
                    seed=int(file.stem),
                    prompt=metadata["prompt"],
                    metadata=metadata,
                )
            )
    return samples


def read_plain(root: Path, prompts: str | Path | None, key: str = "prompt") -> list[SampleFile]:
    """Returns all images below a folder, with their prompts if a file of them is given.

    Raises:
        ValueError: If there are no images, or not as many prompts.
    """
    files = sorted(list_images(root), key=natural)
    if not files:
        raise ValueError(
            f"{root} has no images, no {LINES} and no NNNNN/metadata.jsonl: give a folder that `stitchvm predict` "
            "wrote, one in GenEval's layout, or any folder of images."
        )
    if prompts is None:
        return [SampleFile(file, i, group=i, seed=0) for i, file in enumerate(files)]
    entries = read_entries(prompts, key, unique=False)
    if len(entries) != len(files):
        raise ValueError(
            f"{root} has {len(files)} images but {prompts} has {len(entries)} prompts: expected one for each image, "
            f"in the order of their names (the first is {files[0]}, the last {files[-1]})."
        )
    return [
        SampleFile(file, i, group=i, seed=0, prompt=entry.prompt, metadata=entry.metadata)
        for i, (file, entry) in enumerate(zip(files, entries, strict=True))
    ]


def natural(name: str | Path) -> list[tuple[int, int, str]]:
    """Returns a key that sorts names with their numbers as numbers."""
    parts = re.findall(r"\d+|\D+", str(name))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _files(root: Path) -> list[Path]:
    """Returns the files of lines, the whole run's first."""
    return [*root.glob(LINES), *sorted(root.glob("samples.rank*.jsonl"), key=natural)]


def _lines(root: Path) -> Iterator[tuple[Any, str]]:
    """Yields what JSON holds in each line, and where that is."""
    for path in _files(root):
        texts = path.read_text(encoding="utf-8").split("\n")
        for number, text in enumerate(texts, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                if number < len(texts):
                    raise ValueError(
                        f"line {number} of {path} is not valid JSON ({error})."
                    ) from error
                warnings.warn(
                    f"The last line of {path} was cut short and is left out: the run that wrote it was ended.",
                    stacklevel=2,
                )
                continue
            yield line, f"line {number} of {path}"


def _sample(line: Any, number: int, where: str) -> SampleFile:
    kinds = {"index": int, "prompt": str, "seed": int, "file": str}
    for name, kind in kinds.items():
        value = line.get(name) if isinstance(line, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            words = "a whole number" if kind is int else "a text"
            raise ValueError(
                f"{where}: expected {name!r} with {words}, got {value!r}. A line is an object with "
                f"{', '.join(kinds)}."
            )
    metadata = line.get("metadata")
    if metadata is not None:
        check_metadata(metadata, f"'metadata' in {where}")
    return SampleFile(
        line["file"], number, line["index"], line["seed"], line["prompt"], metadata, line
    )
