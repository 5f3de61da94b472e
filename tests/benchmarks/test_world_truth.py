"""The truths of benchmarks/world_truth.py against closed forms."""

from pathlib import Path

import pytest
import torch

from stitchvm.metrics.truth import truth_errors


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from world_truth import Study

    made = Study.__new__(Study)
    z = torch.randn(40_000, 1, 1, 1)
    made.prior_z, made.prior_e = z, {"x": z.flatten(1)[None]}
    return made


def test_importance_sampling_gives_the_gaussian_posterior_mean(study):
    t = 0.6
    z_t = torch.tensor([-1.0, 0.2, 0.9])[:, None, None, None]
    means, effective = study.posterior(z_t, t)
    expected = (1 - t) * z_t.flatten() / ((1 - t) ** 2 + t**2)
    assert means["x"].shape == (2, 3, 1)
    torch.testing.assert_close(means["x"].mean(0)[:, 0], expected, atol=0.03, rtol=0)
    assert not torch.equal(means["x"][0], means["x"][1])  # from halves of their own
    assert 5_000 < effective < 40_000


def test_one_exact_draw_ranks_estimators_by_their_error_against_the_exact_truth():
    t, n = 0.6, 200_000
    z_0 = torch.randn(n).double()
    z_t = (1 - t) * z_0 + t * torch.randn(n)
    gain = (1 - t) / ((1 - t) ** 2 + t**2)
    truth, spread = gain * z_t, t**2 / ((1 - t) ** 2 + t**2)
    good, bad = 0.9 * truth + 0.05, 0.5 * truth - 0.2
    against_draw = [truth_errors(v, z_0, z_0)["rmse"].square() for v in (truth, good, bad)]
    against_truth = [truth_errors(v, truth, truth)["rmse"].square() for v in (truth, good, bad)]
    for one, other in zip(against_draw, against_truth, strict=True):
        assert float(one - other) == pytest.approx(spread, rel=0.02)
