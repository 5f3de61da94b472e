"""Renders scenes to 32x32 RGB: signed-distance shapes with analytic edge coverage on a soft background.

Pixel colour = background * (1 - coverage) + object * coverage, coverage = clip(1/2 - d, 0, 1) where d is the
signed distance to the shape's outline in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stitchvm.world.scenes import SIZE, Scene

Array = NDArray[np.float32]

PALETTE = np.array(
    [
        (0.92, 0.12, 0.14),  # red
        (0.95, 0.82, 0.08),  # yellow
        (0.12, 0.70, 0.18),  # green
        (0.10, 0.78, 0.86),  # cyan
        (0.14, 0.24, 0.92),  # blue
        (0.74, 0.16, 0.84),  # purple
    ],
    dtype=np.float32,
)
# mean luminance and its change from the middle to the bottom of the picture
GROUNDS = np.array([(0.20, 0.0), (0.50, 0.0), (0.80, 0.0), (0.50, -0.28)], dtype=np.float32)
LIGHT = 0.05  # luminance jitter
SLOPE = 0.05  # soft gradient
TINT = 0.07  # warm (+red, -blue) or cool
VIVID = (0.68, 1.0)  # share of the pure colour at vivid = 0 and 1
_AXIS = np.arange(SIZE, dtype=np.float32) + 0.5
Y, X = np.meshgrid(_AXIS, _AXIS, indexing="ij")


def distance(shape: NDArray[np.integer], x: Array, y: Array, radius: Array) -> Array:
    """Returns the signed distance to the outline of `shape` (index array), all arguments broadcast together."""
    ax, ay = np.abs(x), np.abs(y)
    circle = np.sqrt(x * x + y * y) - radius * 0.96
    square = np.maximum(ax, ay) - radius * 0.86
    triangle = np.maximum(0.874 * ax - 0.486 * (y + radius), y - 0.8 * radius)
    bar = 0.34 * radius
    cross = np.minimum(np.maximum(ax - radius, ay - bar), np.maximum(ax - bar, ay - radius))
    return np.choose(shape, [circle, square, triangle, cross])


def coverage(shape: NDArray[np.integer], x: Array, y: Array, radius: Array) -> Array:
    """Returns the covered share (..., 32, 32) of every pixel; arguments have shape (...)."""
    shape, x, y, radius = (np.asarray(a)[..., None, None] for a in (shape, x, y, radius))
    return np.clip(0.5 - distance(shape, X - x, Y - y, radius), 0.0, 1.0).astype(np.float32)


def render(scenes: Sequence[Scene], with_masks: bool = False) -> Array | tuple[Array, Array]:
    """Returns pixels (N, 3, 32, 32) in [0, 1]; with_masks adds the objects' coverage (N, 2, 32, 32)."""
    n = len(scenes)
    fields = np.zeros((n, 2, 5), dtype=np.float32)  # colour, shape, x, y, radius
    fields[:, :, 4] = -10.0  # absent
    globals_ = np.zeros((n, 6), dtype=np.float32)
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.things):
            fields[i, j] = (thing.colour, thing.shape, thing.x, thing.y, thing.radius)
        globals_[i] = (scene.background, scene.vivid, scene.tint, scene.light, *scene.slope)
    kind = globals_[:, 0].astype(int)
    vivid, tint, light, sx, sy = (globals_[:, k, None, None] for k in range(1, 6))
    u, v = (X - SIZE / 2) / (SIZE / 2), (Y - SIZE / 2) / (SIZE / 2)
    ground = GROUNDS[kind]
    luminance = ground[:, 0, None, None] + ground[:, 1, None, None] * v
    luminance = luminance + LIGHT * (2 * light - 1) + SLOPE * (sx * u + sy * v)
    pixels = np.stack([luminance + TINT * tint, luminance, luminance - TINT * tint], axis=1)
    masks = coverage(fields[..., 1].astype(int), fields[..., 2], fields[..., 3], fields[..., 4])
    masks[fields[..., 4] < 0] = 0.0
    share = VIVID[0] + (VIVID[1] - VIVID[0]) * vivid[..., None]
    for j in range(2):
        pure = PALETTE[fields[:, j, 0].astype(int)][:, :, None, None]
        colour = share * pure + (1 - share) * pure.mean(axis=1, keepdims=True)
        cover = masks[:, j, None]
        pixels = pixels * (1 - cover) + colour * cover
    pixels = np.clip(pixels, 0.0, 1.0).astype(np.float32)
    return (pixels, masks) if with_masks else pixels
