"""Scene grammar of the embedded world: what is in a picture, how it is named, which split it is in.

A scene has one or two objects (6 colours x 4 shapes, the two colours of a pair differ), one of four
backgrounds and, for a pair, a relation. Continuous nuisances (place, size, vividness, tint, light) are not
in the caption. "A left of B" and "B right of A" are one *key*, with two captions. There are
24 * 20 * 2 * 4 = 3840 pair keys and 24 * 4 = 96 single keys; a hash of the key puts each in one split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 32
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ("dark", "grey", "light", "dusk")
RELATIONS = ("left of", "above", "right of", "below")  # k and k + 2 are inverse
SPLITS = ("train", "tune", "test")
SPLIT_SHARES = (0.70, 0.15, 0.15)
PAIR_SHARE = 0.65
PAIR_OFFSET = 8.2  # distance of each object of a pair from the middle, along the relation's axis
PAIR_JITTER = (0.7, 4.0)  # along, across
SINGLE_JITTER = 5.0
PAIR_RADIUS = (4.9, 6.7)
SINGLE_RADIUS = (5.3, 7.8)


@dataclass(frozen=True)
class Thing:
    """One object: colour and shape index, centre (x right, y down) and radius in pixels."""

    colour: int
    shape: int
    x: float = SIZE / 2
    y: float = SIZE / 2
    radius: float = 6.0

    @property
    def name(self) -> str:
        """Returns the noun phrase, e.g. "red circle"."""
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Scene:
    """A scene; `relation` indexes RELATIONS (None for a single object) and reads things[0] -> things[1].

    Nuisances: `vivid`, `light` in [0, 1]; `tint` in [-1, 1] (cool to warm); `slope` in [-1, 1]^2.
    """

    things: tuple[Thing, ...]
    background: int
    relation: int | None = None
    vivid: float = 0.5
    tint: float = 0.0
    light: float = 0.5
    slope: tuple[float, float] = (0.0, 0.0)

    @property
    def caption(self) -> str:
        """Returns the sentence that names the scene."""
        text = f"a {self.things[0].name}"
        if self.relation is not None:
            text += f" {RELATIONS[self.relation]} a {self.things[1].name}"
        return f"{text} on a {BACKGROUNDS[self.background]} background"

    @property
    def key(self) -> tuple[int, ...]:
        """Returns what is distinguishable in a picture; both wordings of a pair have the same key."""
        if self.relation is None:
            thing = self.things[0]
            return (thing.colour, thing.shape, self.background)
        first, second = self.things if self.relation < 2 else self.things[::-1]
        return (
            first.colour,
            first.shape,
            self.relation % 2,
            second.colour,
            second.shape,
            self.background,
        )


def scene_from_key(key: tuple[int, ...]) -> Scene:
    """Returns the scene of a key without nuisances (objects at their nominal places)."""
    if len(key) == 3:
        return Scene((Thing(key[0], key[1]),), key[2])
    things = []
    for sign, colour, shape in ((-1, key[0], key[1]), (1, key[3], key[4])):
        place = [SIZE / 2, SIZE / 2]
        place[key[2]] += sign * PAIR_OFFSET
        things.append(Thing(colour, shape, place[0], place[1]))
    return Scene(tuple(things), key[5], key[2])


def parse(caption: str) -> Scene:
    """Returns the scene that a caption names, objects at their nominal places.

    Raises:
        ValueError: the caption is not a sentence of the grammar.
    """
    try:
        body, ground = caption.strip().lower().rstrip(".").split(" on a ")
        background = BACKGROUNDS.index(ground.removesuffix(" background"))
        relation = next((k for k, word in enumerate(RELATIONS) if f" {word} a " in body), None)
        parts = [body] if relation is None else body.split(f" {RELATIONS[relation]} ")
        pairs = []
        for part in parts:
            article, colour, shape = part.split()
            if article != "a":
                raise ValueError(article)
            pairs.append((COLOURS.index(colour), SHAPES.index(shape)))
    except ValueError as error:
        raise ValueError(
            f"caption {caption!r} is not in the world's grammar; expected e.g. "
            f"{scene_from_key((0, 0, 0, 4, 1, 0)).caption!r}"
        ) from error
    if relation is None:
        return Scene((Thing(*pairs[0]),), background)
    axis, sign = relation % 2, -1 if relation < 2 else 1
    things = []
    for which, name in enumerate(pairs):
        place = [SIZE / 2, SIZE / 2]
        place[axis] += (sign if which == 0 else -sign) * PAIR_OFFSET
        things.append(Thing(*name, place[0], place[1]))
    return Scene(tuple(things), background, relation)


def split_of(key: tuple[int, ...]) -> str:
    """Returns the split of a key: a fixed hash, so that no network ever trains on a test key."""
    digest = hashlib.sha256(("scene " + " ".join(map(str, key))).encode()).digest()
    place = int.from_bytes(digest[:6], "big") / 2**48
    if place < SPLIT_SHARES[0]:
        return "train"
    return "tune" if place < SPLIT_SHARES[0] + SPLIT_SHARES[1] else "test"


@cache
def keys(split: str) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Returns all (single keys, pair keys) of a split ("train", "tune", "test").

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {SPLITS}")
    things = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
    grounds = range(len(BACKGROUNDS))
    singles = [(*a, g) for a in things for g in grounds]
    pairs = [
        (*a, axis, *b, g)
        for a in things
        for b in things
        for axis in (0, 1)
        for g in grounds
        if a[0] != b[0]
    ]
    return (
        tuple(k for k in singles if split_of(k) == split),
        tuple(k for k in pairs if split_of(k) == split),
    )


def dress(key: tuple[int, ...], rng: np.random.Generator) -> Scene:
    """Returns the key's scene with random nuisances and, for a pair, one of its two wordings."""
    base = scene_from_key(key)
    things = []
    for thing in base.things:
        if base.relation is None:
            dx, dy = rng.uniform(-SINGLE_JITTER, SINGLE_JITTER, 2)
            radius = rng.uniform(*SINGLE_RADIUS)
        else:
            moves = [rng.uniform(-reach, reach) for reach in PAIR_JITTER]
            dx, dy = moves if base.relation == 0 else moves[::-1]
            radius = rng.uniform(*PAIR_RADIUS)
        things.append(Thing(thing.colour, thing.shape, thing.x + dx, thing.y + dy, radius))
    relation = base.relation
    if relation is not None and rng.random() < 0.5:
        things, relation = things[::-1], relation + 2
    sx, sy = rng.uniform(-1, 1, 2)
    return Scene(
        tuple(things),
        base.background,
        relation,
        vivid=rng.random(),
        tint=rng.uniform(-1, 1),
        light=rng.random(),
        slope=(sx, sy),
    )


def mutate(key: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
    """Returns a key that differs in one attribute (colour, shape, background, order or relation)."""
    while True:
        new = list(key)
        if len(key) == 3:
            slot = int(rng.integers(3))
            new[slot] = int(rng.integers((len(COLOURS), len(SHAPES), len(BACKGROUNDS))[slot]))
        else:
            slot = int(rng.integers(9))
            sizes = (len(COLOURS), len(SHAPES), 2, len(COLOURS), len(SHAPES), len(BACKGROUNDS))
            if slot < 6:
                new[slot] = int(rng.integers(sizes[slot]))
            elif slot == 6:  # the objects change places
                new[0:2], new[3:5] = new[3:5], new[0:2]
            elif slot == 7:  # the colours do
                new[0], new[3] = new[3], new[0]
            else:  # the shapes do
                new[1], new[4] = new[4], new[1]
        found = tuple(new)
        if found != key and (len(key) == 3 or found[0] != found[3]):
            return found


def sample_scenes(
    split: str, n: int, seed: int | list[int], distinct: bool = False
) -> list[Scene]:
    """Returns n random scenes of a split; `distinct` gives n different keys (captions).

    Raises:
        ValueError: unknown split, or more distinct keys asked for than the split has.
    """
    rng = np.random.default_rng(seed)
    singles, pairs = keys(split)
    if distinct:
        every = singles + pairs
        if n > len(every):
            raise ValueError(
                f"{n} distinct scenes of split {split!r}; it has only {len(every)} keys, ask for fewer"
            )
        return [dress(every[i], rng) for i in rng.permutation(len(every))[:n]]
    scenes = []
    for _ in range(n):
        pool = pairs if rng.random() < PAIR_SHARE else singles
        scenes.append(dress(pool[rng.integers(len(pool))], rng))
    return scenes
