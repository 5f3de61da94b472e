"""Advantages of an update: sums of rewards, groups, what is logged, rewards that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stitchvm.modules.groups import Grouping, in_order, inner_parts
from stitchvm.modules.nft import DiffusionNFT
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.values.terms import Scored
from tests.modules.alignment_worlds import gaussian, in_a_world, linear, rows
from tests.values.fakes import ClosedFormReward

SOME = rows(["a", "b", "c"], 4)
TAU = torch.tensor(0.0)


def summed(terms: dict[str, Tensor], weights: dict[str, float]) -> Any:
    """Returns a module whose value is a weighted sum with given terms."""
    module = in_a_world(DiffusionNFT, gaussian(), 2, group_size=4, lam=0.0)
    parts = {name: ClosedFormReward(linear()) for name in terms}
    module._built.value.reward = WeightedReward(parts, weights)
    value = sum(weights[name] * x for name, x in terms.items())
    module.scored = lambda part, z, tau: Scored(
        value[part.positions], {name: x[part.positions] for name, x in terms.items()}
    )
    return module


def advantages(module: Any, **grouping: str) -> Tensor:
    found = Grouping(**grouping).advantages(module, SOME, torch.zeros(12, 2, 1, 1), TAU, 5)
    assert found is not None
    return found


def spread(x: Tensor) -> Tensor:
    return x.unflatten(0, (3, 4)).std(1, correction=0)


def test_normalised_terms_do_not_depend_on_their_scale():
    """A reward in other units: the same advantages with "group" and "global", others with "none"."""
    one, two = (
        torch.randn(12),
        torch.randn(12) + torch.tensor([0.0, 5.0, 9.0]).repeat_interleave(4),
    )
    weights = {"one": 1.0, "two": 0.5}
    plain, scaled = (summed({"one": one, "two": s * two}, weights) for s in (1.0, 100.0))
    for normalise in ("group", "global"):
        found = [advantages(module, normalise=normalise) for module in (plain, scaled)]
        torch.testing.assert_close(*found)
    assert not torch.allclose(advantages(plain), advantages(scaled), atol=0.1)

    def away(x: Tensor) -> Tensor:
        return (x.unflatten(0, (3, 4)) - x.unflatten(0, (3, 4)).mean(1, keepdim=True)).flatten()

    R = away(one) / spread(one).repeat_interleave(4) + 0.5 * away(two) / spread(
        two
    ).repeat_interleave(4)
    expected = R / (R.std(correction=0) + 1e-4)
    torch.testing.assert_close(advantages(plain, normalise="group"), expected)
    R = one / one.std(correction=0) + 0.5 * two / two.std(correction=0)
    expected = away(R) / (R.std(correction=0) + 1e-4)
    torch.testing.assert_close(advantages(plain, normalise="global"), expected)
    R = one + 0.5 * two
    torch.testing.assert_close(
        advantages(plain, std="group"), away(R) / (spread(R).repeat_interleave(4) + 1e-4)
    )


def test_what_is_noted():
    one, two = torch.randn(12), torch.randn(12)
    two[4:8] = one[4:8] = 1.0  # a group that teaches nothing
    module = summed({"one": one, "two": two}, {"one": 1.0, "two": 2.0})
    found = advantages(module)
    noted = {name: float(x[0]) for name, x in module._notes.items()}
    assert noted["zero_spread"] == pytest.approx(1 / 3) and found[4:8].tolist() == [0] * 4
    assert noted["group_std"] == pytest.approx(float(spread(one + 2 * two).mean()))
    assert noted["group_std/two"] == pytest.approx(float(spread(two).mean()))
    assert noted["reward_std"] == pytest.approx(float((one + 2 * two).std(correction=0)))
    assert noted["advantage_std"] == pytest.approx(float(found.square().mean().sqrt()), rel=1e-4)


def test_a_value_without_terms_is_normalised_by_itself():
    module = in_a_world(DiffusionNFT, gaussian(), 2, group_size=4, lam=0.0)
    z = torch.randn(12, 2, 1, 1)
    found = Grouping(normalise="group").advantages(module, SOME, z, TAU, None)
    R = module._built.value.bind(list(SOME.prompts))(z, torch.zeros(12)).unflatten(0, (3, 4))
    R = ((R - R.mean(1, keepdim=True)) / R.std(1, correction=0, keepdim=True)).flatten()
    torch.testing.assert_close(
        found, (R / (R.std(correction=0) + 1e-4)).float(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad):
    """In the value or in a term: there are no advantages, and no exception on this rank alone."""
    one, two = torch.randn(12), torch.randn(12)
    one[7] = bad
    module = summed({"one": one, "two": two}, {"one": 0.0, "two": 1.0})
    assert Grouping().advantages(module, SOME, torch.zeros(12, 2, 1, 1), TAU, None) is None
    module.scored = lambda part, z, tau: Scored(
        torch.full((len(part),), math.nan)
    )  # no terms then
    assert Grouping().advantages(module, SOME, torch.zeros(12, 2, 1, 1), TAU, None) is None


def test_parts_of_an_update():
    """Every step takes as many images of every prompt; what is found for parts comes back in order."""
    parts = inner_parts(rows(["a", "b"], 5), 2)
    assert [part.place for part in parts] == [(0, 2, 4, 5, 7, 9), (1, 3, 6, 8)]
    micro = [m for part in parts for m in part.split(4)]
    assert in_order(micro, [m.positions * 10 for m in micro]).tolist() == list(range(0, 100, 10))
