"""The posterior of scenes: its law without a likelihood, and against importance sampling with one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stitchvm.world.posterior import State, annealing, draw_state, posterior_scenes, propose
from stitchvm.world.render import render
from stitchvm.world.scenes import PAIR_SHARE, Scene, sample_scenes, split_of
from stitchvm.world.scores import aesthetic_score


def mean_colour(pixels: torch.Tensor) -> torch.Tensor:
    """A latent of six numbers: the mean colour of the upper and of the lower half."""
    halves = torch.stack([pixels[:, :, :16], pixels[:, :, 16:]], dim=1)
    return 4 * halves.mean((3, 4))[..., None]


def test_state_and_scene_are_one_another() -> None:
    scenes = sample_scenes("train", 40, 0)
    states = [State.of(scene) for scene in scenes]
    assert all(0 <= u <= 1 for state in states for u in state.units)
    np.testing.assert_allclose(render([s.scene for s in states]), render(scenes), atol=1e-5)
    for scene, state in zip(scenes, states, strict=True):
        assert aesthetic_score(state.scene) == pytest.approx(aesthetic_score(scene))
        np.testing.assert_allclose(State.of(state.scene).units, state.units, atol=1e-9)


def test_proposals_stay_in_the_split_and_differ() -> None:
    rng = np.random.default_rng(0)
    state, seen = draw_state("tune", rng), set()
    for _ in range(1500):
        new = propose(state, "tune", rng)
        if new is not None:
            assert split_of(new.key) == "tune" and np.all((new.units >= 0) & (new.units <= 1))
            assert new.key != state.key or not np.array_equal(new.units, state.units)
            seen.add(new.key)
            state = new
    assert len(seen) > 50


def test_without_information_the_chain_keeps_the_prior() -> None:
    rng, n = np.random.default_rng(1), 400
    start = sample_scenes("train", n, 3)
    z_t = torch.randn(n, 2, 3, 1)
    chain = posterior_scenes(start, z_t, 1.0, mean_colour, steps=40, thin=40, rng=rng)
    (last,) = list(chain)
    prior = np.array([aesthetic_score(s) for s in sample_scenes("train", 4000, 5)])
    scores = np.array([aesthetic_score(s) for s in last])
    assert abs(scores.mean() - prior.mean()) < 4 * prior.std() / n**0.5
    assert abs(scores.std() / prior.std() - 1) < 0.15
    pairs = np.mean([s.relation is not None for s in last])
    assert abs(pairs - PAIR_SHARE) < 4 * (PAIR_SHARE * (1 - PAIR_SHARE) / n) ** 0.5
    assert np.mean([a.key != b.key for a, b in zip(start, last, strict=True)]) > 0.9


def test_means_are_those_of_importance_sampling() -> None:
    def figures(scenes: list[Scene]) -> np.ndarray:
        return np.array([(aesthetic_score(s), s.tint, s.background == 0) for s in scenes])

    t = 0.35
    scene = sample_scenes("train", 1, 12)[0]
    z_t = (1 - t) * mean_colour(torch.from_numpy(render([scene]))) + t * torch.randn(1, 2, 3, 1)
    prior = sample_scenes("train", 8000, 13)
    z_0 = mean_colour(torch.from_numpy(render(prior)))
    log_w = -((z_t - (1 - t) * z_0).double().square().flatten(1).sum(1)) / (2 * t**2)
    w = torch.softmax(log_w, 0).numpy()
    drawn = figures(prior)
    expected, effective = w @ drawn, 1 / (w**2).sum()
    assert 100 < effective < 3000  # the likelihood says something, and enough draws agree with it
    spread = np.sqrt(w @ (drawn - expected) ** 2)
    rng, chains = np.random.default_rng(2), 16
    several = z_t.expand(chains, -1, -1, -1)
    walk = posterior_scenes([scene] * chains, several, t, mean_colour, steps=400, thin=4, rng=rng)
    means = np.array([figures(scenes) for scenes in walk])[25:].mean(0)
    stderr = np.hypot(means.std(0, ddof=1) / chains**0.5, spread / effective**0.5)
    assert np.all(abs(means.mean(0) - expected) < 4 * stderr)
    assert np.all(stderr < 0.2 * drawn.std(0))
    assert np.any(abs(drawn.mean(0) - expected) > 8 * stderr)  # the prior's means would not pass


def test_a_chain_from_elsewhere_finds_the_scene_when_annealed() -> None:
    rng, n, t = np.random.default_rng(4), 8, 0.2

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return 4 * torch.nn.functional.avg_pool2d(pixels, 4)

    scenes, start = sample_scenes("train", n, 20), sample_scenes("train", n, 21)
    z_0 = encode(torch.from_numpy(render(scenes)))
    z_t = (1 - t) * z_0 + t * torch.randn(n, *z_0.shape[1:])
    steps = 900
    betas = annealing(steps, n)
    walk = posterior_scenes(start, z_t, t, encode, steps=steps, thin=steps, betas=betas, rng=rng)
    (last,) = list(walk)
    error = (encode(torch.from_numpy(render(last))) - z_0).square().flatten(1).mean(1)
    before = (encode(torch.from_numpy(render(start))) - z_0).square().flatten(1).mean(1)
    assert float(before.median()) > 0.1
    assert float((error < 0.2 * before.median()).float().mean()) >= 0.75
    assert sum(a.background == b.background for a, b in zip(last, scenes, strict=True)) >= 6


def test_bad_levels_and_starts_are_named() -> None:
    rng = np.random.default_rng(0)
    start = sample_scenes("test", 2, 0)
    z_t = torch.zeros(2, 2, 3, 1)
    with pytest.raises(ValueError, match="not in the split 'train'"):
        next(posterior_scenes(start, z_t, 0.5, mean_colour, steps=1, rng=rng))
    with pytest.raises(ValueError, match="noise level in"):
        next(posterior_scenes(start, z_t, 0.0, mean_colour, steps=1, split="test", rng=rng))
