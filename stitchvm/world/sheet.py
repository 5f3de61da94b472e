"""`python -m stitchvm.world.sheet`: contact sheets of true scenes and of every generator's samples, with captions."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stitchvm.world.checker import check_batch
from stitchvm.world.render import render
from stitchvm.world.scenes import sample_scenes
from stitchvm.world.scores import aesthetic_score

SCALE, TEXT = 4, 52
GREEN, RED, BLACK = (0, 120, 0), (190, 0, 0), (0, 0, 0)


def draw_sheet(
    images: NDArray[np.float32],
    captions: list[str],
    path: Path,
    passed: list[bool] | None = None,
    columns: int = 6,
) -> None:
    """Writes images (N, 3, H, W) in [0, 1] with their captions under them as a PNG."""
    from PIL import Image, ImageDraw

    side = images.shape[-1] * SCALE
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + TEXT)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = (i % columns) * (side + 8) + 4, (i // columns) * (side + TEXT) + 4
        pixels = (image.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        colour = BLACK if passed is None else GREEN if passed[i] else RED
        line, lines = "", []
        for word in caption.split():
            if len(line) + len(word) > 21:
                lines.append(line)
                line = ""
            line += ("" if not line else " ") + word
        for k, text in enumerate([*lines, line]):
            pen.text((x, y + side + 1 + 11 * k), text, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    """Writes scenes.png and one sheet per generator."""
    parser = argparse.ArgumentParser(prog="python -m stitchvm.world.sheet", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("results/world"))
    parser.add_argument("--generators", nargs="*", default=["sd3", "sd3_large", "flux"])
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scenes = sample_scenes("test", arguments.n, [arguments.seed, 94])
    names = [f"{s.caption} ({aesthetic_score(s):.1f})" for s in scenes]
    pixels = render(scenes)
    assert isinstance(pixels, np.ndarray)
    draw_sheet(pixels, names, arguments.folder / "scenes.png")
    for name in arguments.generators:
        from stitchvm.world.gates import GUIDANCE, draw, load_pipeline

        captions = [s.caption for s in scenes]
        images = draw(load_pipeline(name), captions, arguments.seed, GUIDANCE[name])
        passed = [r.whole for r in check_batch(images, scenes)]
        draw_sheet(images, captions, arguments.folder / f"samples_{name}.png", passed)


if __name__ == "__main__":
    main()
