"""The true scores of the world: aesthetics of a scene, preference for a scene given a prompt.

    aesthetic  = 4.8 + 1.6 vividness + 1.2 size + 0.9 balance + 2 harmony        each part in [-1, 1]
    preference = 6 match + aesthetic / 2

Vividness is the objects' saturation, size their radius, balance falls with the distance of their common centre from
the middle, harmony is high when warm objects stand on a cool ground or cool ones on a warm ground. None of them is
in the caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from stitchvm.world.scenes import (
    PAIR_RADIUS,
    SINGLE_RADIUS,
    SIZE,
    Scene,
    dress,
    keys,
    mutate,
    parse,
    split_of,
)

WARMTH = (1.0, 0.6, -0.4, -0.9, -1.0, 0.3)  # of each colour
WEIGHTS = {"vividness": 1.6, "size": 1.2, "balance": 0.9, "harmony": 2.0}
MARGIN = 0.25  # least difference of preference between images of one group


def aesthetic_parts(scene: Scene) -> dict[str, float]:
    """Returns the parts of the aesthetic score, each in [-1, 1]."""
    low, high = SINGLE_RADIUS if len(scene.things) == 1 else PAIR_RADIUS
    size = np.mean([(2 * t.radius - low - high) / (high - low) for t in scene.things])
    areas = np.array([t.radius**2 for t in scene.things])
    centre = (areas[:, None] * [(t.x, t.y) for t in scene.things]).sum(axis=0) / areas.sum()
    balance = 2 * np.exp(-(((centre - SIZE / 2) / 3.5) ** 2).sum()) - 1
    harmony = -scene.tint * np.mean([WARMTH[t.colour] for t in scene.things])
    return {
        "vividness": 2 * scene.vivid - 1,
        "size": float(size),
        "balance": float(balance),
        "harmony": float(harmony),
    }


def aesthetic_score(scene: Scene) -> float:
    """Returns the true aesthetic score: mean about 5, standard deviation about 1.4."""
    parts = aesthetic_parts(scene)
    return 4.8 + sum(WEIGHTS[k] * v for k, v in parts.items())


def match(wanted: Scene, scene: Scene) -> float:
    """Returns in [0, 1] how well a scene shows what is wanted: objects 0.6, relation 0.2, background 0.2."""

    def canonical(s: Scene) -> tuple[tuple[tuple[int, int], ...], int | None]:
        things = tuple((t.colour, t.shape) for t in s.things)
        if s.relation is not None and s.relation >= 2:
            return things[::-1], s.relation - 2
        return things, s.relation

    (want, axis), (have, seen) = canonical(wanted), canonical(scene)
    total = 2 * max(len(want), len(have))
    best = 0.0
    for order in permutations(range(len(have))):
        hits = sum(
            (a == b)
            for i, j in zip(range(len(want)), order, strict=False)
            for a, b in zip(want[i], have[j], strict=True)
        )
        related = axis == seen and list(order) == sorted(order)
        best = max(best, 0.6 * hits / total + 0.2 * related)
    return best + 0.2 * (wanted.background == scene.background)


def preference_score(prompt: str | Scene, scene: Scene) -> float:
    """Returns the true preference for a scene given a prompt (mean about 6.5 over groups).

    Raises:
        ValueError: the prompt is outside the grammar.
    """
    wanted = parse(prompt) if isinstance(prompt, str) else prompt
    return 6.0 * match(wanted, scene) + 0.5 * aesthetic_score(scene)


@dataclass(frozen=True)
class PreferenceGroup:
    """One prompt, several scenes and their true preferences; the ranks follow from the scores."""

    prompt: str
    scenes: tuple[Scene, ...]
    scores: tuple[float, ...]

    @property
    def ranks(self) -> NDArray[np.int64]:
        """Returns each scene's rank, 0 is the best."""
        return np.argsort(np.argsort(-np.array(self.scores)))


def preference_groups(
    split: str, n: int, seed: int | Sequence[int], images: int = 4
) -> list[PreferenceGroup]:
    """Returns n groups: a prompt of the split and scenes with none to three attributes changed.

    All keys belong to the split. Scores within a group are at least MARGIN apart.
    """
    rng = np.random.default_rng(seed)
    singles, pairs = keys(split)
    groups: list[PreferenceGroup] = []
    while len(groups) < n:
        pool = pairs if rng.random() < 0.8 else singles
        prompt = dress(pool[rng.integers(len(pool))], rng)
        scenes: list[Scene] = []
        scores: list[float] = []
        for _ in range(60):
            key = prompt.key
            for _ in range(rng.choice(4, p=(0.35, 0.3, 0.2, 0.15))):
                key = mutate(key, rng)
            if split_of(key) != split:
                continue
            scene = dress(key, rng)
            score = preference_score(prompt, scene)
            if all(abs(score - other) >= MARGIN for other in scores):
                scenes.append(scene)
                scores.append(score)
            if len(scenes) == images:
                groups.append(PreferenceGroup(prompt.caption, tuple(scenes), tuple(scores)))
                break
    return groups
