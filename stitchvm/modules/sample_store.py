"""A folder of samples that survives whatever ends the run: an image first, then the line that says it is there.

    images/000012_s3.png   prompt 12, seed 3; written beside its place and moved there
    samples.jsonl          one JSON object a line, appended when its images are on disk
    sampling.json          the configuration that samples depend on: a folder holds samples of one

With several devices each appends to a file of its own, samples.rankR.jsonl; the first merges them at the end, sorted. A
line that a killed process left unfinished is dropped and its sample made again, and so is a line without its image.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image

from stitchvm.results import finite
from stitchvm.writing import written

__all__ = ["Line", "SampleStore", "differences"]

Line = dict[str, Any]
Key = tuple[int, int]  # index of the prompt, seed

IMAGES = "[0-9]*_s*.png"  # prompt, seed and, where all are kept, particle
# Settings that change speed and memory, and samples by no more than rounding.
INDIFFERENT = {
    "micro_batch",
    "batch_size",
    "share_prefix",
    "checkpointing",
    "gradient_checkpointing",
    "prompt_cache",
    "prompts_in_memory",
}


class SampleStore:
    """Reads, checks and appends to a folder of samples.

    Arguments:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.images = root, root / "images"
        self.notices: list[str] = []
        self._file: IO[bytes] | None = None

    @property
    def merged(self) -> Path:
        """The file of all samples."""
        return self.root / "samples.jsonl"

    @property
    def configuration(self) -> Path:
        """The file of what they depend on."""
        return self.root / "sampling.json"

    # Reading: changes nothing, every process may do it.

    def read(self) -> dict[Key, Line]:
        """Returns the finished samples by (index, seed), sorted, and fills `notices`.

        Raises:
            ValueError: If a line that is not the last of its file is broken.
        """
        self.notices = []
        found: dict[Key, Line] = {}
        for path in self._files():
            lines, rest = read_lines(path)
            if rest:
                self.notices.append(f"{path.name}: dropped an unfinished last line")
            found |= {(line["index"], line["seed"]): line for line in lines}
        kept = {key: line for key, line in sorted(found.items()) if self._has_images(line)}
        if lost := len(found) - len(kept):
            self.notices.append(f"{lost} samples have lost their image and are made again")
        return kept

    def check(self, config: Mapping[str, Any], part: str = "config") -> list[str]:
        """Returns how a configuration differs from that of the samples that are here: nothing, if there are none.

        Arguments:
            config: The configuration now, plain data.
            part: "config", or "weights".
        """
        if all(path.stat().st_size == 0 for path in self._files()):
            return []
        if not self.configuration.is_file():
            return [
                f"{self.configuration.name}: missing, so that nothing says what the samples are of"
            ]
        try:
            there = json.loads(self.configuration.read_text())
        except ValueError as error:
            raise ValueError(
                f"{self.configuration} is not JSON ({error}): it is what tells whether the samples beside it are of "
                "this configuration. Move the folder away, or choose another with --trainer.default_root_dir."
            ) from error
        return differences(there.get(part), plain(config)) if part in there else []

    def known(self, part: str) -> dict[str, Any]:
        """Returns what `prepare` was given as a part: nothing, if it was not."""
        return json.loads(self.configuration.read_text()).get(part, {})

    # Writing: by the first process, when no other is reading.

    def erase(self) -> None:
        """Removes all samples and what was made of them."""
        made = [f"images/{IMAGES}", "grid*.png", "trajectory.png", "summary.json", "sampling.json"]
        for path in [*self._files(), *(p for pattern in made for p in self.root.glob(pattern))]:
            path.unlink()

    def prepare(self, **parts: Mapping[str, Any]) -> None:
        """Makes the folder, cuts unfinished lines off, removes unfinished images and writes `sampling.json`."""
        self.images.mkdir(parents=True, exist_ok=True)
        for path in self.images.glob(".*.part"):
            path.unlink()
        for path in self._files():
            _, rest = read_lines(path)
            if rest:
                os.truncate(path, path.stat().st_size - rest)
        there = {}
        if self.configuration.is_file():
            there = json.loads(self.configuration.read_text())
        content = {**there, **{name: plain(part) for name, part in parts.items()}}
        digest = hashlib.sha256(json.dumps(content.get("config"), sort_keys=True).encode())
        content["config_sha256"] = digest.hexdigest()
        replace(self.configuration, (json.dumps(content, indent=1) + "\n").encode())

    def merge(self) -> list[Line]:
        """Makes one sorted file of all devices' and returns its lines."""
        lines, files = self.read(), self._files()
        wanted = "".join(json.dumps(line) + "\n" for line in lines.values()).encode()
        if files != [self.merged] or self.merged.read_bytes() != wanted:
            replace(self.merged, wanted)
        for path in files:
            if path != self.merged:
                path.unlink()
        return list(lines.values())

    # Appending: by every process, to a file of its own.

    def open(self, rank: int, world_size: int) -> None:
        """Opens this process's file."""
        self.close()
        name = "samples.jsonl" if world_size == 1 else f"samples.rank{rank}.jsonl"
        self._file = (self.root / name).open("ab")

    def close(self) -> None:
        """Closes it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def save_image(self, name: str, pixels: Any) -> str:
        """Writes an image and returns its path in the folder; the file appears whole or not at all.

        Arguments:
            name: Its name without suffix.
            pixels: A uint8 array with shape (H, W, 3).
        """
        path = self.images / f"{name}.png"
        with written(path, sync=True) as part:
            Image.fromarray(pixels).save(part, format="PNG", compress_level=3)
        return path.relative_to(self.root).as_posix()

    def append(self, line: Line) -> None:
        """Appends a sample whose images are on disk."""
        assert self._file is not None, "the folder is not open"
        self._file.write((json.dumps(finite(line)) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _files(self) -> list[Path]:
        """Returns the files of lines, the merged one first."""
        ranks = sorted(self.root.glob("samples.rank*.jsonl"))
        return [p for p in (self.merged, *ranks) if p.is_file()]

    def _has_images(self, line: Line) -> bool:
        files = [line["file"], *(each["file"] for each in line.get("particles", ()))]
        return all((self.root / file).is_file() for file in files)


def read_lines(path: Path) -> tuple[list[Line], int]:
    """Returns the lines of a file, and how many bytes at its end are no whole line.

    Raises:
        ValueError: If another line than the last is broken.
    """
    *whole, rest = path.read_bytes().split(b"\n")
    lines: list[Line] = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            if not {"index", "seed", "file", "prompt"} <= line.keys():
                raise ValueError("it has no index, seed, file and prompt")
        except (ValueError, AttributeError) as error:
            if number == len(whole) and not rest:  # a full disk leaves a line like that
                return lines, len(text) + 1
            raise ValueError(
                f"line {number} of {path} is not a sample ({error}): delete that line, and its sample is made again."
            ) from error
        lines.append(line)
    return lines, len(rest)


def plain(config: Any) -> Any:
    """Returns a configuration as JSON would give it back, without what samples do not depend on."""
    if isinstance(config, Mapping):
        return {str(k): plain(v) for k, v in config.items() if k not in INDIFFERENT}
    if isinstance(config, (list, tuple)):
        return [plain(v) for v in config]
    return finite(config)


def differences(there: Any, now: Any, name: str = "") -> list[str]:
    """Returns what differs between two configurations, as "key: there → now"; of another class only the class."""
    both = isinstance(there, Mapping) and isinstance(now, Mapping)
    if both and there.get("class_path") == now.get("class_path"):
        return [
            line
            for key in dict.fromkeys([*there, *now])
            for line in differences(there.get(key), now.get(key), dotted(name, key))
        ]
    return [] if there == now else [f"{name or 'configuration'}: {short(there)} → {short(now)}"]


def dotted(name: str, key: str) -> str:
    """Returns a key as it is spelt on the command line."""
    if key == "init_args":
        return name
    return f"{name}.{key}" if name else key


def short(value: Any) -> str:
    """Returns a value in few words: a component by its class."""
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"])
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def replace(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    with written(path, sync=True) as part:
        part.write_bytes(content)
