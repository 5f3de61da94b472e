"""A weighted sum of rewards against sums of known rewards; what its embedding keeps; one decode for all parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.rewards.average import score_of_average
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieValue
from stitchvm.world.closed_form import KnownReward
from tests.rewards.tiny import head_file
from tests.values.fakes import ClosedFormReward, FakeReward, WorldGenerator, known, mixture

WEIGHTS, MEANS, STDS = {"b": -0.5}, {"a": 2.0, "b": 1.0}, {"b": 4.0}


def slope() -> KnownReward:
    return KnownReward.linear(torch.tensor([0.7, -1.2])[:, None, None], b=3.0)


def pair(uses_text: bool = False) -> WeightedReward:
    rewards = {
        "a": ClosedFormReward(known(), uses_text=uses_text),
        "b": ClosedFormReward(slope(), bound=50.0),
    }
    return WeightedReward(rewards, WEIGHTS, MEANS, STDS)


def by_hand(z: torch.Tensor) -> torch.Tensor:
    return (known()(z) - 2) - 0.5 * (slope()(z) - 1) / 4


def test_it_is_the_weighted_sum_and_so_is_its_gradient() -> None:
    z = mixture().sample(6).requires_grad_()
    r, wanted = pair()(z), by_hand(z)
    assert torch.allclose(r, wanted, atol=1e-9)
    gradients = [torch.autograd.grad(x.sum(), z)[0] for x in (r, wanted)]
    assert torch.allclose(*gradients, atol=1e-9)
    assert gradients[0].abs().max() > 0.1


def test_text_reaches_the_parts_that_read_it() -> None:
    reward, z = pair(uses_text=True), mixture().sample(3)
    text = reward.encode_text(["+", "-", "+"])
    sign = torch.tensor([1.0, -1, 1])
    wanted = (sign * known()(z) - 2) - 0.5 * (slope()(z) - 1) / 4
    assert torch.allclose(reward(z, text), wanted, atol=1e-6)
    # of any length, as every reward's
    embedding = normalize(reward.embed(z).image, dim=-1)
    assert torch.allclose(reward.score(3 * embedding, text), wanted, atol=1e-6)
    assert torch.allclose(reward.score(embedding, normalize(text, dim=-1)), wanted, atol=1e-4)


def test_an_average_embedding_has_the_average_score() -> None:
    rewards = {"a": FakeReward(uses_text=False), "b": FakeReward(embed_dim=6, uses_text=False)}
    reward, pixels = WeightedReward(rewards, WEIGHTS, MEANS, STDS), torch.randn(40, 3, 4, 4)
    assert reward.affine
    average = reward(pixels).mean()
    mean = normalize(reward.embed(pixels).image, dim=-1).mean(dim=0, keepdim=True)
    for score in (reward.score(mean), score_of_average(reward, mean)):
        assert torch.allclose(score, average, atol=1e-5)
    # its parts shrink by different factors, so that one length for all would not do
    a, b = (mean[0, :-1] / mean[0, -1]).split([4, 6])
    assert 0.05 < a.norm() < 0.95 and abs(a.norm() - b.norm()) > 0.01


def test_a_part_that_is_not_affine_makes_the_whole_so(tiny_clip: Path, tmp_path: Path) -> None:
    head = head_file(tmp_path / "head.pth", relu=True)
    aesthetic = AestheticReward(model=f"local-dir:{tiny_clip}", head=str(head))
    clip = CLIPReward(model=f"local-dir:{tiny_clip}")
    reward = WeightedReward({"clip": clip, "aesthetic": aesthetic}, {"aesthetic": 2.0})
    assert clip.affine and not aesthetic.affine and not reward.affine and reward.uses_text
    pixels, prompts = torch.rand(2, 3, 32, 32), ["a red circle", "a blue square"]
    r = reward(pixels, reward.encode_text(prompts))
    wanted = clip(pixels, clip.encode_text(prompts)) + 2 * aesthetic(pixels)
    torch.testing.assert_close(r, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="not affine"):
        score_of_average(reward, reward.embed(pixels).image, reward.encode_text(prompts))


def test_values_over_it_decode_once_and_are_the_sums() -> None:
    world, t = mixture(), 0.6
    generator, z_t = WorldGenerator(world), mixture().sample(3, t=t)
    parts = [(1.0, 2.0, 1.0, known()), (-0.5, 1.0, 4.0, slope())]

    def wanted(kind: str) -> torch.Tensor:
        values = [w * (getattr(world, kind)(z_t, t, r) - m) / s for w, m, s, r in parts]
        return torch.stack(values).sum(dim=0)

    tweedie = TweedieValue(generator, pair()).bind()(z_t, torch.tensor([t]))
    assert generator.vae.decoded == 1
    assert torch.allclose(tweedie, wanted("tweedie_value"), atol=1e-7)
    rollouts = MonteCarloValue(generator, pair(), rollouts=4000, steps=20)
    random = torch.Generator().manual_seed(0)
    mean = rollouts.bind(generator=random)(z_t, torch.tensor([t]))
    assert generator.vae.decoded == 2
    assert torch.allclose(mean.double(), wanted("value"), atol=0.1)
    assert (tweedie - mean).abs().max() > 0.3
    through = rollouts.score(rollouts.embed(z_t, torch.tensor([t]), generator=random))
    assert torch.allclose(through.double(), wanted("value"), atol=0.1)
    terminal = TerminalValue(generator.vae, pair()).bind()(z_t, torch.zeros(3))
    assert generator.vae.decoded == 4
    assert torch.allclose(terminal, by_hand(z_t), atol=1e-9)


def test_one_reward_under_two_names_looks_once() -> None:
    one = ClosedFormReward(known(), uses_text=True)
    reward = WeightedReward({"up": one, "down": one}, {"down": -0.25})
    z = mixture().sample(2)
    r = reward(z, reward.encode_text(["+", "+"]))
    assert one.looked == 1 and one.encoded == ["+", "+"]
    assert torch.allclose(r, 0.75 * known()(z), atol=1e-9)


def test_names_and_sums_of_costs() -> None:
    reward = pair()
    assert reward.id == "1·fake reward + -0.5·fake reward"
    assert reward.embed_dim == 5 and reward.flops() == 2
    assert reward.embed(mixture().sample(2)).tokens.shape == (2, 1, 5)


def test_bad_arguments() -> None:
    parts = {"a": FakeReward()}
    for arguments, message in (
        (({},), "no parts"),
        ((parts, {"b": 1.0}), r"weights are given for \['b'\], but the parts are \['a'\]"),
        ((parts, None, {"a": float("nan")}), "means of 'a' = nan: expected a finite number"),
        ((parts, None, None, {"a": 0.0}), "stds of 'a' = 0.0: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightedReward(*arguments)
    reward = WeightedReward(parts)
    image, text = reward.embed(torch.rand(2, 3, 8, 8)).image, reward.encode_text(["1,0,0,0"] * 2)
    with pytest.raises(ValueError, match=r"scores image embeddings \(B, 5\), got \(2, 4\)"):
        reward.score(image[:, :-1], text)
    with pytest.raises(ValueError, match="compares images with text"):
        reward.score(image)
    with pytest.raises(ValueError, match=r"text embeddings \(2, 4\), expected \(B, 5\)"):
        reward.score(image, text[:, :-1])
    with pytest.raises(ValueError, match="reads no text"):
        WeightedReward({"a": FakeReward(uses_text=False)}).encode_text(["1,0,0,0"])
    for cut in (
        lambda: reward.tail(1),
        lambda: reward.prefixes(image, (1,)),
        lambda: reward.class_tokens(image, (1,)),
        lambda: reward.probe(image, (1,)),
    ):
        with pytest.raises(ValueError, match="cannot be cut and stitched"):
            cut()
