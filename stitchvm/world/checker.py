"""Exact checker: reads an image back into its scene.

A pixel's chroma is its colour minus its grey part. Pixels of strong chroma are assigned to the palette colour of
the nearest direction; 4-connected components of one colour are objects. Area and centroid give each shape's radius
and centre, the template with the best soft IoU names the shape. The rest of the pixels give the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stitchvm.world.render import GROUNDS, PALETTE, SIZE, X, Y, coverage
from stitchvm.world.scenes import Scene, Thing, parse

CHROMA = 0.26  # least chroma norm of an object's pixel
SPECK = 10  # components of fewer pixels are ignored
MIN_AREA = 22.0  # an object covers at least this many pixels
MIN_IOU = 0.75  # true renders reach at least 0.87; a visibly deformed shape does not pass
_CHROMA = PALETTE - PALETTE.mean(axis=1, keepdims=True)
_DIRECTION = _CHROMA / np.linalg.norm(_CHROMA, axis=1, keepdims=True)
# area / radius^2 and centroid below the nominal centre / radius, per shape
_AREA = np.array(
    [np.pi * 0.96**2, (2 * 0.86) ** 2, 1.8 * 1.8 / 2 * (2 * 0.486 / 0.874 / 1.8) * 1.0, 0.0]
)
_AREA[2] = 1.8 * (1.8 * 0.486 / 0.874)
_AREA[3] = 8 * 0.34 - 4 * 0.34**2
_DROP = np.array([0.0, 0.0, 0.2, 0.0])
_SCALES = np.array([0.9, 0.95, 1.0, 1.05, 1.1])


@dataclass(frozen=True)
class CheckResult:
    """Verdict on one image: `whole` is true when every attribute is right and nothing is superfluous."""

    whole: bool
    count: bool
    colour: float
    shape: float
    relation: float
    background: bool

    @property
    def attributes(self) -> dict[str, float]:
        """Returns the single verdicts as numbers in [0, 1] (shares over the objects)."""
        return {
            "count": float(self.count),
            "colour": self.colour,
            "shape": self.shape,
            "relation": self.relation,
            "background": float(self.background),
        }


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Returns the 4-connected components of a mask as masks."""
    height, width = mask.shape
    left = mask.copy()
    found = []
    for start in zip(*np.nonzero(mask), strict=True):
        if not left[start]:
            continue
        left[start] = False
        stack, part = [start], np.zeros_like(mask)
        while stack:
            y, x = stack.pop()
            part[y, x] = True
            for b, a in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= b < height and 0 <= a < width and left[b, a]:
                    left[b, a] = False
                    stack.append((b, a))
        found.append(part)
    return found


def _grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    out = np.zeros_like(mask)
    for dy in range(3):
        for dx in range(3):
            out |= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    return out


def _read_thing(
    part: NDArray[np.bool_], strength: NDArray[np.float32], colour: int
) -> tuple[Thing, float]:
    """Returns the object behind a component and its template's IoU."""
    solid = np.quantile(strength[part], 0.8)
    soft = np.clip(strength / max(float(solid), 1e-6), 0.0, 1.0) * _grow(part)
    soft[soft < 0.12] = 0.0
    area = float(soft.sum())
    x, y = float((soft * X).sum() / area), float((soft * Y).sum() / area)
    radius = np.sqrt(area / _AREA)[:, None] * _SCALES
    index = np.broadcast_to(np.arange(4)[:, None], radius.shape)
    top = y - _DROP[:, None] * radius
    templates = coverage(index, np.full_like(radius, x), top, radius)
    union = np.maximum(templates, soft).sum(axis=(-2, -1))
    score = np.minimum(templates, soft).sum(axis=(-2, -1)) / union
    shape, scale = np.unravel_index(int(score.argmax()), score.shape)
    thing = Thing(colour, int(shape), x, float(top[shape, scale]), float(radius[shape, scale]))
    return thing, float(score[shape, scale])


def read(image: NDArray[np.float32]) -> tuple[Scene | None, dict[str, list[float]]]:
    """Returns the scene in an image (3, 32, 32) in [0, 1] and {"area", "iou"} of its objects.

    The scene is None when there are not one or two objects, or one of them is like no shape. Nuisances
    other than place and radius are not read.
    """
    image = np.asarray(image, dtype=np.float32)
    if image.shape != (3, SIZE, SIZE):
        raise ValueError(f"image of shape {image.shape}; expected (3, {SIZE}, {SIZE}) in [0, 1]")
    image = np.clip(np.nan_to_num(image), 0.0, 1.0)
    grey = image.mean(axis=0)
    chroma = image - grey
    along = np.tensordot(_DIRECTION, chroma, axes=1)  # (6, H, W)
    nearest = along.argmax(axis=0)
    strong = np.linalg.norm(chroma, axis=0) > CHROMA
    found, areas, ious = [], [], []
    bad = False
    for colour in range(len(PALETTE)):
        mask = strong & (nearest == colour)
        if mask.sum() < SPECK:
            continue
        for part in _components(mask):
            if part.sum() < SPECK:
                continue
            thing, iou = _read_thing(part, np.clip(along[colour], 0, None), colour)
            found.append(thing)
            areas.append(float(part.sum()))
            ious.append(iou)
            bad |= iou < MIN_IOU or part.sum() < MIN_AREA
    measured = {"area": areas, "iou": ious}
    if bad or len(found) not in (1, 2):
        return None, measured
    rest = ~_grow(strong)
    if rest.sum() < 20:
        return None, measured
    v = ((Y - SIZE / 2) / (SIZE / 2))[rest]
    slope, level = np.polyfit(v, grey[rest], 1)
    background = int(((GROUNDS - (level, slope)) ** 2).sum(axis=1).argmin())
    if len(found) == 1:
        return Scene(tuple(found), background), measured
    dx, dy = found[1].x - found[0].x, found[1].y - found[0].y
    axis = 0 if abs(dx) > abs(dy) else 1
    if (dx, dy)[axis] < 0:
        found = found[::-1]
    return Scene(tuple(found), background, axis), measured


def _agreement(seen: Scene, wanted: Scene) -> CheckResult:
    """Compares what was read with what was asked for (both in canonical order)."""
    if wanted.relation is not None and wanted.relation >= 2:
        wanted = Scene(wanted.things[::-1], wanted.background, wanted.relation - 2)
    count = len(seen.things) == len(wanted.things)
    left = list(seen.things)
    colour = shape = 0
    for thing in wanted.things:  # objects are found by their colour, in any place
        match = next((s for s in left if s.colour == thing.colour), None)
        if match is not None:
            colour += 1
            shape += match.shape == thing.shape
            left.remove(match)
    n = len(wanted.things)
    relation = 1.0
    if wanted.relation is not None:
        order = [t.colour for t in seen.things] == [t.colour for t in wanted.things]
        relation = float(count and order and seen.relation == wanted.relation)
    background = seen.background == wanted.background
    whole = count and seen.key == wanted.key
    return CheckResult(whole, count, colour / n, shape / n, relation, background)


def check(image: NDArray[np.float32], wanted: str | Scene) -> CheckResult:
    """Returns whether an image (3, 32, 32) in [0, 1] shows what a caption or scene asks for.

    Raises:
        ValueError: image of another shape, or a caption outside the grammar.
    """
    scene = parse(wanted) if isinstance(wanted, str) else wanted
    seen, _ = read(image)
    if seen is None:
        return CheckResult(False, False, 0.0, 0.0, 0.0, False)
    return _agreement(seen, scene)


def check_batch(images: NDArray[np.float32], wanted: Sequence[str | Scene]) -> list[CheckResult]:
    """Returns `check` for every image (N, 3, 32, 32) and its caption or scene.

    Raises:
        ValueError: not as many images as captions.
    """
    if len(images) != len(wanted):
        raise ValueError(f"{len(images)} images but {len(wanted)} captions; give one for each")
    return [check(image, scene) for image, scene in zip(images, wanted, strict=True)]


def pass_rate(results: Sequence[CheckResult]) -> float:
    """Returns the share of images that pass as a whole."""
    return float(np.mean([r.whole for r in results]))
