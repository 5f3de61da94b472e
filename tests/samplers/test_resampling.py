"""Resampling against its expectations, its variance and its bounds; weights that are none are errors."""

from __future__ import annotations

import math

import pytest
import torch

from stitchvm.samplers.resampling import (
    SCHEMES,
    ancestors,
    draw,
    effective_sample_size,
    normalise,
    uniforms_needed,
)

P = torch.tensor([0.2, 0.4, 0.6, 0.8, 3.0], dtype=torch.float64) / 5


def many(scheme: str, repetitions: int = 20000) -> torch.Tensor:
    uniforms = torch.rand(repetitions, uniforms_needed(scheme, 5), dtype=torch.float64)
    return ancestors(P.log().expand(repetitions, 5), uniforms, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_counts_have_the_right_mean(scheme: str) -> None:
    counts = torch.nn.functional.one_hot(many(scheme), 5).sum(dim=1).double()
    error = (counts.mean(dim=0) - 5 * P).abs()
    assert (error <= 4 * counts.std(dim=0) / len(counts) ** 0.5 + 1e-12).all()
    if scheme == "multinomial":
        assert torch.allclose(counts.var(dim=0), 5 * P * (1 - P), rtol=0.06)
    else:
        assert ((counts == (5 * P).floor()) | (counts == (5 * P).ceil())).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_slot_is_a_draw_by_weight(scheme: str) -> None:
    index = many(scheme)
    for slot in range(5):
        share = torch.bincount(index[:, slot], minlength=5).double() / len(index)
        assert torch.allclose(share, P, atol=4 * (0.25 / len(index)) ** 0.5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_weights_change_nothing(scheme: str) -> None:
    uniforms = torch.rand(7, uniforms_needed(scheme, 4), dtype=torch.float64)
    for level in (0.0, -3.5, 1e6):
        index = ancestors(torch.full((7, 4), level), uniforms, scheme)
        assert torch.equal(index, torch.arange(4).expand(7, 4))
    assert torch.equal(ancestors(torch.zeros(7, 1), uniforms[:, :1], scheme), torch.zeros(7, 1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_impossible_particles_are_never_selected(scheme: str) -> None:
    log_w = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf])
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    ends = ends.expand(2, uniforms_needed(scheme, 5))
    uniforms = torch.cat([ends, torch.rand(3000, ends.shape[1], dtype=torch.float64)])
    index = ancestors(log_w.expand(len(uniforms), 5), uniforms, scheme)
    assert set(index.unique().tolist()) == {1, 3}
    last = draw(torch.tensor([[0.0, -math.inf]]), ends[1:, :1])
    assert last.item() == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_differences_of_log_weights_count(scheme: str) -> None:
    log_w, uniforms = torch.randn(50, 6).double(), torch.rand(50, 6, dtype=torch.float64)
    uniforms = uniforms[:, : uniforms_needed(scheme, 6)]
    index = ancestors(log_w, uniforms, scheme)
    shifted = log_w + 1000 * torch.randn(50, 1)
    assert torch.equal(index, ancestors(shifted, uniforms, scheme))
    assert torch.allclose(effective_sample_size(log_w), effective_sample_size(shifted))
    assert torch.allclose(normalise(shifted).exp().sum(dim=1), torch.ones(50).double())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_independent(scheme: str) -> None:
    log_w, uniforms = torch.randn(9, 5), torch.rand(9, 5, dtype=torch.float64)
    uniforms = uniforms[:, : uniforms_needed(scheme, 5)]
    together = ancestors(log_w, uniforms, scheme)
    for row in range(9):
        one = slice(row, row + 1)
        assert torch.equal(together[one], ancestors(log_w[one], uniforms[one], scheme))


def test_huge_log_weights_stay_apart() -> None:
    # λ = 10 and rewards around 22, where exp overflows a clamp at 1e10 and all particles become equal
    log_w = 10 * torch.tensor([[22.3, 22.1, 21.9, 22.05]])
    expected = torch.tensor([1.0, math.exp(-2), math.exp(-4), math.exp(-2.5)]).double()
    assert torch.allclose(normalise(log_w).exp()[0], expected / expected.sum(), atol=1e-5)


def test_effective_sample_size_by_hand() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf, -math.inf]])
    assert effective_sample_size(rows).tolist() == pytest.approx([4, 1])
    w = torch.tensor([[0.5, 0.25, 0.25]])
    assert effective_sample_size(w.log()).item() == pytest.approx(1 / 0.375)


def test_weights_that_are_none_are_errors() -> None:
    for bad in (
        [0.0, math.nan],
        [0.0, math.inf],
        [-math.inf, -math.inf],
    ):
        with pytest.raises(ValueError, match="prompt 1 are no weights"):
            normalise(torch.tensor([[0.0, 1.0], bad]))
    with pytest.raises(ValueError, match=r"expected \(P, N\)"):
        normalise(torch.zeros(3))
    with pytest.raises(ValueError, match=r"expected \(2, 3\) for multinomial"):
        ancestors(torch.zeros(2, 3), torch.zeros(2, 1), "multinomial")
    with pytest.raises(ValueError, match="expected one of systematic, multinomial"):
        ancestors(torch.zeros(2, 3), torch.zeros(2, 1), "residual")
