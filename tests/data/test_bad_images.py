"""Unreadable images are replaced, named and counted; too many of them end the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from stitchvm.data.datasets import BadImages, ImageDataset
from stitchvm.data.images import ImageFolder
from tests.data.files import write_folder, write_images


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def test_the_next_readable_image_takes_the_place(tmp_path: Path) -> None:
    paths = write_images(tmp_path, [f"{i}.png" for i in range(4)])
    spoil(paths[2])
    spoil(paths[3])
    dataset = ImageDataset([str(p) for p in paths], 4, {"score": [0.5, 1.5, 2.5, 3.5]})
    sample = dataset[2]
    assert sample["index"] == 0 and sample["score"] == 0.5 and int(sample["pixels"][0, 0, 0]) == 0
    assert [name.split(" ")[0] for name in sample["bad"]] == [str(paths[2]), str(paths[3])]
    assert dataset[1]["index"] == 1 and dataset[1]["bad"] == []


def test_only_unreadable_images_is_an_error(tmp_path: Path) -> None:
    paths = write_images(tmp_path, ["0.png", "1.png"])
    for path in paths:
        spoil(path)
    with pytest.raises(ValueError, match=r"2 images in a row could not be read, from .*0\.png"):
        ImageDataset([str(p) for p in paths], 4)[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_reach_the_main_process_and_batches_keep_their_size(
    tmp_path: Path, num_workers: int
) -> None:
    write_folder(tmp_path, 24)
    data = ImageFolder(
        str(tmp_path),
        val_size=4,
        resolution=4,
        batch_size=5,
        num_workers=num_workers,
        max_bad_fraction=0.2,
    )
    data.setup("fit")
    train = [bytes(file).decode() for file in data.train_data.files]  # type: ignore[attr-defined]
    spoiled = [train[3], train[11]]
    for path in spoiled:
        spoil(Path(path))
    with pytest.warns(UserWarning, match="Skipped an unreadable image"):
        batches = list(data.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [5, 5, 5, 5]
    assert "bad" not in batches[0]
    indices = [i for batch in batches for i in batch["index"].tolist()]
    expected = [4 if i == 3 else 12 if i == 11 else i for i in range(20)]
    assert sorted(indices) == sorted(expected)
    assert sorted(name.split(" ")[0] for name in data.bad.names) == sorted(spoiled)
    assert data.bad.read == 22 and data.bad.skipped == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_the_allowed_fraction_ends_the_run(tmp_path: Path, num_workers: int) -> None:
    write_folder(tmp_path, 24)
    data = ImageFolder(
        str(tmp_path), val_size=4, resolution=4, batch_size=5, num_workers=num_workers
    )
    data.setup("fit")
    spoil(Path(bytes(data.train_data.files[3]).decode()))  # type: ignore[attr-defined]
    message = r"1 of 20 images are missing or unreadable.*max_bad_fraction=0\.01.*\.png \(.*raise max_bad_fraction"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
        list(data.train_dataloader())


def test_exactly_the_allowed_fraction_is_borne_and_repeats_count_once() -> None:
    bad = BadImages(300, max_fraction=0.01)
    with pytest.warns(UserWarning):
        bad.add(["a", "b", "c"], 100)
    bad.add(["a", "b", "c"], 100)
    assert bad.skipped == 3
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"4 of 300 images.*after 300 were read"),
    ):
        bad.add(["d"], 100)


def test_a_bad_start_of_a_large_set_is_noticed_early() -> None:
    bad = BadImages(1_000_000)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"30 of 1000000 images .*after 1200 were read"),
    ):
        bad.add([str(i) for i in range(30)], 1200)


def test_missing_images_count_too() -> None:
    with pytest.raises(
        ValueError, match=r"2 of 100 images are missing or unreadable, more .*for example x, y"
    ):
        BadImages(98, ["x", "y"])
    assert BadImages(99, ["x"]).total == 100
