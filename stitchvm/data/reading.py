"""Files to pixels: one way to read an image, one way to list a folder.

An image is decoded, turned upright (EXIF orientation), brought to 8-bit RGB (grey, palette, CMYK and 16-bit images are
converted, transparency is laid over white), resized so that its shortest side is `resolution` (bicubic, antialiased)
and cropped at the centre to a square.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class UnreadableImage(ValueError):
    """An image file is missing, truncated or not an image; the message names it and says why."""


def read_uint8(path: str | Path, resolution: int | None) -> Tensor:
    """Returns an image as a uint8 tensor with shape (3, resolution, resolution).

    Arguments:
        path: The file.
        resolution: The side of the square; None leaves the image its own size (3, H, W).

    Raises:
        UnreadableImage: If the file cannot be opened or decoded.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
            return _tensor(rgb) if resolution is None else _square(rgb, resolution)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, EOFError, ...
        reason = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else f"{type(error).__name__}: {error}"
        )
        raise UnreadableImage(f"{path} ({reason})") from error


def read_image(path: str | Path, resolution: int) -> Tensor:
    """Returns an image as a float32 tensor in [0, 1] with shape (3, resolution, resolution).

    Raises:
        UnreadableImage: If the file cannot be opened or decoded.
    """
    return read_uint8(path, resolution).to(torch.float32).div_(255)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # PIL's own conversion clips at 255: a 16-bit grey image would come out white.
        values = np.asarray(image).astype(np.float32)
        top = (
            1.0
            if image.mode == "F" and values.max(initial=0) <= 1
            else 255.0
            if image.mode == "F"
            else 65535.0
        )
        image = Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _square(image: Image.Image, resolution: int) -> Tensor:
    width, height = image.size
    scale = resolution / min(width, height)
    width, height = (max(resolution, round(side * scale)) for side in (width, height))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return _tensor(image.crop((left, top, left + resolution, top + resolution)))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def list_images(root: str | Path) -> list[str]:
    """Returns the image files below `root` as sorted relative paths with forward slashes.

    Hidden files and folders (a leading dot, as in `._0001.jpg` of macOS archives) are left out.
    """
    names: list[str] = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        names += [
            prefix + f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith(".")
        ]
    return sorted(names)


def require(root: str | Path, names: list[str], what: str, where: str) -> Path:
    """Returns the first of `root/name` for `names` that exists.

    Arguments:
        root: The data set's folder, as the user gave it.
        names: Alternative file or folder names below it ("" is `root` itself).
        what: What the file is, for the message.
        where: Where to get the data set, in words.

    Raises:
        ValueError: If none exists; it names what was expected where, and where to get it.
    """
    for name in names:
        path = Path(root) / name
        if path.exists():
            return path
    wanted = " or ".join(str(Path(root) / name) for name in names)
    raise ValueError(
        f"{what} not found: expected {wanted}. Give the folder as `root`; get the data set from {where}."
    )
