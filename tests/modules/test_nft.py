"""DiffusionNFT as a module: by hand, against closed forms, whatever the number of ranks and micro-batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from stitchvm.adapters.full import PolicyWeights
from stitchvm.data.prompts import Prompts
from stitchvm.modules.nft import DiffusionNFT
from stitchvm.objectives.nft import nft_loss, velocity_nft_loss
from stitchvm.path import FlowPath
from stitchvm.values.terminal import TerminalFactory
from stitchvm.values.tweedie import TweedieFactory
from tests.modules import alignment_runs as runs
from tests.modules.alignment_worlds import (
    PROMPTS,
    SLOPE,
    ExactFactory,
    FieldGenerator,
    gaussian,
    in_a_world,
    linear,
    mean_image,
    rows,
    run,
    two_ranks,
)
from tests.values.fakes import mixture


@pytest.fixture(scope="module")
def make(tiny_sd3, tiny_clip):
    """Builds a module on the tiny SD3 and CLIP."""

    def made(**changes) -> DiffusionNFT:
        settings = {"group_size": 4, "num_steps": 4, "micro_batch": 3, "lr": 1e-2} | changes
        return DiffusionNFT(
            generator=runs.generator(tiny_sd3),
            reward=settings.pop("reward", runs.reward(tiny_clip)),
            policy=settings.pop("policy", runs.policy()),
            **settings,
        )

    return made


def moved(module: DiffusionNFT) -> DiffusionNFT:
    """Builds a module and lets policy, old policy and average differ, as after some training."""
    module.configure_model()
    with torch.no_grad():
        for name in ("default", "old", "ema"):
            for p in module.policy.parameters(name).values():
                p.add_(0.05 * torch.randn(p.shape))
    return module


# By hand.


def test_loss_by_hand(make):
    """Roll-out, rewards, advantages and loss, written out for the first level of every image."""
    module = moved(make(micro_batch=None, num_steps=3, beta=0.3, lam=0.2, adv_clip=1.5))
    some = rows(runs.PROMPTS[:2], 4)
    rolled = module.rollout(some)
    policy, velocity = module.policy, module.generator.velocity
    cond = module.generator.encode_prompts(some.prompts)
    with torch.no_grad():
        z = some.normal("z_1", (4, 8, 8))
        sigmas = [1.0, 3 * (2 / 3) / (1 + 2 * (2 / 3)), 3 * (1 / 3) / (1 + 2 * (1 / 3)), 0.0]
        with policy.use("old"):
            for a, b in pairwise(sigmas):
                z = z + (b - a) * velocity(z, torch.full((8,), a), cond, guidance_scale=1.0)
        torch.testing.assert_close(rolled.z_tau, z, rtol=1e-3, atol=1e-4)
        z = rolled.z_tau
        reward = module._built.value.reward
        text = reward.encode_text(list(some.prompts))
        R = reward.score(reward.embed(module.generator.vae.decode(z)).image, text).double()
        A = torch.cat([x - x.mean() for x in R.split(4)]) / (R.std(correction=0) + 1e-4)
        r = 0.5 + 0.5 * (A / 1.5).clamp(-1, 1)
        torch.testing.assert_close(rolled.r, r.float(), rtol=1e-3, atol=1e-4)

    t = rolled.levels[:, 0]
    assert float(rolled.tau) == 0 and rolled.levels.shape == (8, 2)
    x = t[:, None, None, None]
    eps = some.normal("eps", (4, 8, 8), 0)
    z_t = (1 - x) * z + x * eps
    with torch.no_grad():
        with policy.use("old"):
            u_old = velocity(z_t, t, cond, guidance_scale=1.0)
        with policy.off():
            u_ref = velocity(z_t, t, cond, guidance_scale=1.0)
    u = velocity(z_t, t, cond, guidance_scale=1.0)
    plus, minus = 0.3 * u + 0.7 * u_old, 1.3 * u_old - 0.3 * u
    errors = [(z_t - x * v - z).flatten(1) for v in (plus, minus)]
    terms = [(e**2).mean(1) / e.abs().mean(1).detach() for e in errors]
    loss = 1.5 * (rolled.r * terms[0] + (1 - rolled.r) * terms[1]) / 0.3
    loss = loss + 0.2 * ((u - u_ref) ** 2).flatten(1).mean(1)
    weights = list(policy.parameters().values())
    expected = torch.autograd.grad(loss.sum(), weights)
    found = module.losses(some, cond, rolled, 0)
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found.sum(), weights), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert expected[0].abs().max() > 1e-3


@pytest.mark.parametrize("form", ["self_normalised", "velocity"])
def test_at_the_end_the_anchored_form_is_plain_nft_bit_for_bit(make, form):
    """A window that is the end, τ = 0: loss and LoRA gradients equal those of the plain objective."""
    module = moved(make(stop=[4, 4], form=form, lam=0.0, micro_batch=None))
    some = rows(runs.PROMPTS[:2], 4)
    rolled, cond = module.rollout(some), module.conditions(some)
    weights = list(module.policy.parameters().values())
    found = module.losses(some, cond, rolled, 1)
    gradients = torch.autograd.grad(found.sum(), weights)

    z_0, t, r = rolled.z_tau, rolled.levels[:, 1], rolled.r
    eps = some.normal("eps", (4, 8, 8), 1)
    z_t = FlowPath.interpolate(z_0, eps, t)
    with torch.no_grad(), module.policy.use("old"):
        u_old = module.velocity(z_t, t, cond)
    u = module.velocity(z_t, t, cond)
    if form == "velocity":
        plain = velocity_nft_loss(u, u_old, FlowPath.velocity_target(z_0, eps), r, beta=0.1)
    else:
        plain = nft_loss(u, u_old, z_t, z_0, t, r, beta=0.1)
    assert torch.equal(found, plain["loss"])
    for a, b in zip(gradients, torch.autograd.grad(plain["loss"].sum(), weights), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(make(stop=None).window.draw(0) + rolled.tau, torch.tensor(4.0))


def test_an_anchored_update_by_hand(make):
    """Stopped at τ: levels lie above it, z_t on the bridge, the error is that of the anchor (75–77)."""
    module = moved(make(stop=[2, 2], value=TweedieFactory(), lam=0.0, micro_batch=None))
    some = rows(runs.PROMPTS[:2], 4)
    rolled, cond = module.rollout(some), module.conditions(some)
    tau = float(rolled.tau)
    assert tau == float(module.sigmas[2]) == 0.75 and bool((rolled.levels > tau).all())
    t = rolled.levels[:, 0]
    x, eps = t[:, None, None, None], some.normal("eps", (4, 8, 8), 0)
    alpha = (1 - x) / (1 - tau)
    s = (x**2 - alpha**2 * tau**2).sqrt()
    z_t = alpha * rolled.z_tau + s * eps
    with torch.no_grad(), module.policy.use("old"):
        u_old = module.velocity(z_t, t, cond)
    u = module.velocity(z_t, t, cond).detach()
    s_ds = x + (1 - x) * (tau / (1 - tau)) ** 2
    errors = [
        ((1 - tau) / x * (s_ds * z_t - s**2 * v) - rolled.z_tau).flatten(1)
        for v in (0.1 * u + 0.9 * u_old, 1.1 * u_old - 0.1 * u)
    ]
    terms = [(e**2).mean(1) / e.abs().mean(1) for e in errors]
    expected = 5 * (rolled.r * terms[0] + (1 - rolled.r) * terms[1]) / 0.1
    torch.testing.assert_close(
        module.losses(some, cond, rolled, 0).detach(), expected, rtol=2e-3, atol=1e-4
    )


def test_weighted_velocity_is_the_velocity_form_times_the_variance(make):
    some = rows(runs.PROMPTS[:2], 4)
    found = {}
    for form in ("velocity", "weighted_velocity"):
        torch.manual_seed(1)
        module = moved(
            make(stop=[2, 2], form=form, value=TweedieFactory(), lam=0.0, micro_batch=None)
        )
        rolled = module.rollout(some)
        found[form] = module.losses(some, module.conditions(some), rolled, 0).detach()
    sigma = FlowPath.bridge(rolled.tau.expand(8), rolled.levels[:, 0]).sigma
    torch.testing.assert_close(found["weighted_velocity"], sigma**2 * found["velocity"])


def test_the_value_never_sees_lora(make, tiny_sd3, tiny_clip):
    """A Tweedie value asks the generator's own transformer: what it says is what the untouched generator says."""
    tweedie = TweedieFactory(velocity="prompt")
    module = moved(make(stop=[2, 3], value=tweedie))
    some = rows(runs.PROMPTS[:2], 4)
    rolled = module.rollout(some)
    reward, generator = runs.reward(tiny_clip)(), runs.generator(tiny_sd3)()
    from stitchvm.values.parts import Parts

    value = tweedie(Parts(lambda: reward, lambda: generator)).bind(list(some.prompts))
    with torch.no_grad():
        clean = value(rolled.z_tau, rolled.tau.expand(8))
    noted = torch.cat(module._notes["reward"])
    torch.testing.assert_close(noted, clean, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        seen = module._built.value.bind(list(some.prompts))(rolled.z_tau, rolled.tau.expand(8))
    assert (seen - clean).abs().max() > 1e-2, "the policy is too close to the frozen model to tell"


def test_micro_batches_change_nothing(make):
    """Three images at a time, or all: the same gradient up to rounding."""
    some = rows(runs.PROMPTS[:2], 4)
    gradients = []
    for micro_batch, rollout_batch in ((3, 5), (None, None)):
        torch.manual_seed(3)
        module = moved(make(micro_batch=micro_batch, rollout_batch=rollout_batch, num_steps=3))
        gradients.append(run(module, some)[2])
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-3, atol=1e-5)
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-3


def test_two_ranks_are_one(make, monkeypatch):
    """Two ranks with two prompts each: the groups of one with four, and its gradient as the mean of theirs."""
    prompts = runs.PROMPTS[:4]
    torch.manual_seed(3)
    module = moved(make(num_steps=3))
    whole, _, expected = run(module, rows(prompts, 4))
    found = two_ranks(module, prompts, 4, monkeypatch)
    for rank, (rolled, _) in enumerate(found):
        part = slice(8 * rank, 8 * rank + 8)
        torch.testing.assert_close(rolled.r, whole.r[part], rtol=1e-3, atol=1e-4)
        assert torch.equal(rolled.levels, whole.levels[part])
    for key, gradient in expected.items():
        torch.testing.assert_close(
            (found[0][1][key] + found[1][1][key]) / 2, gradient, rtol=2e-3, atol=1e-5
        )


# Against closed forms.


def covariance(world, t: float, n: int = 2000) -> Tensor:
    """Returns E over z_t of Cov(a·z_0, z_0 | z_t), with shape (2,)."""
    z_t = world.sample(n, torch.Generator().manual_seed(1), t)
    p, a = world.posterior(z_t, t), SLOPE.double().flatten()
    away = (p.means - p.mean()[:, None]).flatten(2)
    each = p.variances[..., None] * a + away * (away @ a)[..., None]
    return (p.log_weights.exp()[..., None] * each).sum(dim=1).mean(dim=0)


@pytest.mark.parametrize(
    "stop, fraction, form", [(None, 0.06, "velocity"), ([40, 40], 0.15, "weighted_velocity")]
)
def test_the_optimum_is_the_improvement_direction(stop, fraction, form):
    """In a mixture the minimiser of the velocity form is u_old + (1/β)·Cov(2r − 1, u* | z_t), for any τ.

    With A = (V − mean)/Z and (2r − 1) = A/5 that is −Cov(a·z_0, z_0 | z_t)/(5βZt): the velocity of the tilted world
    to first order. The loss is quadratic, so its gradient at u_old tells where the minimiser is. Summed up over
    fifths of the levels; next to τ, where the target explodes, with the weights σ̄².
    """
    world, beta = mixture(), 0.5
    module = in_a_world(
        DiffusionNFT,
        world,
        100,
        group_size=500,
        stop=stop,
        form=form,
        beta=beta,
        lam=0.0,
        fraction=fraction,
    )
    rolled, _, grads = run(module, rows(PROMPTS, 500))
    k = 100 if stop is None else stop[0]
    optimum = -grads["shift"][:k].flatten(1) * k / beta**2  # 2β²/D in front, D = 2 entries
    tau = float(rolled.tau)
    values = world.value(world.sample(20000, torch.Generator().manual_seed(2), tau), tau, linear())
    levels = module.sigmas[:k]
    expected = torch.stack([-covariance(world, t) / t for t in levels.tolist()])
    expected /= 5 * beta * values.std()
    if form == "weighted_velocity":
        expected *= FlowPath.bridge(rolled.tau.expand_as(levels), levels).sigma[:, None] ** 2
    found, expected = (x.unflatten(0, (5, -1)).mean(dim=1) for x in (optimum, expected))
    assert expected[0].norm() > 0.4
    # 12,000 draws: standard errors of 0.02
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("stop, form", [(None, "self_normalised"), ([4, 6], "self_normalised")])
def test_the_policy_moves_towards_the_tilted_world(tmp_path, stop, form):
    """In a Gaussian world the tilted mean lies along the reward's slope; so does where training goes."""
    world = gaussian()
    module = in_a_world(
        DiffusionNFT, world, 8, group_size=16, stop=stop, form=form, lam=0.0, lr=0.02, beta=1.0
    )
    before = mean_image(module)
    runs.fit(
        module,
        tmp_path,
        max_steps=20,
        data=Prompts(prompts=PROMPTS, prompts_per_update=4),
        max_epochs=-1,
    )
    step = (mean_image(module) - before).flatten()
    direction = (world.tilt(linear()).means - world.means).flatten().float()
    assert step @ SLOPE.flatten() > 0.2
    assert torch.cosine_similarity(step, direction, dim=0) > 0.97


def test_field_world_is_what_it_says():
    """The fakes: without a shift the field's roll-outs end in the world, and the value is the reward at τ = 0."""
    module = in_a_world(DiffusionNFT, gaussian(), 50, group_size=2, lam=0.0)
    assert isinstance(module.generator, FieldGenerator)
    assert torch.allclose(mean_image(module).flatten(), torch.tensor([0.5, 0.3]), atol=0.1)
    value = ExactFactory(gaussian(), linear())(None).bind(None)
    z = torch.randn(3, 2, 1, 1)
    found = value(z, torch.zeros(3))
    torch.testing.assert_close(found.float(), (z * SLOPE).sum((1, 2, 3)), atol=1e-4, rtol=1e-4)


# What cannot be.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group_size": 1}, "would always be 0"),
        ({"stop": [2, 5]}, "lies outside of a schedule of 4 steps"),
        ({"stop": [0, 2]}, "1 ≤ low ≤ high"),
        ({"stop": [2]}, r"expected \[low, high\]"),
        ({"form": "x0"}, "expected one of"),
        ({"beta": 0.0}, "expected beta > 0"),
        ({"fraction": 1.5}, "a fraction in"),
        ({"std": "batch"}, "global"),
        ({"normalise": "rank"}, "global"),
        ({"mode": "some"}, "mode"),
        ({"adv_clip": 0.0}, "adv_clip > 0"),
        ({"decay_type": 3}, "decay kind 3"),
        ({"inner_steps": 5}, "inner_steps = 5: expected 1 … 4"),
        ({"rollout_batch": 0}, "rollout_batch = 0"),
    ],
)
def test_settings_that_cannot_be(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_terminal_reward_before_the_end(make):
    with pytest.raises(ValueError, match="a terminal reward is not defined"):
        make(stop=[2, 4], value=TerminalFactory()).configure_model()


def test_full_fine_tuning_keeps_the_frozen_model_for_the_regulariser():
    """Every weight moved by 0.1: R = 0.01; without a weight for R no frozen model is in memory."""
    module = in_a_world(DiffusionNFT, gaussian(), 4, group_size=4, lam=0.5)
    with torch.no_grad():
        module.policy.parameters()["shift"].add_(0.1)
    run(module, rows(PROMPTS, 4))
    torch.testing.assert_close(
        torch.cat(module._notes["regulariser"]), torch.full((16 * 3,), 0.01), rtol=1e-4, atol=0
    )
    assert module.policy.copies == ("old", "ema", "base")
    assert in_a_world(DiffusionNFT, gaussian(), 4, lam=0.0).policy.copies == ("old", "ema")


def test_a_value_must_not_change_with_the_policy(make):
    with pytest.raises(ValueError, match="would change the value with the policy"):
        make(policy=PolicyWeights, lam=0.0, stop=[2, 3], value=TweedieFactory()).configure_model()
