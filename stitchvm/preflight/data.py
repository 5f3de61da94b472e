"""Data sets and files of prompts: are their lists and images where the configuration looks for them?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stitchvm.preflight.findings import Finding

__all__ = ["CHECKS", "LAYOUTS"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TELLS = "the layout is described at the top of stitchvm/data/"

# data set → lists (of each, one alternative), folders of images (alternatives), file that describes it
LAYOUTS: dict[str, tuple[tuple[tuple[str, ...], ...], tuple[str, ...], str]] = {
    "ava": ((("AVA.txt",), ("AVA_test.csv",)), ("images", ""), "ava.py"),
    "ava_test": ((("AVA_test.csv",),), ("images", ""), "ava.py"),
    "hpdv2_train": ((("train.json",),), ("train", "HPD/train"), "hpdv2.py"),
    "hpdv2_test": ((("test.json",),), ("test", "HPD/test"), "hpdv2.py"),
    "imagereward": (
        (("test.json", "ImageReward_test.json", "data/test.json"),),
        ("test_images", "data/test_images", ""),
        "preference.py",
    ),
    "coco": (
        (
            (
                "coco_test_karpathy.json",
                "annotations/coco_test_karpathy.json",
                "dataset_coco.json",
            ),
        ),
        ("val2014", "images/val2014", ""),
        "retrieval.py",
    ),
    "flickr30k": (
        (("flickr30k_test_karpathy.txt", "dataset_flickr30k.json"),),
        ("flickr30k-images", "flickr30k_images", "Images", "images", ""),
        "retrieval.py",
    ),
}


def check_layout(part: str, root: str, layout: str, without: Sequence[str] = ()) -> Finding:
    """Returns what is found of a data set in one of `LAYOUTS`.

    Arguments:
        part: Where the configuration names it.
        root: Its folder.
        layout: Its layout.
        without: Lists that are not needed.
    """
    folder = Path(root)
    lists, folders, file = LAYOUTS[layout]
    remedy = f"{TELLS}{file}"
    if not folder.is_dir():
        return Finding(part, root, "missing", "no such folder", remedy)
    for names in lists:
        if names[0] not in without and not any((folder / name).is_file() for name in names):
            return Finding(part, root, "missing", f"there is no {' or '.join(names)}", remedy)
    images = next((folder / name for name in folders if (folder / name).is_dir()), None)
    if images is None or not _has_image(images):
        where = " or ".join(name or "beside the list" for name in folders)
        return Finding(part, root, "missing", f"no images in {where}", remedy)
    return Finding(part, f"{root} ({layout})", "ok")


def check_images(part: str, root: str, exclude_test: bool = True) -> Finding:
    """Returns what is found of a folder of images, read by its own layout as `ConcatImages` does."""
    folder = Path(root)
    if (folder / "AVA.txt").is_file() or folder.name.lower() == "ava":
        return check_layout(part, root, "ava", () if exclude_test else ("AVA_test.csv",))
    if (folder / "train.json").is_file() or folder.name.lower() == "hpdv2":
        return check_layout(part, root, "hpdv2_train")
    return check_folder(part, root)


def check_folder(part: str, root: str) -> Finding:
    """Returns what is found of a folder of images, whatever else is in it."""
    folder = Path(root)
    if not folder.is_dir():
        return Finding(part, root, "missing", "no such folder", "give the folder of your images")
    if not _has_image(folder):
        return Finding(
            part, root, "missing", "no images below it", "give the folder of your images"
        )
    return Finding(part, root, "ok")


def check_prompts(part: str, path: str, key: str = "prompt") -> Finding:
    """Returns what is found of a file of prompts; it is read."""
    from stitchvm.data.prompt_files import read_entries

    if not Path(path).is_file():
        remedy = "a .txt with one prompt a line, .jsonl or .json"
        return Finding(part, path, "missing", "no such file", remedy)
    try:
        found = read_entries(path, key, unique=False)
    except ValueError as error:
        return Finding(part, path, "wrong", str(error), "mend the file")
    count, different = f"{len(found)} prompts", len({entry.prompt for entry in found})
    if different < len(found):  # by default a run takes each once
        count += f", {different} different"
    return Finding(part, f"{path} ({count})", "ok")


def _has_image(folder: Path) -> bool:
    """Whether there is an image below a folder, as `list_images` looks for them; the first one ends the search."""
    for _, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(f.lower().endswith(SUFFIXES) and not f.startswith(".") for f in files):
            return True
    return False


def _concat(part: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    for root in arguments.get("roots") or []:
        yield check_images(f"{part}.roots", root, arguments.get("exclude_test", True))


def _folder(part: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    yield check_folder(f"{part}.root", arguments["root"])


def _ava(part: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    without = () if arguments.get("exclude_test", True) else ("AVA_test.csv",)
    yield check_layout(f"{part}.root", arguments["root"], "ava", without)


def _hpdv2(part: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    yield check_layout(f"{part}.root", arguments["root"], "hpdv2_train")


def _benchmark(part: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    names = {
        "ava": "ava_test",
        "hpdv2": "hpdv2_test",
        "imagereward": "imagereward",
        "coco": "coco",
        "flickr30k": "flickr30k",
    }
    for key, layout in names.items():
        if arguments.get(key) is not None:
            yield check_layout(f"{part}.{key}", arguments[key], layout)


def _prompts(part: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    for key in ("path", "val_path"):
        if arguments.get(key) is not None:
            yield check_prompts(f"{part}.{key}", arguments[key], arguments.get("key", "prompt"))


def _samples(part: str, arguments: dict[str, Any]) -> Iterator[Finding]:
    from stitchvm.data.sample_files import read_folder

    root = str(arguments["root"])
    if not Path(root).is_dir():
        remedy = f"`stitchvm predict --config configs/{Path(root).name}.yaml` makes samples"
        yield Finding(f"{part}.root", root, "missing", "no such folder", remedy)
        return
    try:
        found = read_folder(root, arguments.get("prompts"), arguments.get("key", "prompt"))
    except ValueError as error:
        yield Finding(f"{part}.root", root, "wrong", str(error), "see the message")
        return
    yield Finding(f"{part}.root", f"{root} ({len(found)} samples)", "ok")


CHECKS: dict[str, Callable[[str, dict[str, Any]], Iterator[Finding]]] = {
    "AVA": _ava,
    "Aesthetic": _benchmark,
    "ConcatImages": _concat,
    "HPDv2": _hpdv2,
    "ImageFolder": _folder,
    "Preference": _benchmark,
    "Prompts": _prompts,
    "Retrieval": _benchmark,
    "SampleFolder": _samples,
}
