"""A sum's terms come with the very value that the sum has by itself."""

from __future__ import annotations

import pytest
import torch

from stitchvm.randomness import keyed_generator
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.terms import value_and_terms
from stitchvm.values.weighted import WeightedValue
from tests.values.fakes import (
    BentReward,
    ClosedFormReward,
    FakeReward,
    IdentityVAE,
    WorldGenerator,
    known,
    mixture,
)

Z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.zeros(3)
CONSTANTS = {"weights": {"b": 2.0}, "means": {"a": 0.5}, "stds": {"b": 4.0}}


def rewards():
    return {"a": FakeReward(uses_text=False), "b": FakeReward(embed_dim=3, uses_text=False)}


def values(**constants):
    parts = {name: TerminalValue(IdentityVAE(), reward) for name, reward in rewards().items()}
    return WeightedValue(parts, **constants)


def over_a_sum(**constants):
    return TerminalValue(IdentityVAE(), WeightedReward(rewards(), **constants))


@pytest.mark.parametrize("make", [values, over_a_sum])
def test_terms_of_a_sum(make):
    z = Z.clone().requires_grad_()
    bound = make(**CONSTANTS).bind()
    found = value_and_terms(bound, z, T)
    wanted = bound(z, T)
    assert torch.equal(found.value, wanted)
    gradients = [torch.autograd.grad(v.sum(), z)[0] for v in (found.value, wanted)]
    assert torch.equal(*gradients) and gradients[0].any()
    single = {name: TerminalValue(IdentityVAE(), r).bind()(Z, T) for name, r in rewards().items()}
    assert found.terms.keys() == {"a", "b"}
    for name, value in single.items():
        torch.testing.assert_close(found.terms[name], value)
        assert not found.terms[name].requires_grad
    torch.testing.assert_close(found.normalised["a"], single["a"] - 0.5)
    torch.testing.assert_close(found.normalised["b"], 2 * single["b"] / 4)
    torch.testing.assert_close(sum(found.normalised.values()), found.value.detach())


@pytest.mark.parametrize("make", [values, over_a_sum])
def test_without_constants_terms_are_not_repeated(make):
    found = value_and_terms(make().bind(), Z, T)
    assert found.terms.keys() == {"a", "b"} and found.normalised == {}


def test_a_single_value_has_no_terms():
    bound = TerminalValue(IdentityVAE(), FakeReward(uses_text=False)).bind()
    found = value_and_terms(bound, Z, T)
    assert torch.equal(found.value, bound(Z, T)) and found.terms == {}


@pytest.mark.parametrize("reduction", ["mean", "log_mean_exp"])
def test_terms_of_roll_outs_are_those_of_each_of_them(reduction):
    """A reward that is not affine, and a log-mean-exp, are no functions of the average embedding."""
    parts = {"a": BentReward(known()), "b": ClosedFormReward(known())}

    def bound(reward):
        value = MonteCarloValue(
            WorldGenerator(mixture()), reward, rollouts=4, steps=3, reduction=reduction
        )
        return value.bind(generator=[keyed_generator("terms", i) for i in range(3)])

    z = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    t = torch.full((3,), 0.6)
    total = WeightedReward(parts, weights={"b": 2.0})
    found, wanted = value_and_terms(bound(total), z, t), bound(total)(z, t)
    assert torch.equal(found.value, wanted)
    assert torch.autograd.grad(found.value.sum(), z)[0].any()
    for name, reward in parts.items():
        torch.testing.assert_close(found.terms[name], bound(reward)(z, t).detach())
