"""Stopping windows and the levels that a stopped roll-out is regressed at."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from stitchvm.objectives.stopping import (
    StopWindow,
    first_gradient_step,
    stopped_grid,
    training_levels,
)
from stitchvm.path import FlowPath
from stitchvm.schedule import sigma_grid


def test_draws_are_uniform_over_the_closed_window():
    window = StopWindow(12, 17)
    draws = torch.tensor([window.draw(0, update) for update in range(6000)])
    values, counts = draws.unique(return_counts=True)
    assert values.tolist() == [12, 13, 14, 15, 16, 17]
    # 1000 each, standard deviation 28.9
    assert (counts - 1000).abs().max() < 5 * 28.9
    assert StopWindow(5, 5).draw("any") == 5


def test_draws_depend_on_the_key_only():
    """Another process, and one that has used torch's random state otherwise, draws the same τ."""
    window = StopWindow(1, 1000)
    torch.manual_seed(1)
    here = [window.draw(7, update) for update in range(5)]
    state = torch.random.get_rng_state()
    code = (
        "import torch; from stitchvm.objectives.stopping import StopWindow\n"
        "torch.manual_seed(99); torch.rand(3)\n"
        "print([StopWindow(1, 1000).draw(7, update) for update in range(5)])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == str(here)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len({window.draw(seed, 0) for seed in range(5)}) > 1


def test_stop_k_means_k_calls_and_the_level_sigma_k():
    """On diffusers' 25-step SD 3.5 schedule the window 12 … 17 has the levels of the reference measurement."""
    sigmas = sigma_grid(25, shift=3.0, kind="double")
    levels = [stopped_grid(sigmas, k)[-1].item() for k in range(12, 18)]
    assert levels == pytest.approx([0.7511, 0.7187, 0.6834, 0.6447, 0.6022, 0.5552], abs=5e-5)
    # a roll-out over the grid, of a model that knows z_0: three calls, and z lies on the path at σ_3
    z_0, eps = torch.randn(2, 4).double()
    grid, z, calls = stopped_grid(sigmas, 3).double(), eps, 0
    for sigma, following in pairwise(grid):
        z, calls = z + (following - sigma) * (z - z_0) / sigma, calls + 1
    assert calls == 3
    assert torch.allclose(z, FlowPath.interpolate(z_0[None], eps[None], sigmas[3].double())[0])
    assert torch.equal(stopped_grid(sigmas, 25), sigmas)
    for stop in (0, 26):
        with pytest.raises(ValueError, match="expected 1 … 25 network calls"):
            stopped_grid(sigmas, stop)


def test_the_steps_with_a_gradient_are_the_last_ones():
    for stop in range(1, 12):
        for k in (1, 3, None):
            first = first_gradient_step(stop, k)
            assert stop - first == (stop if k is None else min(k, stop))


def test_windows_that_do_not_fit():
    StopWindow(3, 7).check(10, 3)
    StopWindow(25, 25).check(25, None)
    with pytest.raises(ValueError, match="outside of a schedule of 10 steps"):
        StopWindow(12, 17).check(10)
    with pytest.raises(ValueError, match="K = 4 with a roll-out that may stop after 3 steps"):
        StopWindow(3, 7).check(10, 4)
    with pytest.raises(ValueError, match="expected 1 ≤ K"):
        StopWindow(3, 7).check(10, 0)
    for low, high in ((0, 3), (5, 4)):
        with pytest.raises(ValueError, match="1 ≤ low ≤ high"):
            StopWindow(low, high)


def test_training_levels_lie_above_the_stop():
    sigmas = sigma_grid(25, shift=3.0)
    assert training_levels(sigmas.double(), 9, 2, key=(0,)).dtype == torch.float32
    for stop in (1, 12, 17, 25):
        levels = training_levels(sigmas, stop, 8, key=(0, 1, "rank", 2))
        number = max(int(0.99 * stop), 1)
        assert levels.shape == (8, number) and levels.dtype == torch.float32
        assert (levels > sigmas[stop]).all()
        assert all(len(set(row)) == number for row in levels.tolist())
        assert set(levels.flatten().tolist()) <= set(sigmas[:stop].tolist())
    whole = training_levels(sigmas, 25, 8, fraction=1.0, key=(0,))
    assert torch.equal(whole.sort(1, descending=True).values, sigmas[:25].expand(8, 25))
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(whole, training_levels(sigmas, 25, 8, fraction=1.0, key=(0,)))
    assert not torch.equal(whole, training_levels(sigmas, 25, 8, fraction=1.0, key=(1,)))
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        training_levels(sigmas, 25, 8, fraction=0.0, key=(0,))
