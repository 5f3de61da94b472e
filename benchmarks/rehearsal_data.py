"""Small data sets in the published layouts, below ROOT/data as the configurations name them.

The layouts are made by the tests' own makers; every image is then a photograph-sized patch of smoothed noise, so
that features of different images differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' makers of layouts
from tests.data.files import (
    write_ava,
    write_coco,
    write_flickr30k,
    write_hpdv2,
    write_imagereward,
)

__all__ = ["write_data"]

SUFFIXES = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
DRAWBENCH = (
    "A red colored car.", "A black colored dog.", "Three cats and one dog sitting on the grass.",
    "A cube made of brick.", "A banana on the left of an apple.", "A photo of a confused bear.",
)  # fmt: skip
GENEVAL = (
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}],
     "prompt": "a photo of a bench"},
    {"tag": "two_object", "include": [{"class": "cow", "count": 1}, {"class": "bed", "count": 1}],
     "prompt": "a photo of a cow and a bed"},
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}],
     "prompt": "a photo of a red car"},
)  # fmt: skip


def write_data(root: Path, side: tuple[int, int] = (96, 72)) -> Path:
    """Writes AVA, HPDv2, MSCOCO, Flickr30K, ImageReward's test set, DrawBench and GenEval; returns ROOT/data.

    Arguments:
        root: The rehearsal's folder.
        side: Width and height of the images.
    """
    data = root / "data"
    ids = list(range(953_000, 953_024))
    write_ava(data / "AVA", ids, ids[:6])
    write_hpdv2(data / "HPDv2")
    write_imagereward(data / "ImageReward")
    write_coco(data / "coco")
    write_flickr30k(data / "flickr30k")
    # DrawBench goes round with every prompt five times
    (data / "drawbench.txt").write_text("".join(f"{p}\n" for p in DRAWBENCH for _ in range(5)))
    (data / "geneval").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in GENEVAL)
    (data / "geneval" / "evaluation_metadata.jsonl").write_text(lines)
    random = np.random.default_rng(0)
    for path in sorted(data.rglob("*")):
        if path.suffix in SUFFIXES:
            patch = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            image = Image.fromarray(patch).resize(side, Image.Resampling.BICUBIC)
            image.save(path, format=SUFFIXES[path.suffix])
    return data
