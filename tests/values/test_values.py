"""Tweedie, Monte Carlo and terminal values against closed forms, and the rules of binding."""

from __future__ import annotations

import math

import pytest
import torch

from stitchvm.backbones.latent import LatentBackbone
from stitchvm.path import FlowPath
from stitchvm.randomness import keyed_generator
from stitchvm.rewards.base import Embedding
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import score_of_average
from stitchvm.values.monte_carlo import MonteCarloFactory, MonteCarloValue, posterior_step
from stitchvm.values.parts import Parts
from stitchvm.values.stitched import StitchedFactory, StitchedValue
from stitchvm.values.terminal import TerminalFactory, TerminalValue
from stitchvm.values.tweedie import BackboneVelocity, TweedieFactory, TweedieValue
from stitchvm.world.closed_form import GaussianWorld
from tests.values.fakes import (
    ClosedFormReward,
    FakeReward,
    IdentityVAE,
    WorldGenerator,
    known,
    mixture,
)


def generators(n: int) -> list[torch.Generator]:
    return [keyed_generator("test", i) for i in range(n)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tweedie_and_its_gradient_are_the_closed_form(checkpointing: bool) -> None:
    world, t = mixture(), torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    value = TweedieValue(
        WorldGenerator(world), ClosedFormReward(known()), checkpointing=checkpointing
    )
    z_t = world.sample(5).requires_grad_()
    v = value.bind()(z_t, t)
    exact = world.tweedie_value(z_t, t, known())
    assert v.shape == (5,)
    assert torch.allclose(v, exact, atol=1e-9)
    (gradient,) = torch.autograd.grad(v.sum(), z_t)
    (wanted,) = torch.autograd.grad(exact.sum(), z_t)
    assert torch.allclose(gradient, wanted, atol=1e-7)
    assert wanted.abs().max() > 0.1


def test_few_steps_have_little_bias() -> None:
    world, n = mixture(), 20_000
    for t in (0.3, 0.6, 1.0):
        z_t = world.sample(2, t=t)
        value = MonteCarloValue(
            WorldGenerator(world), ClosedFormReward(known()), rollouts=n, steps=10
        )
        v = value.bind(generator=torch.Generator().manual_seed(1))(z_t, torch.tensor([t]))
        exact, tweedie = world.value(z_t, t, known()), world.tweedie_value(z_t, t, known())
        stderr = (world.value_variance(z_t, t, known()) / n).sqrt()
        # without the extrapolation it is 20 to 30 % of the Jensen gap
        assert torch.all((v - exact).abs() < 4 * stderr + 0.13 * (exact - tweedie).abs())


@pytest.mark.parametrize("t", [0.3, 0.7, 1.0])
def test_monte_carlo_is_the_posterior_mean(t: float) -> None:
    world, n = mixture(), 20_000
    z_t = world.sample(2, t=t)
    value = MonteCarloValue(WorldGenerator(world), ClosedFormReward(known()), rollouts=n, steps=30)
    v = value.bind(generator=torch.Generator().manual_seed(1))(z_t, torch.tensor([t]))
    exact = world.value(z_t, t, known())
    tweedie = world.tweedie_value(z_t, t, known())
    stderr = (world.value_variance(z_t, t, known()) / n).sqrt()
    # what the steps' own bias may be, as a share of the Jensen gap
    assert torch.all((v - exact).abs() < 4 * stderr + 0.03 * (exact - tweedie).abs())
    assert torch.all((tweedie - exact).abs() > 0.2)


def test_monte_carlo_of_the_average_embedding_is_the_average_score() -> None:
    world = mixture()
    value = MonteCarloValue(WorldGenerator(world), ClosedFormReward(known()), rollouts=16, steps=4)
    z_t, t = world.sample(3, t=0.6), torch.full((3,), 0.6)
    through = value.score(value.embed(z_t, t, generator=generators(3)))
    direct = value.bind(generator=generators(3))(z_t, t)
    assert torch.allclose(through.double(), direct.double(), atol=1e-3)
    assert not torch.allclose(value.reward.score(value.embed(z_t, t)), through, atol=0.05)


def test_soft_value_is_log_mean_exp() -> None:
    world, t = mixture(), 0.6
    z_t = world.sample(2, t=t)
    value = MonteCarloValue(
        WorldGenerator(world),
        ClosedFormReward(known()),
        rollouts=20_000,
        steps=40,
        reduction="log_mean_exp",
    )
    v = value.bind(generator=torch.Generator().manual_seed(1))(z_t, torch.tensor([t]))
    assert torch.allclose(v.double(), world.soft_value(z_t, t, known()), atol=0.05)
    with pytest.raises(ValueError, match="log-mean-exp"):
        value.score(value.embed(z_t[:1], torch.tensor([t])))


def test_only_the_posterior_kind_has_the_posteriors_spread() -> None:
    world = GaussianWorld(torch.zeros(1, 1, 1), 1.0)
    z_t, t, n = torch.ones(1, 1, 1, 1).double(), torch.tensor([0.5]), 4000
    generator = WorldGenerator(world)
    exact = world.posterior(z_t, 0.5)
    value = MonteCarloValue(generator, FakeReward(channels=1), steps=50)
    z_0 = value.rollout(
        z_t.expand(n, 1, 1, 1), t.expand(n), None, torch.Generator().manual_seed(0)
    )
    assert z_0.mean() == pytest.approx(float(exact.mean()), abs=0.05)
    assert z_0.var() == pytest.approx(float(exact.variance()), rel=0.08)
    ode = MonteCarloValue(generator, FakeReward(channels=1), rollouts=1, steps=400, kind="ode")
    # the flow's map of N(0, v) to N(0, 1): one point, not the posterior's mean
    expected = 1 / math.sqrt(0.5**2 + 0.5**2)
    assert ode.rollout(z_t, t, None).item() == pytest.approx(expected, rel=0.01)
    assert abs(expected - float(exact.mean())) > 0.3


def test_a_posterior_step_keeps_the_joint_law_of_a_known_image() -> None:
    n, t, s = 100_000, torch.tensor([0.8]), torch.tensor([0.3])
    z_0 = torch.full((n, 1, 1, 1), 1.7)
    z_t = FlowPath.interpolate(z_0, torch.randn_like(z_0), t.expand(n))
    z_s = posterior_step(z_t, z_0, t.expand(n), s.expand(n), torch.randn_like(z_t))
    assert z_s.mean() == pytest.approx(0.7 * 1.7, abs=0.01)
    assert z_s.std() == pytest.approx(0.3, rel=0.01)
    bridge = FlowPath.bridge(0.3, 0.8)
    together = torch.stack([z_s.flatten(), z_t.flatten()]).cov()[0, 1]
    assert together == pytest.approx(float(bridge.alpha) * 0.3**2, rel=0.1)
    ends = posterior_step(
        z_t[:2], z_0[:2], torch.tensor([0.8, 0.0]), torch.zeros(2), torch.randn(2, 1, 1, 1)
    )
    assert torch.equal(ends[0], z_0[0]) and torch.equal(ends[1], z_t[1])


def test_rollouts_of_a_latent_do_not_depend_on_batches() -> None:
    world = mixture()
    z_t, t = world.sample(3, t=0.5), torch.tensor([0.5, 0.4, 0.9])

    def embed(batch_size: int | None, rows: slice) -> torch.Tensor:
        value = MonteCarloValue(
            WorldGenerator(world),
            ClosedFormReward(known()),
            rollouts=5,
            steps=4,
            batch_size=batch_size,
        )
        return value.embeddings(z_t[rows], t[rows], generator=generators(3)[rows])

    whole = embed(None, slice(0, 3))
    assert whole.shape == (5, 3, 2)
    with pytest.raises(ValueError, match="2 random generators for 3 latents"):
        value = MonteCarloValue(WorldGenerator(world), ClosedFormReward(known()))
        value.embeddings(z_t, t, generator=generators(2))
    assert whole[:, 0].std(dim=0).min() > 0
    assert torch.allclose(embed(2, slice(0, 3)), whole, atol=1e-7)
    assert torch.allclose(embed(4, slice(1, 2)), whole[:, 1:2], atol=1e-7)
    assert not torch.allclose(whole[:, 0], whole[:, 1], atol=1e-3)


def test_monte_carlo_is_differentiable() -> None:
    world = mixture()
    z_t, t = world.sample(2, t=0.4).requires_grad_(), torch.tensor([0.4])
    value = MonteCarloValue(
        WorldGenerator(world), ClosedFormReward(known()), rollouts=4000, steps=30
    )
    v = value.bind(generator=torch.Generator().manual_seed(0))(z_t, t)
    (gradient,) = torch.autograd.grad(v.sum(), z_t)
    (wanted,) = torch.autograd.grad(world.value(z_t, 0.4, known()).sum(), z_t)
    assert torch.allclose(gradient, wanted, atol=0.15)


@pytest.mark.parametrize("kind", ["tweedie", "monte_carlo"])
def test_prompts_reach_the_generator_only_if_asked_for(kind: str) -> None:
    world, reward = mixture(), ClosedFormReward(known())
    z_t, t, prompts = world.sample(2, t=0.5), torch.full((2,), 0.5), ["0.5", "-2"]

    def v(use_prompts: bool) -> torch.Tensor:
        if kind == "tweedie":
            velocity = "prompt" if use_prompts else "null"
            value = TweedieValue(WorldGenerator(world), reward, velocity=velocity)
        else:
            value = MonteCarloValue(
                WorldGenerator(world),
                reward,
                rollouts=6,
                steps=3,
                use_prompts=use_prompts,
                batch_size=5,
            )
        return value.bind(prompts, generator=generators(2))(z_t, t)

    told, untold = v(True), v(False)
    assert (told - untold).abs().min() > 0.1
    if kind == "tweedie":
        shift = torch.tensor([0.5, -2]).double().reshape(2, 1, 1, 1)
        clean = world.denoise(z_t - 0.5 * shift, 0.5) + shift
        assert torch.allclose(told, known()(clean), atol=1e-8)


def test_terminal_is_the_clean_reward_at_zero_only() -> None:
    value = TerminalValue(IdentityVAE(), ClosedFormReward(known()))
    z_0 = mixture().sample(4)
    assert torch.allclose(value.bind()(z_0, torch.zeros(4)), known()(z_0))
    with pytest.raises(ValueError, match=r"t = 0 only, but t = 0\.25"):
        value.bind()(z_0, torch.tensor([0, 0, 0.25, 0]))


def test_binding() -> None:
    reward = ClosedFormReward(known(), uses_text=True)
    value = TerminalValue(IdentityVAE(), reward)
    z_0, t = mixture().sample(3), torch.zeros(3)
    r = known()(z_0)
    assert torch.allclose(value.bind(["+", "-", "+"])(z_0, t), r * torch.tensor([1.0, -1, 1]))
    assert reward.encoded == ["+", "-"]
    assert torch.allclose(value.bind(["-"])(z_0, t), -r)
    with pytest.raises(ValueError, match=r"are one text, '\+': put it into a list"):
        value.bind("+")
    with pytest.raises(ValueError, match="bound to 2 prompts but was asked about 3 latents"):
        value.bind(["+", "-"])(z_0, t)
    with pytest.raises(ValueError, match="no prompts came"):
        value.bind()
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        value.bind(["+"])(z_0, torch.tensor([2.0]))
    with pytest.raises(ValueError, match="2 noise levels for 3 latents"):
        value.bind(["+"])(z_0, torch.zeros(2))


def test_score_of_average_is_the_average_score() -> None:
    for uses_text in (False, True):
        reward = FakeReward(uses_text=uses_text)
        each = torch.nn.functional.normalize(torch.randn(50, 3, 4), dim=-1)
        text = reward.encode_text(["1,0,2,0", "0,1,0,0", "1,1,1,1"]) if uses_text else None
        scores = torch.stack([reward.score(one, text) for one in each])
        average = score_of_average(reward, each.mean(dim=0), text)
        assert torch.allclose(average, scores.mean(dim=0), atol=1e-5)
    reward.affine = False
    with pytest.raises(ValueError, match="not affine"):
        score_of_average(reward, each[0], text)


def test_stitched_value_is_the_value_model(tmp_path) -> None:
    reward = FakeReward()
    model = StitchedValueModel(LatentBackbone(3), reward, (0, 1))
    z_t, t = torch.randn(2, 3, 4, 4, requires_grad=True), torch.tensor([0.3, 0.6])
    v = StitchedValue(model).bind(["1,0,0,0", "0,0,1,0"])(z_t, t)
    assert torch.equal(v, model.value(z_t, t, reward.encode_text(["1,0,0,0", "0,0,1,0"])))
    assert torch.autograd.grad(v.sum(), z_t)[0].abs().max() > 0

    folder = model.save_pretrained(tmp_path / "value_model")
    shared = Parts(reward=lambda: reward)
    loaded = StitchedFactory(str(folder))(shared)
    assert loaded.reward is reward
    assert torch.allclose(loaded.bind(["1,0,0,0"])(z_t, t)[0], v[0])
    assert not any(p.requires_grad for p in loaded.parameters())
    # without a configured reward the value model brings the run's
    alone = Parts()
    assert not alone.has("reward")
    assert StitchedFactory(str(folder))(alone).reward is alone.reward


def test_factories_share_parts_and_name_what_is_missing() -> None:
    built = []

    def generator() -> WorldGenerator:
        built.append("generator")
        return WorldGenerator(mixture())

    parts = Parts(reward=lambda: ClosedFormReward(known()), generator=generator)
    factories = [TweedieFactory(), MonteCarloFactory(rollouts=2), TerminalFactory()]
    values = [factory(parts) for factory in factories]
    assert built == ["generator"]
    assert values[0].generator is values[1].generator
    assert values[0].reward is values[2].reward and values[2].vae is values[0].generator.vae
    with pytest.raises(ValueError, match="needs a generator"):
        TweedieFactory()(Parts(reward=FakeReward))


def test_monte_carlo_refuses_impossible_settings() -> None:
    parts = (WorldGenerator(mixture()), FakeReward())
    for options, message in (
        ({"rollouts": 0}, "expected 1 or more"),
        ({"kind": "sde"}, "kind 'sde'"),
        ({"reduction": "max"}, "reduction 'max'"),
        ({"kind": "ode", "rollouts": 4}, "all the same"),
    ):
        with pytest.raises(ValueError, match=message):
            MonteCarloValue(*parts, **options)


def test_a_whole_backbone_is_a_generator_under_null_text() -> None:
    class Half:
        def prefix(self, z_t, t, depth):
            assert depth == 1
            return z_t

        def suffix(self, state):
            return 0.5 * state

    generator = BackboneVelocity(Half(), IdentityVAE())
    reward = ClosedFormReward(known())
    z_t = mixture().sample(2)
    v = TweedieValue(generator, reward).bind()(z_t, torch.tensor([0.4, 0.8]))
    clean = z_t * torch.tensor([0.8, 0.6]).double().reshape(2, 1, 1, 1)
    assert torch.allclose(v, known()(clean), atol=1e-6)
    with pytest.raises(ValueError, match="null text only"):
        generator.encode_prompts(["a red circle"])


def test_embedding_is_a_plain_tensor() -> None:
    value = TerminalValue(IdentityVAE(), FakeReward())
    image = value.embed(torch.rand(2, 3, 8, 8), torch.zeros(2))
    assert not isinstance(image, Embedding) and image.shape == (2, 4)
