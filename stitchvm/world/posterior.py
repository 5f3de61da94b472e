r"""The world's own posterior of the scene behind a noisy latent, by Metropolis sampling of the grammar.

    p(s | z_t) ∝ p(s) · N(z_t; (1 − t) E(x(s)), t² I)

p(s) is the law that `sample_scenes` draws from, x(s) the rendering, E the VAE's mean: everything is known, so no
generator is asked. It is the law a value model is distilled under, E[r(x(s)) | z_t] is what its loss aims at.

A chain walks over the key (which objects, where, on which ground) and the nuisances as uniform coordinates
in [0, 1]. Every move is symmetric under p(s), so it is accepted with the ratio of likelihoods. A latent that was
made from a scene makes that scene an exact draw of its posterior: a chain that starts there is stationary from its
first state, and its mean is an unbiased estimate of E[r | z_t], if a noisy one where the chain mixes slowly. A chain
from elsewhere that is annealed (likelihood^β, β rising to 1) tells how slowly: the two agree where both mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stitchvm.world.render import render
from stitchvm.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    PAIR_JITTER,
    PAIR_RADIUS,
    PAIR_SHARE,
    SHAPES,
    SINGLE_JITTER,
    SINGLE_RADIUS,
    Scene,
    Thing,
    keys,
    scene_from_key,
    split_of,
)

Encode = Callable[[Tensor], Tensor]
Units = NDArray[np.float64]
PLACE, GLOBAL = 3, 5  # coordinates of an object (two of place, radius) and of the whole scene


@dataclass(frozen=True)
class State:
    """A scene as its key and coordinates, uniform in [0, 1] under p(s): 3 per object, then 5 of the scene."""

    key: tuple[int, ...]
    units: Units

    @property
    def scene(self) -> Scene:
        """The scene, a pair in the wording "left of" or "above"."""
        base = scene_from_key(self.key)
        pair = len(base.things) == 2
        low, high = PAIR_RADIUS if pair else SINGLE_RADIUS
        reach = PAIR_JITTER if pair else (SINGLE_JITTER, SINGLE_JITTER)
        things = []
        for k, thing in enumerate(base.things):
            a, b, r = self.units[PLACE * k : PLACE * (k + 1)]
            moves = [(2 * u - 1) * m for u, m in zip((a, b), reach, strict=True)]
            dx, dy = moves[::-1] if base.relation == 1 else moves
            radius = low + (high - low) * r
            things.append(Thing(thing.colour, thing.shape, thing.x + dx, thing.y + dy, radius))
        vivid, tint, light, sx, sy = (float(u) for u in self.units[-GLOBAL:])
        return replace(
            base,
            things=tuple(things),
            vivid=vivid,
            tint=2 * tint - 1,
            light=light,
            slope=(2 * sx - 1, 2 * sy - 1),
        )

    @classmethod
    def of(cls, scene: Scene) -> State:
        """Returns the state of a scene that `dress` made."""
        base = scene_from_key(scene.key)
        swapped = scene.relation is not None and scene.relation >= 2
        things = scene.things[::-1] if swapped else scene.things
        pair = len(things) == 2
        low, high = PAIR_RADIUS if pair else SINGLE_RADIUS
        reach = PAIR_JITTER if pair else (SINGLE_JITTER, SINGLE_JITTER)
        units: list[float] = []
        for thing, nominal in zip(things, base.things, strict=True):
            moves = [thing.x - nominal.x, thing.y - nominal.y]
            moves = moves[::-1] if base.relation == 1 else moves
            units += [(d / m + 1) / 2 for d, m in zip(moves, reach, strict=True)]
            units.append((thing.radius - low) / (high - low))
        units += [scene.vivid, (scene.tint + 1) / 2, scene.light]
        units += [(s + 1) / 2 for s in scene.slope]
        return cls(scene.key, np.array(units))


def annealing(steps: int, chains: int, first: float = 0.003) -> NDArray[np.float64]:
    """Returns powers (steps, chains) that rise geometrically from `first` to 1."""
    return np.repeat(np.geomspace(first, 1.0, steps)[:, None], chains, axis=1)


def draw_state(split: str, rng: np.random.Generator) -> State:
    """Returns a draw of p(s), the law of `sample_scenes`."""
    singles, pairs = keys(split)
    pool = pairs if rng.random() < PAIR_SHARE else singles
    key = pool[rng.integers(len(pool))]
    return State(key, rng.random(GLOBAL + PLACE * (1 if len(key) == 3 else 2)))


def propose(state: State, split: str, rng: np.random.Generator) -> State | None:
    """Returns a proposal that is symmetric under p(s), or None where it leaves the grammar or the split."""
    move = rng.random()
    if move < 0.1:
        return draw_state(split, rng)
    units = state.units.copy()
    if move < 0.5:  # walk, reflected at the walls: some coordinates, steps of many sizes
        chosen = rng.random(len(units)) < rng.choice((0.15, 0.4, 1.0))
        chosen[rng.integers(len(units))] = True
        step = rng.choice((0.02, 0.06, 0.2)) * rng.standard_normal(len(units)) * chosen
        walked = np.mod(units + step, 2.0)
        return State(state.key, np.where(walked > 1, 2 - walked, walked))
    if move < 0.65:
        units[rng.integers(len(units))] = rng.random()
        return State(state.key, units)
    new = list(state.key)
    pair = len(new) == 6
    thing = int(rng.integers(2)) if pair else 0
    at = 3 * thing
    kind = rng.integers(7)
    if kind == 0:
        new[at] = int(rng.integers(len(COLOURS)))
    elif kind == 1:
        new[at + 1] = int(rng.integers(len(SHAPES)))
    elif kind == 2:
        new[-1] = int(rng.integers(len(BACKGROUNDS)))
    elif kind == 3:  # one object anew
        new[at : at + 2] = [int(rng.integers(len(COLOURS))), int(rng.integers(len(SHAPES)))]
        units[PLACE * thing : PLACE * (thing + 1)] = rng.random(PLACE)
    elif kind == 4:  # ground anew
        new[-1] = int(rng.integers(len(BACKGROUNDS)))
        units[-GLOBAL + 1 :] = rng.random(GLOBAL - 1)
    elif pair and kind == 5:
        new[2] = 1 - new[2]
    elif pair:  # the objects change colours, shapes or both
        for slot in ((0,), (1,), (0, 1))[rng.integers(3)]:
            new[slot], new[slot + 3] = new[slot + 3], new[slot]
    key = tuple(new)
    if key == state.key and kind not in (3, 4):
        return None
    if (pair and key[0] == key[3]) or split_of(key) != split:
        return None
    return State(key, units)


@torch.no_grad()
def posterior_scenes(
    start: Sequence[Scene],
    z_t: Tensor,
    t: float,
    encode: Encode,
    *,
    steps: int,
    thin: int = 1,
    split: str = "train",
    betas: NDArray[np.float64] | None = None,
    rng: np.random.Generator,
) -> Iterator[list[Scene]]:
    """Yields the scenes of N parallel chains, one list of N for every `thin` steps.

    Arguments:
        start: Where the chains start; the scenes that `z_t` was made from, for stationary chains.
        z_t: The noisy latents, with shape (N, C, H, W).
        t: Their noise level in (0, 1].
        encode: Maps pixels (N, 3, 32, 32) in [0, 1] to clean latents.
        steps: The number of Metropolis steps.
        thin: How many of them lie between two yields.
        split: The split whose keys have prior mass.
        betas: Each chain's power of the likelihood at each step, with shape (steps, N); 1 by default.
        rng: Where randomness comes from.

    Raises:
        ValueError: If the noise level is out of its range, or a start is not in the split.
    """
    if not 0 < t <= 1:
        raise ValueError(f"t = {t}: expected a noise level in (0, 1].")
    outside = [scene.caption for scene in start if split_of(scene.key) != split]
    if outside:
        raise ValueError(
            f"{len(outside)} starting scenes are not in the split {split!r}, the first is {outside[0]!r}: "
            "they have no prior mass there; give scenes of that split."
        )

    def log_likelihood(states: Sequence[State], of: Sequence[int]) -> NDArray[np.float64]:
        if not states:
            return np.zeros(0)
        drawn = (
            np.rint(np.asarray(render([s.scene for s in states])) * 255) / 255
        )  # as the data are
        z_0 = encode(torch.from_numpy(drawn.astype(np.float32)))
        error = (z_t[list(of)] - (1 - t) * z_0).double()
        return (-error.square().flatten(1).sum(1) / (2 * t**2)).numpy()

    states = [State.of(scene) for scene in start]
    level = log_likelihood(states, range(len(states)))
    for step in range(1, steps + 1):
        proposals = [(n, propose(state, split, rng)) for n, state in enumerate(states)]
        valid = [(n, state) for n, state in proposals if state is not None]
        found = log_likelihood([s for _, s in valid], [n for n, _ in valid])
        beta = np.ones(len(states)) if betas is None else betas[step - 1]
        for (n, state), value in zip(valid, found, strict=True):
            if np.log(rng.random()) < beta[n] * (value - level[n]):
                states[n], level[n] = state, value
        if step % thin == 0:
            yield [state.scene for state in states]
