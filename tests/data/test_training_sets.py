"""Folders of images, AVA, HPDv2 and several together, in their published layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stitchvm.data.ava import AVA, read_ava_csv, read_ava_txt
from stitchvm.data.hpdv2 import HPDv2
from stitchvm.data.images import ConcatImages, ImageFolder
from stitchvm.data.module import DataModule
from tests.data.files import write_ava, write_folder, write_hpdv2, write_images

SMALL = {"resolution": 4, "batch_size": 2, "num_workers": 0}


def names(data: DataModule, split: str = "train") -> list[str]:
    """Returns the file names of a split."""
    data.setup("fit")
    dataset = data.train_data if split == "train" else data.val_data
    return [Path(bytes(file).decode()).name for file in dataset.files]  # type: ignore[attr-defined]


def test_folder_is_split_by_the_hash_of_names(tmp_path: Path) -> None:
    write_folder(tmp_path, 20)
    data = ImageFolder(str(tmp_path), val_size=5, **SMALL)
    train, val = names(data), names(data, "val")
    assert len(train) == 15 and len(val) == 5
    assert sorted(train + val) == [f"{i:04d}.png" for i in range(20)]
    write_images(tmp_path, ["0100.png", "0101.png"])
    assert len(set(val) - set(names(ImageFolder(str(tmp_path), val_size=5, **SMALL), "val"))) <= 2
    assert len(data.train_dataloader()) == 7
    assert [len(batch["index"]) for batch in data.val_dataloader()] == [2, 2, 1]


def test_probe_images_are_the_same_every_time(tmp_path: Path) -> None:
    write_folder(tmp_path, 20)
    probes = []
    for _ in range(2):
        data = ImageFolder(str(tmp_path), val_size=5, **SMALL)
        data.setup("fit")
        batches = list(data.probe_dataloader(5))
        assert [len(batch["pixels"]) for batch in batches] == [2, 2, 1]
        probes.append([i for batch in batches for i in batch["index"].tolist()])
    assert probes[0] == probes[1] and len(set(probes[0])) == 5
    held_out = [i for batch in data.val_dataloader() for i in batch["index"].tolist()]
    assert set(probes[0]) <= set(held_out)
    with pytest.raises(
        ValueError, match="needs 6 held-out probe images, but the validation set has 5"
    ):
        data.probe_dataloader(6)


def test_ava_leaves_out_its_test_split(tmp_path: Path) -> None:
    write_ava(tmp_path, ids=range(100, 120), test_ids=[103, 110])
    data = AVA(str(tmp_path), val_size=3, **SMALL)
    found = names(data) + names(data, "val")
    assert sorted(found) == [f"{i}.jpg" for i in range(100, 120) if i not in (103, 110)]
    everything = AVA(str(tmp_path), exclude_test=False, val_size=3, **SMALL)
    assert len(names(everything)) == 17
    (tmp_path / "AVA_test.csv").unlink()
    with pytest.raises(ValueError, match=r"AVA_test\.csv.*shiemn/CLIP-knows-IA.*exclude_test"):
        AVA(str(tmp_path), val_size=3, **SMALL).setup("fit")


def test_ava_mean_ratings(tmp_path: Path) -> None:
    write_ava(tmp_path, ids=[7, 9], test_ids=[9, 7])
    assert read_ava_txt(tmp_path / "AVA.txt") == {7: (3 + 8) / 2, 9: (2 * 3 + 8) / 3}
    assert read_ava_csv(tmp_path / "AVA_test.csv") == {9: 5.5, 7: 6.0}


def test_ava_images_beside_the_list_and_missing_ones(tmp_path: Path) -> None:
    write_ava(tmp_path, ids=range(200), test_ids=[5])
    for path in (tmp_path / "images").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "images").rmdir()
    (tmp_path / "17.jpg").unlink()
    data = AVA(str(tmp_path), val_size=3, **SMALL)
    assert "17.jpg" not in names(data) and list(data.bad.names) == [str(tmp_path / "17.jpg")]
    for i in (18, 19, 20):
        (tmp_path / f"{i}.jpg").unlink()
    with pytest.raises(ValueError, match=r"4 of 19\d images are missing"):
        AVA(str(tmp_path), val_size=3, **SMALL).setup("fit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("AVA.txt", "1 2 3\n", "Line 1 of .* has 3 columns; AVA.txt has 15"),
        ("AVA.txt", "", "is empty"),
        ("AVA.txt", "1 x 0 0 1 0 0 0 0 1 0 0 1 0 9\n", "expected an image id, got 'x'"),
        ("AVA.txt", "1 4 0 0 0 0 0 0 0 0 0 0 1 0 9\n", "has no ratings"),
        (
            "AVA_test.csv",
            "id,score\n1,2\n",
            "must begin with the header 0,1,...,10, got 'id,score'",
        ),
        ("AVA_test.csv", ",".join(map(str, range(11))) + "\n", "has a header but no images"),
    ],
)
def test_malformed_ava_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_ava(tmp_path, ids=range(20), test_ids=[5])
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        AVA(str(tmp_path), val_size=3, **SMALL).setup("fit")


@pytest.mark.parametrize("key", ["file_path", "image_path"])
@pytest.mark.parametrize("prefix", ["", "HPD"])
def test_hpdv2_training_images_once_each(tmp_path: Path, key: str, prefix: str) -> None:
    write_hpdv2(tmp_path, key, prefix)
    data = HPDv2(str(tmp_path), val_size=2, **SMALL)
    assert sorted(names(data) + names(data, "val")) == [f"{i:08d}.jpg" for i in range(8)]
    batch = next(iter(data.train_dataloader()))
    assert batch["pixels"].shape == (2, 3, 4, 4) and set(batch) == {"index", "pixels", "epoch"}


def test_hpdv2_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected .*train\.json.*ymhao/HPDv2"):
        HPDv2(str(tmp_path), **SMALL).setup("fit")
    write_hpdv2(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "a", "images": ["x", "y"]}]))
    with pytest.raises(
        ValueError, match=r"Entry 0 of .* no key 'file_path' or 'image_path', only .*'images'"
    ):
        HPDv2(str(tmp_path), **SMALL).setup("fit")
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ValueError, match="non-empty list"):
        HPDv2(str(tmp_path), **SMALL).setup("fit")
    (tmp_path / "train.json").write_text('[{"prompt": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        HPDv2(str(tmp_path), **SMALL).setup("fit")


def test_several_folders_each_in_its_layout(tmp_path: Path) -> None:
    write_ava(tmp_path / "ava", ids=range(100, 110), test_ids=[103])
    write_hpdv2(tmp_path / "hpdv2")
    write_folder(tmp_path / "mine", 4)
    roots = [str(tmp_path / name) for name in ("ava", "hpdv2", "mine")]
    data = ConcatImages(roots, val_size=3, **SMALL)
    assert len(names(data)) + len(names(data, "val")) == 9 + 8 + 4
    with pytest.raises(ValueError, match="empty list of roots"):
        ConcatImages([], **SMALL).setup("fit")


def test_probe_images_are_of_all_folders(tmp_path: Path) -> None:
    """Stage 1 fits the first of them and measures on the next: both must be of one kind."""
    for kind in "ab":
        write_images(tmp_path / kind, [f"{kind}{i:03d}.png" for i in range(150)], size=(2, 2))
    data = ConcatImages([str(tmp_path / "a"), str(tmp_path / "b")], val_size=60, **SMALL)
    first = [name[0] for name in names(data, "val")]
    assert len(first) == 60
    for part in (first[:30], first[30:]):
        assert 8 <= part.count("a") <= 22


def test_bad_arguments_are_refused_at_setup(tmp_path: Path) -> None:
    write_folder(tmp_path / "full", 10)
    (tmp_path / "empty").mkdir()
    full, empty = str(tmp_path / "full"), str(tmp_path / "empty")
    cases = [
        (ImageFolder(full, resolution=0), "resolution must be at least 1, got 0"),
        (ImageFolder(full, batch_size=0), "batch_size must be at least 1"),
        (ImageFolder(full, num_workers=-1), "num_workers must be at least 0"),
        (ImageFolder(full, val_size=2, max_bad_fraction=2), "max_bad_fraction is a fraction"),
        (ImageFolder(full, val_size=10), "val_size=10 of 10 images"),
        (ImageFolder(empty), "No images below"),
        (ImageFolder(str(tmp_path / "absent")), "folder of images not found: expected .*absent"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            data.setup("fit")
