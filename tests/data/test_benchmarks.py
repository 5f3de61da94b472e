"""Retrieval, preference and aesthetic benchmarks, in their published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stitchvm.data.aesthetic import Aesthetic
from stitchvm.data.benchmark import BenchmarkModule
from stitchvm.data.loader import Loader
from stitchvm.data.preference import Preference
from stitchvm.data.retrieval import Retrieval
from tests.data.files import write_ava, write_coco, write_flickr30k, write_hpdv2, write_imagereward

SMALL = {"resolution": 4, "batch_size": 2, "num_workers": 0}


def columns(data: BenchmarkModule, *keys: str) -> list[list[Any]]:
    """Returns all values of some batch keys of a module with one benchmark."""
    data.setup("test")
    loader = data.test_dataloader()
    assert isinstance(loader, Loader)
    batches = list(loader)
    joined = []
    for key in keys:
        values = [batch[key] for batch in batches]
        joined.append(
            [v for value in values for v in (value if isinstance(value, list) else value.tolist())]
        )
    return joined


@pytest.mark.parametrize("karpathy", [False, True])
def test_coco(tmp_path: Path, karpathy: bool) -> None:
    write_coco(tmp_path, karpathy)
    data = Retrieval(coco=str(tmp_path), **SMALL)
    index, captions = columns(data, "index", "captions")
    assert data.task == "retrieval" and data.benchmarks == ["coco"]
    assert index == [0, 1, 2]
    assert captions == [
        [f"image {i} caption {k}" for k in range(n)] for i, n in enumerate((5, 6, 5))
    ]
    (five,) = columns(Retrieval(coco=str(tmp_path), captions_per_image=5, **SMALL), "captions")
    assert [len(texts) for texts in five] == [5, 5, 5]


@pytest.mark.parametrize("karpathy", [False, True])
def test_flickr30k(tmp_path: Path, karpathy: bool) -> None:
    write_flickr30k(tmp_path, karpathy)
    index, captions = columns(Retrieval(flickr30k=str(tmp_path), **SMALL), "index", "captions")
    assert index == [0, 1] and [len(texts) for texts in captions] == [5, 5]
    assert captions[1][4] == "A man, 1, with a hat 4 ."  # commas of the caption stay
    if not karpathy:
        path = tmp_path / "flickr30k_test_karpathy.txt"
        path.write_text(path.read_text().replace("hat 4 .", "hat\u2028 4 ."))
        (captions,) = columns(Retrieval(flickr30k=str(tmp_path), **SMALL), "captions")
        assert captions[1][4] == "A man, 1, with a hat\u2028 4 ."


def test_several_benchmarks_have_several_loaders(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    write_flickr30k(tmp_path / "flickr")
    data = Retrieval(coco=str(tmp_path / "coco"), flickr30k=str(tmp_path / "flickr"), **SMALL)
    data.setup("test")
    loaders = data.test_dataloader()
    assert isinstance(loaders, list) and [len(loader.dataset) for loader in loaders] == [3, 2]
    assert data.benchmarks == ["coco", "flickr30k"]


def test_hpdv2(tmp_path: Path) -> None:
    write_hpdv2(tmp_path)
    data = Preference(hpdv2=str(tmp_path), **SMALL)
    index, prompt, group, rank = columns(data, "index", "prompt", "group", "rank")
    assert data.task == "preference" and index == list(range(7))
    assert prompt == ["a cat"] * 3 + ["a dog"] * 4
    assert group == [0] * 3 + [1] * 4
    assert rank == [1, 0, 2, 3, 2, 1.5, 0]


def test_imagereward(tmp_path: Path) -> None:
    write_imagereward(tmp_path)
    group, rank, pixels = columns(
        Preference(imagereward=str(tmp_path), **SMALL), "group", "rank", "pixels"
    )
    assert group == [0, 0, 0, 0, 1, 1] and rank == [2, 1, 3, 3, 1, 2]
    assert [round(image[0][0][0] * 255) for image in pixels] == list(
        range(6)
    )  # names found their images


def test_aesthetic(tmp_path: Path) -> None:
    write_ava(tmp_path, ids=range(100, 110), test_ids=[107, 102, 105])
    data = Aesthetic(str(tmp_path), **SMALL)
    score, pixels = columns(data, "score", "pixels")
    assert data.task == "aesthetic" and score == [5.5, 6.0, 6.5]
    assert [round(image[0][0][0] * 255) for image in pixels] == [7, 2, 5]


def test_missing_folders_say_what_is_expected_and_whence(tmp_path: Path) -> None:
    root = str(tmp_path)
    cases: list[tuple[BenchmarkModule, str]] = [
        (Retrieval(coco=root), r"coco_test_karpathy\.json or .*retrieval_annotations"),
        (
            Retrieval(flickr30k=str(tmp_path / "absent")),
            r"flickr30k_test_karpathy\.txt.*University of Illinois",
        ),
        (Preference(hpdv2=root), r"expected .*test\.json.*ymhao/HPDv2"),
        (Preference(imagereward=root), r"ImageReward_test\.json.*THUDM/ImageReward"),
        (Aesthetic(root), r"AVA_test\.csv.*shiemn/CLIP-knows-IA"),
        (Retrieval(), "Retrieval was given no data set"),
        (Retrieval(coco=root, captions_per_image=0), "captions_per_image must be at least 1"),
        (Retrieval(coco=root, resolution=-3), "resolution must be at least 1, got -3"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            data.setup("test")


def test_images_that_were_not_unpacked(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for path in (tmp_path / "val2014").iterdir():
        path.unlink()
    with pytest.raises(
        ValueError,
        match=r"No images below .*val2014: expected COCO's val2014 images there, from coco",
    ):
        Retrieval(coco=str(tmp_path)).setup("test")


def test_malformed_annotations(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_flickr30k(tmp_path / "flickr")
    write_hpdv2(tmp_path / "hpdv2")
    content = json.loads((tmp_path / "coco_test_karpathy.json").read_text())

    def refused(data: BenchmarkModule, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            data.setup("test")

    fewer = {**content, "annotations": [a for a in content["annotations"] if a["image_id"] != 1]}
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps(fewer))
    refused(
        Retrieval(coco=str(tmp_path)),
        "1 images without a caption, such as COCO_val2014_000000000073",
    )
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps({"images": content["images"]}))
    refused(Retrieval(coco=str(tmp_path)), "no key 'annotations', only .*images")
    (tmp_path / "flickr" / "flickr30k_test_karpathy.txt").write_text("image,caption\nnonsense\n")
    refused(
        Retrieval(flickr30k=str(tmp_path / "flickr")),
        "Line 2 of .* not of the form name.jpg,caption",
    )
    (tmp_path / "hpdv2" / "test.json").write_text(
        json.dumps([{"prompt": "a", "image_path": ["1"], "rank": [1, 2]}])
    )
    refused(Preference(hpdv2=str(tmp_path / "hpdv2")), "image names and ranks of lengths 1 and 2")
    (tmp_path / "hpdv2" / "test.json").write_text(
        json.dumps([{"prompt": "a", "image_path": ["x.jpg"], "rank": [1]}])
    )
    refused(
        Preference(hpdv2=str(tmp_path / "hpdv2")),
        r"no images \(1 are listed but missing, such as .*x\.jpg",
    )
