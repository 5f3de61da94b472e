"""Images of every kind become RGB squares in [0, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stitchvm.data.reading import UnreadableImage, list_images, read_image, read_uint8, require


def level(path: Path) -> list[int]:
    """Returns the RGB values of the middle pixel."""
    return read_uint8(path, 4)[:, 2, 2].tolist()


def test_float_tensor_in_unit_range(tmp_path: Path) -> None:
    Image.new("RGB", (9, 6), (255, 128, 0)).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", 5)
    assert pixels.shape == (3, 5, 5) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, 128 / 255, 0.0]))


def test_colour_modes(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert level(tmp_path / "grey.png") == [77, 77, 77]
    Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.uint16)).save(tmp_path / "grey16.png")
    assert level(tmp_path / "grey16.png") == [77, 77, 77]
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    assert level(tmp_path / "bit.png") == [255, 255, 255]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert level(tmp_path / "cmyk.tif") == [255, 0, 0]
    Image.new("RGBA", (8, 8), (10, 200, 30, 255)).save(tmp_path / "opaque.png")
    assert level(tmp_path / "opaque.png") == [10, 200, 30]
    Image.new("RGBA", (8, 8), (10, 200, 30, 0)).save(
        tmp_path / "clear.png"
    )  # hidden colour is not shown
    assert level(tmp_path / "clear.png") == [255, 255, 255]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "palette.png")
    assert level(tmp_path / "palette.png") == [9, 8, 7]
    palette.save(tmp_path / "hole.png", transparency=1)
    assert level(tmp_path / "hole.png") == [255, 255, 255]


def test_float_image_above_one_is_read_as_eight_bit(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 51.0, dtype=np.float32)).save(tmp_path / "f.tif")
    assert level(tmp_path / "f.tif") == [51, 51, 51]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 3), dtype=np.uint8)
    values[:4] = 255  # white above, stored lying on its side: orientation 6 turns it clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    pixels = read_uint8(tmp_path / "a.png", 8)[0]
    assert pixels[:, 0].tolist() == [0] * 8 and pixels[:, 7].tolist() == [255] * 8


def test_shortest_side_is_resized_and_the_centre_kept(tmp_path: Path) -> None:
    values = np.zeros((10, 30, 3), dtype=np.uint8)
    values[:, 10:20] = 200
    Image.fromarray(values).save(tmp_path / "wide.png")
    assert read_uint8(tmp_path / "wide.png", 10).unique().tolist() == [200]
    small = read_uint8(tmp_path / "wide.png", 4)
    assert small.shape == (3, 4, 4) and small[0, 2, 2] > 190
    assert read_uint8(tmp_path / "wide.png", 23).shape == (3, 23, 23)


@pytest.mark.parametrize("cut", [0, 5, 60])
def test_unreadable_files_are_named(tmp_path: Path, cut: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:cut])
    with pytest.raises(UnreadableImage, match=r"cut\.png"):
        read_uint8(tmp_path / "cut.png", 8)
    with pytest.raises(UnreadableImage, match="no such file"):
        read_uint8(tmp_path / "absent.png", 8)


def test_listing_is_sorted_recursive_and_of_images_only(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a/deep/1.webp", "c.txt", ".hidden/3.png", "b/._2.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a/deep/1.webp", "b/2.JPG"]


def test_missing_file_says_what_where_and_whence(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"The list not found: expected .*a\.txt or .*b\.txt.*from the shop"
    ):
        require(tmp_path, ["a.txt", "b.txt"], "The list", "the shop")
