"""SRCC against SciPy, its standard error against resampling, and the error against Monte Carlo truth."""

from __future__ import annotations

import pytest
import torch

from stitchvm.metrics.correlation import SpearmanCorrelation
from stitchvm.metrics.truth import TruthError, truth_errors

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("ties", [False, True])
def test_srcc_is_scipys_and_repeats_count_once(ties: bool) -> None:
    score = torch.randn(200)
    target = score + torch.randn(200)
    target = target.round() if ties else target
    metric = SpearmanCorrelation()
    metric.update(score, target, torch.arange(200))
    metric.update(score[50:90], target[50:90], torch.arange(50, 90))
    answer = metric.compute()["srcc"]
    expected = scipy_stats.spearmanr(score.numpy(), target.numpy()).statistic
    assert answer.value == pytest.approx(expected, abs=1e-6)
    assert answer.n == 200


def test_srcc_standard_error_matches_fresh_samples() -> None:
    estimates, stderrs = [], []
    for _ in range(300):
        score = torch.randn(150)
        metric = SpearmanCorrelation()
        metric.update(score, score + 0.8 * torch.randn(150), torch.arange(150))
        answer = metric.compute()["srcc"]
        estimates.append(float(answer.value))
        stderrs.append(float(answer.stderr))
    spread = float(torch.tensor(estimates).std())
    assert sum(stderrs) / 300 == pytest.approx(spread, rel=0.15)


def test_srcc_of_a_constant_is_not_a_number() -> None:
    metric = SpearmanCorrelation()
    metric.update(torch.ones(5), torch.randn(5), torch.arange(5))
    assert torch.isnan(metric.compute()["srcc"].value)


def test_srcc_of_three_samples_has_no_standard_error() -> None:
    for n in (2, 3, 4):
        metric = SpearmanCorrelation()
        metric.update(torch.arange(n) * 1.0, torch.arange(n) * 2.0, torch.arange(n))
        answer = metric.compute()["srcc"]
        assert answer.value == pytest.approx(1, abs=1e-5)
        assert bool(answer.stderr.isnan()) == (n < 4)


def test_errors_against_noisy_truth() -> None:
    n, noise = 20_000, 0.5
    value = torch.randn(n).double()
    half_a, half_b = (value + noise * torch.randn(n) for _ in range(2))
    estimate = value + 0.3 * torch.randn(n)
    metric = TruthError(resamples=50)
    metric.update(estimate, half_a, half_b, torch.arange(n))
    metric.update(estimate[:7], half_a[:7], half_b[:7], torch.arange(7))
    answer = metric.compute()
    # the truth's noise variance is noise²/2
    assert answer["truth_noise"].value == pytest.approx(noise / 2**0.5, rel=0.02)
    assert answer["rmse"].value == pytest.approx((0.3**2 + noise**2 / 2) ** 0.5, rel=0.02)
    assert answer["r2_corrected"].value == pytest.approx(1 - 0.3**2, abs=0.01)
    assert answer["r2"].value < answer["r2_corrected"].value - 0.05
    assert answer["r2"].n == n
    again = [
        float(truth_errors(estimate[p], half_a[p], half_b[p])["r2"])
        for p in (torch.randint(n, (n,)) for _ in range(50))
    ]
    assert answer["r2"].stderr == pytest.approx(float(torch.tensor(again).std()), rel=0.5)


def test_r2_of_a_constant_is_zero() -> None:
    truth = torch.randn(1000).double()
    errors = truth_errors(truth.mean().expand(1000), truth, truth)
    assert float(errors["r2"]) == pytest.approx(0, abs=1e-12)
    assert float(errors["rmse"]) == pytest.approx(float(errors["truth_std"]))


def test_a_biased_scaled_estimate_is_calibrated_by_an_affine_map() -> None:
    truth = torch.randn(500).double()
    noisy = truth + 0.5 * torch.randn(500)
    estimate = 3 * noisy + 2
    errors = truth_errors(estimate, truth, truth)
    slope, intercept, rho, *_ = scipy_stats.linregress(estimate.numpy(), truth.numpy())
    mapped = truth_errors(slope * estimate + intercept, truth, truth)
    assert float(errors["r2_calibrated"]) == pytest.approx(rho**2, abs=1e-9)
    assert float(errors["r2_calibrated"]) == pytest.approx(float(mapped["r2"]), abs=1e-9)
    assert float(errors["r2"]) < 0 < float(mapped["r2"])
    assert float(errors["bias"]) == pytest.approx(float((estimate - truth).mean()))
    assert float(mapped["bias"]) == pytest.approx(0, abs=1e-9)


def test_bad_input_is_named() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="not finite"):
        SpearmanCorrelation().update(one * torch.nan, one, one)
    with pytest.raises(ValueError, match="three vectors"):
        SpearmanCorrelation().update(torch.ones(2), one, one)
    with pytest.raises(ValueError, match="not finite"):
        TruthError().update(one, one * torch.inf, one, one)
    with pytest.raises(ValueError, match="one length"):
        TruthError().update(one, one, torch.ones(2), one)
