"""A folder of samples written again in GenEval's layout, for the official evaluator.

    NNNNN/metadata.jsonl, NNNNN/samples/0000.png, 0001.png, …        NNNNN the number of the prompt

The evaluator needs mmdet 2 and an old torch, in an environment of its own; its results come back through
`stitchvm.metrics.geneval_official`. As a command:

    python -m stitchvm.data.geneval_layout runs/plain_sd35m geneval-images
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from stitchvm.data.sample_files import SampleFile, read_folder

__all__ = ["main", "write_geneval"]


def write_geneval(root: str | Path, target: str | Path) -> int:
    """Writes the images of a folder of samples in GenEval's layout; returns how many.

    Arguments:
        root: The folder of samples; every prompt must have its GenEval metadata.
        target: The folder to write, which must not exist.

    Raises:
        FileExistsError: If there is something at `target`.
        ValueError: If a prompt has no metadata, an image is missing, or `root` is no folder of samples.
    """
    root, target = Path(root), Path(target)
    samples = read_folder(root)
    if target.exists():
        raise FileExistsError(f"{target} is there already: choose another folder.")
    without = [sample for sample in samples if sample.metadata is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(samples)} samples of {root} have no GenEval metadata, such as "
            f"{without[0].file}: sample the prompts of GenEval's evaluation_metadata.jsonl."
        )
    missing = [sample.file for sample in samples if not (root / sample.file).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} images are missing in {root}, such as {missing[0]}.")
    groups: dict[int, list[SampleFile]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    for group, members in groups.items():
        folder = target / f"{group:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(members[0].metadata))
        for number, sample in enumerate(sorted(members, key=lambda member: member.seed)):
            source, file = root / sample.file, folder / "samples" / f"{number:04d}.png"
            if source.suffix.lower() == ".png":
                shutil.copyfile(source, file)
            else:
                with Image.open(source) as image:
                    image.save(file)
    return len(samples)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes GenEval's layout from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stitchvm.data.geneval_layout",
        description="Writes a folder of samples in the layout of the official GenEval evaluator.",
    )
    parser.add_argument("samples", help="the folder with samples.jsonl")
    parser.add_argument("target", help="the folder to write")
    given = parser.parse_args(argv)
    print(f"wrote {write_geneval(given.samples, given.target)} images to {given.target}")


if __name__ == "__main__":
    main()
