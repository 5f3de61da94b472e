"""Writes small data sets in the published layouts."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(
    folder: Path, names: Sequence[str], size: tuple[int, int] = (12, 10)
) -> list[Path]:
    """Writes one flat image for each name; image number i has grey level i (PNG inside whatever the suffix)."""
    paths = [folder / name for name in names]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.full((size[1], size[0], 3), i % 256, dtype=np.uint8)
        Image.fromarray(values).save(path, format="PNG")
    return paths


def write_folder(folder: Path, count: int = 20) -> list[Path]:
    """Writes a folder of images, some in folders below it, and a file that is no image."""
    paths = write_images(folder, [f"{'ab'[i % 2]}/{i:04d}.png" for i in range(count)])
    (folder / "notes.txt").write_text("not an image")
    return paths


def write_ava(root: Path, ids: Sequence[int], test_ids: Sequence[int]) -> None:
    """Writes AVA.txt, AVA_test.csv and images/; image number i has i + 1 votes of 3 and one of 8."""
    write_images(root / "images", [f"{image}.jpg" for image in ids])
    lines = []
    for i, image in enumerate(ids):
        counts = [0, 0, i + 1, 0, 0, 0, 0, 1, 0, 0]
        lines.append(" ".join(map(str, [i + 1, image, *counts, 1, 0, 1396])))
    (root / "AVA.txt").write_text("\n".join(lines) + "\n")
    with (root / "AVA_test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(range(11))
        for i, image in enumerate(test_ids):
            shares = [0.0] * 10
            shares[i % 10], shares[9] = 0.5, shares[9] + 0.5
            writer.writerow([float(image), *shares])


def write_hpdv2(root: Path, key: str = "file_path", prefix: str = "") -> None:
    """Writes train.json, test.json, train/ and test/: 8 training images in 6 pairs, 2 prompts of 3 and 4 images."""
    train = [f"{i:08d}.jpg" for i in range(8)]
    write_images(root / prefix / "train", train)
    pairs = [(0, 1), (1, 2), (3, 4), (4, 5), (5, 6), (6, 7)]
    entries = [
        {"prompt": f"prompt {i // 2}", key: [train[a], train[b]], "human_preference": [1, 0]}
        for i, (a, b) in enumerate(pairs)
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "train.json").write_text(json.dumps(entries))
    test = [f"{i:05d}.jpg" for i in range(7)]
    write_images(root / prefix / "test", test)
    raw = [{"rank": [0, 1, 2], "user_hash": "x"}]
    tests = [
        {"prompt": "a cat", "image_path": test[:3], "rank": [1, 0, 2], "raw_annotations": raw},
        {
            "prompt": "a dog",
            "image_path": test[3:],
            "rank": [3, 2, 1.5, 0],
            "raw_annotations": raw,
        },
    ]
    (root / "test.json").write_text(json.dumps(tests))


def write_imagereward(root: Path) -> None:
    """Writes test.json and test_images/: 2 prompts of 4 and 2 images, webp names in folders, a tied ranking."""
    names = [f"part-00000{i % 2}/images/ab{i}/uuid-{i}.webp" for i in range(6)]
    write_images(root / "test_images", names)
    entries = [
        {
            "id": "000001-0001",
            "prompt": "a fox",
            "generations": names[:4],
            "ranking": [2, 1, 3, 3],
        },
        {"id": "000001-0002", "prompt": "a hen", "generations": names[4:], "ranking": [1, 2]},
    ]
    (root / "test.json").write_text(json.dumps(entries))


def write_coco(root: Path, karpathy: bool = False) -> None:
    """Writes val2014/ with 4 images of which 3 are in the test split, with 5, 6 and 5 captions."""
    names = [f"COCO_val2014_{i:012d}.jpg" for i in (42, 73, 74, 99)]
    write_images(root / "val2014", names)
    counts = (5, 6, 5)
    texts = [[f"image {i} caption {k}" for k in range(count)] for i, count in enumerate(counts)]
    if karpathy:
        images = [
            {
                "filepath": "val2014",
                "filename": name,
                "split": split,
                "sentences": [{"raw": text, "tokens": text.split()} for text in lines],
                "cocoid": i,
            }
            for i, (name, split, lines) in enumerate(
                zip(names, ["test", "test", "test", "restval"], [*texts, ["x"]], strict=True)
            )
        ]
        (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    else:
        annotations = [
            {"image_id": i, "id": 10 * i + k, "caption": text}
            for k in range(6)
            for i, lines in enumerate(texts)
            for text in lines[k : k + 1]
        ]
        images = [{"id": i, "file_name": name} for i, name in enumerate(names[:3])]
        content = {"images": images, "annotations": annotations}
        (root / "coco_test_karpathy.json").write_text(json.dumps(content))


def write_flickr30k(root: Path, karpathy: bool = False) -> None:
    """Writes flickr30k-images/ with 3 images of which 2 are in the test split, 5 captions each."""
    names = ["1007129816.jpg", "1009434119.jpg", "36979.jpg"]
    write_images(root / "flickr30k-images", names)
    texts = [[f"A man, {i}, with a hat {k} ." for k in range(5)] for i in range(2)]
    if karpathy:
        images = [
            {"filename": name, "split": split, "sentences": [{"raw": text} for text in lines]}
            for name, split, lines in zip(
                names, ["test", "test", "train"], [*texts, ["x"]], strict=True
            )
        ]
        content = {"images": images, "dataset": "flickr30k"}
        (root / "dataset_flickr30k.json").write_text(json.dumps(content))
    else:
        lines = [f"{names[i]},{text}" for i in range(2) for text in texts[i]]
        (root / "flickr30k_test_karpathy.txt").write_text(
            "\n".join(["image,caption", *lines]) + "\n"
        )
