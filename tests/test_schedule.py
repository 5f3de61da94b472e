"""Grids against diffusers' scheduler, bit for bit, and noise-level laws against scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from stitchvm.schedule import (
    EVAL_SIGMAS,
    CenterBiased,
    Fixed,
    LogitNormal,
    NoiseLevelLaw,
    Uniform,
    resolution_mu,
    sigma_grid,
)

STEPS = (1, 2, 4, 7, 10, 25, 28, 40, 100)


@pytest.fixture(scope="module")
def scheduler() -> Callable:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.7])
def test_double_shift_is_the_schedulers_own_grid(scheduler: Callable, shift: float) -> None:
    for steps in STEPS:
        reference = scheduler(shift=shift)
        reference.set_timesteps(steps)
        assert torch.equal(sigma_grid(steps, shift, "double"), reference.sigmas), steps


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.7])
def test_single_shift_is_the_scheduler_given_sigmas(scheduler: Callable, shift: float) -> None:
    for steps in STEPS:
        reference = scheduler(shift=shift)
        reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        assert torch.equal(sigma_grid(steps, shift, "single"), reference.sigmas), steps
        if shift == 1.0:
            assert torch.equal(sigma_grid(steps, 3.0, "linear"), reference.sigmas), steps


@pytest.mark.slow  # importing the pipeline takes seconds
def test_mu_is_that_of_the_flux_pipeline() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (256, 1024, 2304, 4096, 8100):
        assert resolution_mu(tokens) == calculate_shift(tokens)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 8100])
def test_resolution_shift_is_flux(scheduler: Callable, tokens: int) -> None:
    mu = resolution_mu(tokens)
    for steps in STEPS:
        reference = scheduler(shift=3.0, use_dynamic_shifting=True)
        reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        assert torch.equal(sigma_grid(steps, math.exp(mu), "flux"), reference.sigmas), steps
        # the same shift written in another way: equal to rounding, not bit for bit
        torch.testing.assert_close(
            sigma_grid(steps, math.exp(mu)), reference.sigmas, rtol=0, atol=2.5e-7
        )


def test_grids_of_the_paper() -> None:
    assert resolution_mu(256) == pytest.approx(0.5)
    assert resolution_mu(4096) == pytest.approx(1.15)
    assert resolution_mu(1024) == pytest.approx(0.63)
    sd3 = sigma_grid(40, 3.0, "double")
    torch.testing.assert_close(
        sd3[[0, 8, 32, 39, 40]], torch.tensor([1, 0.9211, 0.4002, 0.0089, 0]), atol=5e-5, rtol=0
    )
    assert sd3.dtype == torch.float32 and sd3.shape == (41,)
    for kind in ("linear", "single", "flux", "double"):
        grid = sigma_grid(25, 3.0, kind)
        assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()


def test_every_grid_begins_at_one(scheduler: Callable) -> None:
    first = []
    for shift in [n / 100 for n in range(2, 1000)] + [1.43]:
        reference = scheduler(shift=shift)
        reference.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
        for kind in ("linear", "single", "flux", "double"):
            grid = sigma_grid(4, shift, kind)
            assert grid[0] == 1 and grid[1] < 1, (shift, kind)
        assert torch.equal(sigma_grid(4, shift, "single")[1:], reference.sigmas[1:])
        first.append(float(reference.sigmas[0]))
    assert min(first) < 1 < max(first)  # so it does not follow from the scheduler's
    assert 0.05 < sum(sigma != 1 for sigma in first) / len(first) < 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_steps = 0"),
        ((4, 0.0), "shift = 0"),
        ((4, math.nan), "shift = nan"),
        ((4, 3.0, "karras"), '"linear", "single", "flux" or "double"'),
    ],
)
def test_bad_grids_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigma_grid(*arguments)


def test_grids_do_not_depend_on_the_default_dtype() -> None:
    before = {kind: sigma_grid(10, 3.0, kind) for kind in ("linear", "single", "flux", "double")}
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(torch.equal(sigma_grid(10, 3.0, kind), grid) for kind, grid in before.items())
    finally:
        torch.set_default_dtype(torch.float32)


class _ScipyLogitNormal:
    @staticmethod
    def cdf(x: np.ndarray) -> np.ndarray:
        return stats.norm.cdf((np.log(x) - np.log1p(-x) - 0.3) / 0.8)


LAWS: list[tuple[NoiseLevelLaw, Callable]] = [
    (Uniform(), stats.uniform.cdf),
    (Uniform(0.2, 0.7), stats.uniform(0.2, 0.5).cdf),
    (CenterBiased(), stats.beta(1.5, 1.5).cdf),
    (CenterBiased(a=0.5), stats.beta(0.5, 0.5).cdf),
    (CenterBiased(a=4.0), stats.beta(4.0, 4.0).cdf),
    (LogitNormal(0.3, 0.8), _ScipyLogitNormal.cdf),
]


@pytest.mark.parametrize(("law", "cdf"), LAWS)
def test_samples_follow_the_law(law: NoiseLevelLaw, cdf: Callable) -> None:
    t = law.sample(20_000, torch.Generator().manual_seed(3))
    assert t.dtype == torch.float32 and t.shape == (20_000,)
    assert t.min() >= 0 and t.max() <= 1
    assert stats.kstest(t.double().numpy(), cdf).pvalue > 0.01


@pytest.mark.parametrize("a", [0.5, 1.0, 1.5, 2.0, 8.0, 50.0])
def test_the_beta_table_inverts_scipys_cdf(a: float) -> None:
    q = np.concatenate([np.linspace(0, 1, 401), [1e-6, 1e-4, 1 - 1e-4, 1 - 1e-6]])
    t = CenterBiased(a).quantile(torch.from_numpy(q)).numpy()
    assert np.abs(t - stats.beta(a, a).ppf(q)).max() < 2e-5
    inside = (q > 0.001) & (q < 0.999)
    assert np.abs(stats.beta(a, a).cdf(t) - q)[inside].max() < 1e-6


def test_center_biased_is_symmetric_and_mild() -> None:
    assert stats.beta(1.5, 1.5).cdf(0.1) == pytest.approx(0.052, abs=5e-4)  # as its docs say
    law, q = CenterBiased(), torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(law.quantile(q), 1 - law.quantile(1 - q), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("law", "cdf"), LAWS)
def test_a_stratified_batch_has_one_level_per_stratum(law: NoiseLevelLaw, cdf: Callable) -> None:
    stratified = type(law)(**{k: v for k, v in vars(law).items() if not k.startswith("_")})
    stratified.stratified = True
    generator = torch.Generator().manual_seed(5)
    t = stratified.sample(64, generator)
    strata = np.floor(cdf(t.double().numpy()) * 64 + 1e-4 * np.where(t > 0.5, -1, 1))
    assert len(np.unique(strata)) >= 62  # a float32 level on a border may count to its neighbour
    assert (t.diff() < 0).any() and (t.diff() > 0).any()  # in random order


def test_stratification_keeps_each_position_on_the_law_and_lowers_the_variance() -> None:
    generator = torch.Generator().manual_seed(7)
    law = CenterBiased(stratified=True)
    batches = torch.stack([law.sample(8, generator) for _ in range(2000)]).double()
    assert stats.kstest(batches[:, 0].numpy(), stats.beta(1.5, 1.5).cdf).pvalue > 0.01
    plain = CenterBiased().sample(16_000, generator).double().reshape(2000, 8)
    assert batches.mean(1).var() < 0.1 * plain.mean(1).var()


def test_fixed_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    law = Fixed(stratified=True)
    levels, counts = law.sample(50, generator).unique(return_counts=True)
    torch.testing.assert_close(levels, torch.tensor(EVAL_SIGMAS))
    assert counts.tolist() == [10] * 5
    assert (Fixed([0.5]).sample(7, generator) == 0.5).all()
    frequencies = Fixed([0.1, 0.9]).sample(10_000, generator).eq(0.1).float().mean()
    assert abs(frequencies - 0.5) < 4 * 0.005


def test_the_generator_alone_decides() -> None:
    for law in (Uniform(), CenterBiased(stratified=True), LogitNormal(), Fixed()):
        torch.manual_seed(11)
        first = law.sample(9, torch.Generator().manual_seed(1))
        torch.manual_seed(12)
        assert torch.equal(first, law.sample(9, torch.Generator().manual_seed(1)))
        assert not torch.equal(first, law.sample(9, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0.5, 0.2), "low = 0.5"),
        (lambda: CenterBiased(0.2), "a = 0.2"),
        (lambda: LogitNormal(0.0, -1.0), "std = -1"),
        (lambda: Fixed([]), "at least one level"),
        (lambda: Fixed([0.5, 500]), "500"),
    ],
)
def test_bad_laws_are_named(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
