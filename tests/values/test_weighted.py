"""Weighted sums of values against sums of known values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieValue
from stitchvm.values.weighted import WeightedValue, measured_constants
from stitchvm.world.closed_form import KnownReward
from tests.values.fakes import ClosedFormReward, IdentityVAE, WorldGenerator, known, mixture


def slope() -> KnownReward:
    return KnownReward.linear(torch.tensor([0.7, -1.2])[:, None, None], b=3.0)


def gradient(v: Tensor, z: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(v.sum(), z, retain_graph=True)
    return found


def tweedie_sum(generator: WorldGenerator) -> WeightedValue:
    values = {
        "curved": TweedieValue(generator, ClosedFormReward(known())),
        "slope": TweedieValue(generator, ClosedFormReward(slope())),
    }
    return WeightedValue(values, {"slope": -0.5}, {"curved": 2.0, "slope": 1.0}, {"slope": 4.0})


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_the_sum_and_its_gradient_are_the_closed_form(t: float) -> None:
    world = mixture()
    z_t = world.sample(4, t=t).requires_grad_()
    value = tweedie_sum(WorldGenerator(world))
    v = value.bind()(z_t, torch.tensor([t]))
    wanted = (world.tweedie_value(z_t, t, known()) - 2) - 0.5 * (
        world.tweedie_value(z_t, t, slope()) - 1
    ) / 4
    assert torch.allclose(v, wanted, atol=1e-8)
    assert torch.allclose(gradient(v, z_t), gradient(wanted, z_t), atol=1e-6)
    assert gradient(wanted, z_t).abs().max() > 1e-2
    through = value.score(value.embed(z_t, torch.tensor([t])))
    assert torch.allclose(through, wanted, atol=1e-6)


def test_all_estimators_mixed_are_the_clean_sum_at_zero() -> None:
    world = mixture()
    generator, z_0 = WorldGenerator(world), mixture().sample(3).requires_grad_()
    value = WeightedValue(
        {
            "terminal": TerminalValue(IdentityVAE(), ClosedFormReward(known(), uses_text=True)),
            "tweedie": TweedieValue(generator, ClosedFormReward(slope())),
            "rolled": MonteCarloValue(generator, ClosedFormReward(known()), rollouts=3, steps=2),
        },
        {"terminal": 2.0, "rolled": -0.5},
        stds={"tweedie": 0.5},
    )
    bound, t = value.bind(["+", "-", "+"]), torch.zeros(3)
    sign = torch.tensor([1.0, -1, 1])
    wanted = (2 * sign - 0.5) * known()(z_0) + 2 * slope()(z_0)
    v = bound(z_0, t)
    assert torch.allclose(v, wanted, atol=1e-4)
    assert torch.allclose(gradient(v, z_0), gradient(wanted, z_0), atol=1e-4)
    clean = value.reward(z_0, value.reward.encode_text(["+", "-", "+"]))
    assert torch.allclose(clean, wanted, atol=1e-4)
    assert bound.name.startswith("2·TerminalValue of fake reward + 1·TweedieValue")
    # each for itself, and of samples in another order
    parts = bound.parts(z_0, t)
    assert list(parts) == ["terminal", "tweedie", "rolled"]
    assert torch.allclose(parts["tweedie"], slope()(z_0), atol=1e-6)
    index = torch.tensor([1, 1, 0])
    assert torch.allclose(bound.select(index)(z_0[index], t), wanted[index], atol=1e-4)
    with pytest.raises(ValueError, match="t = 0 only"):
        bound(z_0, t + 0.1)


def test_a_mixture_of_rollouts_and_tweedie_scores_averages() -> None:
    world, t, n = mixture(), 0.5, 4000
    generator, z_t = WorldGenerator(world), mixture().sample(2, t=t)
    value = WeightedValue(
        {
            "mean": MonteCarloValue(generator, ClosedFormReward(known()), rollouts=n, steps=20),
            "point": TweedieValue(generator, ClosedFormReward(known())),
        },
        {"point": -1.0},
    )
    gap = world.value(z_t, t, known()) - world.tweedie_value(z_t, t, known())
    random = torch.Generator().manual_seed(0)
    direct = value.bind(generator=random)(z_t, torch.tensor([t]))
    through = value.score(value.embed(z_t, torch.tensor([t]), generator=random))
    assert torch.allclose(direct.double(), gap, atol=0.1)
    assert torch.allclose(through.double(), gap, atol=0.1)
    assert gap.abs().min() > 0.5


def test_sums_of_sums() -> None:
    world, t = mixture(), torch.tensor([0.4])
    inner = tweedie_sum(WorldGenerator(world))
    outer = WeightedValue({"sum": inner, "again": inner}, {"again": 3.0})
    z_t = world.sample(2, t=0.4)
    v = inner.bind()(z_t, t)
    assert torch.allclose(outer.bind()(z_t, t), 4 * v, atol=1e-8)
    assert torch.allclose(outer.score(outer.embed(z_t, t)), 4 * v, atol=1e-5)


def test_text_is_encoded_once_per_reward() -> None:
    reward = ClosedFormReward(known(), uses_text=True)
    generator = WorldGenerator(mixture())
    value = WeightedValue(
        {
            "terminal": TerminalValue(IdentityVAE(), reward),
            "tweedie": TweedieValue(generator, reward),
            "other": TerminalValue(IdentityVAE(), ClosedFormReward(slope())),
        }
    )
    bound = value.bind(["+", "-", "+"])
    assert reward.encoded == ["+", "-"]
    z_0, sign = mixture().sample(3), torch.tensor([1.0, -1, 1])
    wanted = 2 * sign * known()(z_0) + slope()(z_0)
    assert torch.allclose(bound(z_0, torch.zeros(3)), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="no prompts came"):
        value.bind()


def test_measured_constants_make_every_part_standard() -> None:
    world, t = mixture(), torch.full((50,), 0.4)
    value = tweedie_sum(WorldGenerator(world))
    z_t = world.sample(50, t=0.4)
    found = measured_constants(value, z_t, t, batch_size=16)
    curved = world.tweedie_value(z_t, 0.4, known())
    assert found["curved"] == pytest.approx((float(curved.mean()), float(curved.std())), rel=1e-6)
    parts = value.with_constants(found)
    v = parts.bind()(z_t, t)
    slopes = world.tweedie_value(z_t, 0.4, slope())
    standard = [(x - x.mean()) / x.std() for x in (curved, slopes)]
    assert torch.allclose(v, standard[0] - 0.5 * standard[1], atol=1e-6)
    with pytest.raises(ValueError, match="1 latents have no spread"):
        measured_constants(value, z_t[:1], t[:1])
    with pytest.raises(ValueError, match=r"the part 'curved' is .* for all 2 latents"):
        measured_constants(value, z_t[:1].expand(2, -1, -1, -1), t[:2])


def test_bad_arguments() -> None:
    value = TweedieValue(WorldGenerator(mixture()), ClosedFormReward(known()))
    with pytest.raises(ValueError, match="no parts"):
        WeightedValue({})
    with pytest.raises(ValueError, match=r"weights are given for \['b'\]"):
        WeightedValue({"a": value}, {"b": 1.0})
    with pytest.raises(ValueError, match=r"stds of 'a' = -1\.0"):
        WeightedValue({"a": value}, stds={"a": -1.0})
