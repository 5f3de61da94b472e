"""Potentials by hand: products, corrections, the scale of λ, what resampling does to them."""

from __future__ import annotations

import pytest
import torch

from stitchvm.samplers.potentials import POTENTIALS, Weights

V = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 3.0, 4.0]], [[2.0, 2.5, 0.0]]]).double()
R = torch.tensor([[1.5, 2.0, 3.0]]).double()


def run(
    potential: str, lam: float = 0.7, per: str = "value"
) -> tuple[Weights, list[torch.Tensor]]:
    weights, log_g = Weights.even(potential, lam, per, 1, 3), []
    for v in V:
        before = weights.carried.clone()
        weights.multiply(v)
        log_g.append(weights.carried - before)
    return weights, log_g


def test_log_potentials_by_hand() -> None:
    expected = {
        "diff": [V[0], V[1] - V[0], V[2] - V[1]],
        "max": [V[0], torch.tensor([[1.0, 3.0, 4.0]]), torch.tensor([[2.0, 3.0, 4.0]])],
        "add": [V[0], V[0] + V[1], V.sum(dim=0)],
        "rt": list(V),
    }
    for potential in POTENTIALS:
        _, log_g = run(potential)
        for found, wanted in zip(log_g, expected[potential], strict=True):
            assert torch.allclose(found, 0.7 * wanted.double()), potential


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("per", ["value", "spread"])
def test_without_resampling_all_potentials_together_are_exp_of_the_reward(
    potential: str, per: str
) -> None:
    weights, _ = run(potential, per=per)
    scale = 1.0 if per == "value" else float(torch.cat([V[:, 0], R]).var(dim=1).mean().sqrt())
    assert torch.allclose(weights.last(R), 0.7 * R / scale)
    assert torch.allclose(weights.last(R), weights.last(R))  # asking changes nothing


def test_differences_telescope() -> None:
    weights, log_g = run("diff")
    assert torch.allclose(sum(log_g), 0.7 * V[2])
    assert torch.allclose(weights.product, 0.7 * V[2])


@pytest.mark.parametrize("potential", POTENTIALS)
def test_slots_inherit_the_past_of_their_ancestors(potential: str) -> None:
    index = torch.tensor([[2, 0, 2]])
    weights = Weights.even(potential, 0.7, "value", 1, 3)
    weights.multiply(V[0])
    weights.resample(index, torch.tensor([True]))
    assert weights.carried.tolist() == [[0.0, 0.0, 0.0]]
    weights.multiply(V[1])
    past = Weights.even(potential, 0.7, "value", 1, 3)
    past.multiply(V[0][:, index[0]])
    first = past.carried.clone()
    past.multiply(V[1])
    assert torch.allclose(weights.carried, past.carried - first)
    assert torch.allclose(weights.last(R), past.last(R) - first)


def test_weights_of_prompts_that_are_not_resampled_are_carried() -> None:
    weights = Weights.even("diff", 1.0, "value", 2, 3)
    values = torch.cat([V[0], V[0]])
    weights.multiply(values)
    stay = torch.arange(3).expand(2, 3)
    weights.resample(stay, torch.tensor([True, False]))
    assert torch.equal(weights.carried, torch.stack([torch.zeros(3).double(), V[0, 0]]))
    weights.multiply(torch.cat([V[1], V[1]]))
    assert torch.allclose(weights.carried, torch.stack([(V[1] - V[0])[0], V[1, 0]]))


@pytest.mark.parametrize("potential", POTENTIALS)
def test_per_spread_the_scale_and_offset_of_the_reward_do_not_matter(potential: str) -> None:
    own = Weights.even(potential, 2.0, "spread", 1, 3)
    other = Weights.even(potential, 2.0, "spread", 1, 3)
    for v in V:
        lam = own.multiply(v)
        lam_other = other.multiply(0.01 * v + 22)
        assert torch.allclose(lam, 0.01 * lam_other)
    for weights, r in ((own, R), (other, 0.01 * R + 22)):
        weights.carried = weights.last(r)
    assert torch.allclose(own.carried.log_softmax(1), other.carried.log_softmax(1))


def test_the_spread_of_a_prompt_is_its_own() -> None:
    together = Weights.even("diff", 1.0, "spread", 2, 3)
    lam = together.multiply(torch.cat([V[0], 100 * V[1]]))
    expected = torch.stack([1 / V[0].std(), 1 / (100 * V[1]).std()])
    assert torch.allclose(lam, expected)
    lam = together.multiply(torch.cat([V[1], 100 * V[1]]))
    assert lam[0].item() == pytest.approx(float((V[:2, 0].var(dim=1).mean()) ** -0.5))
    assert Weights.even("diff", 1.0, "spread", 1, 3).multiply(torch.ones(1, 3)).item() == 0


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="expected one of diff, max, add, rt"):
        Weights.even("sum", 1.0, "value", 1, 2)
    with pytest.raises(ValueError, match='expected "value" or "spread"'):
        Weights.even("diff", 1.0, "prompt", 1, 2)
    with pytest.raises(ValueError, match="expected a finite number ≥ 0"):
        Weights.even("diff", -1.0, "value", 1, 2)
