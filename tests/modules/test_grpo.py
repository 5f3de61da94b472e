"""Flow-GRPO as a module: by hand, against closed forms, ratios that are exactly 1, whatever the number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stitchvm.data.prompts import Prompts
from stitchvm.modules.grpo import FlowGRPO
from stitchvm.values.terms import Scored
from stitchvm.values.tweedie import TweedieFactory
from tests.modules import alignment_runs as runs
from tests.modules.alignment_worlds import (
    PROMPTS,
    SLOPE,
    gaussian,
    in_a_world,
    linear,
    mean_image,
    rows,
    run,
    two_ranks,
)


@pytest.fixture(scope="module")
def make(tiny_sd3, tiny_clip):
    """Builds a module on the tiny SD3 and CLIP."""

    def made(**changes) -> FlowGRPO:
        settings = {
            "group_size": 4,
            "num_steps": 5,
            "window": 2,
            "bounds": [0, 4],
            "micro_batch": 3,
            "lr": 1e-2,
        } | changes
        return FlowGRPO(
            generator=settings.pop("generator", runs.generator(tiny_sd3)),
            reward=settings.pop("reward", runs.reward(tiny_clip)),
            policy=settings.pop("policy", runs.policy()),
            **settings,
        )

    return made


def moved(module: FlowGRPO) -> FlowGRPO:
    """Builds a module and moves its policy, as after some training."""
    module.configure_model()
    shake(module)
    return module


def shake(module: FlowGRPO, size: float = 0.05) -> None:
    with torch.no_grad():
        for p in module.policy.parameters().values():
            p.add_(size * torch.randn(p.shape))


# By hand.


def test_a_roll_out_by_hand(make):
    """Euler steps, then two of CPS with their log-probabilities, then Euler steps; rewards and advantages."""
    module = moved(make(micro_batch=None, num_steps=4, bounds=[1, 3], noise_level=0.8))
    some = rows(runs.PROMPTS[:2], 4)
    rolled = module.rollout(some)
    assert rolled.window == range(1, 3)
    velocity, cond = module.generator.velocity, module.generator.encode_prompts(some.prompts)
    s = [1.0, 0.9, 0.75, 0.5, 0.0]  # 3x/(1 + 2x) at x = 1, 3/4, 1/2, 1/4
    torch.testing.assert_close(module.sigmas, torch.tensor(s))
    z = some.normal("z_1", (4, 8, 8))
    with torch.no_grad():
        for k in range(4):
            u = velocity(z, torch.full((8,), s[k]), cond, guidance_scale=1.0)
            if k in (0, 3):
                z = z + (s[k + 1] - s[k]) * u
                continue
            torch.testing.assert_close(rolled.z[:, k - 1], z, rtol=1e-3, atol=1e-4)
            std = s[k + 1] * math.sin(0.8 * math.pi / 2)
            clean, noise = z - s[k] * u, z + (1 - s[k]) * u
            mean = (1 - s[k + 1]) * clean + (s[k + 1] ** 2 - std**2) ** 0.5 * noise
            z = mean + std * some.normal("step", (4, 8, 8), k)
            log_prob = -((z - mean) ** 2).flatten(1).mean(1)
            torch.testing.assert_close(rolled.log_prob[:, k - 1], log_prob, rtol=1e-4, atol=1e-5)
        reward = module._built.value.reward
        text = reward.encode_text(list(some.prompts))
        R = reward.score(reward.embed(module.generator.vae.decode(z)).image, text).double()
    A = torch.cat([x - x.mean() for x in R.split(4)]) / (R.std(correction=0) + 1e-4)
    torch.testing.assert_close(rolled.advantages, A.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_the_loss_by_hand(make, kind):
    """The policy has moved since the roll-out: ratio, clip and the divergence from the frozen model."""
    module = moved(make(micro_batch=None, kind=kind, noise_level=0.6, kl=0.3, ratio_clip=1e-3))
    some = rows(runs.PROMPTS[:2], 4)
    rolled, cond = module.rollout(some), module.conditions(some)
    shake(module, 0.02)
    found = module.losses(some, cond, rolled, 1)
    k, sigmas = rolled.window[1], module.sigmas.tolist()
    s, s_next = sigmas[k], sigmas[k + 1]
    z, z_next = rolled.z[:, 1], rolled.z[:, 2]

    def mean_of(u: Tensor) -> Tensor:
        if kind == "cps":
            std = s_next * math.sin(0.6 * math.pi / 2)
            noise = z + (1 - s) * u
            return (1 - s_next) * (z - s * u) + (s_next**2 - std**2) ** 0.5 * noise
        std, dt = 0.6 * (s / (1 - s)) ** 0.5, s_next - s
        return z * (1 + std**2 / (2 * s) * dt) + u * (1 + std**2 * (1 - s) / (2 * s)) * dt

    with torch.no_grad(), module.policy.off():
        reference = mean_of(module.velocity(z, module.sigmas[k], cond))
    mean = mean_of(module.velocity(z, module.sigmas[k], cond))
    std = s_next * math.sin(0.6 * math.pi / 2) if kind == "cps" else 0.6 * (s / (1 - s)) ** 0.5
    log_prob = -((z_next - mean) ** 2).flatten(1).mean(1)
    if kind == "sde":
        scale = std * (s - s_next) ** 0.5
        log_prob = log_prob / (2 * scale**2) - math.log(scale) - 0.5 * math.log(2 * math.pi)
    ratio = (log_prob - rolled.log_prob[:, 1]).exp()
    A = rolled.advantages
    loss = torch.maximum(-A * ratio, -A * ratio.clamp(0.999, 1.001))
    loss = loss + 0.3 * ((mean - reference) ** 2).flatten(1).mean(1) / (2 * std**2)
    assert (ratio - 1).abs().max() > 1e-3 and k > 0
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=1e-4)
    weights = list(module.policy.parameters().values())
    expected = torch.autograd.grad(loss.sum(), weights)
    for a, b in zip(torch.autograd.grad(found.sum(), weights), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_every_step_that_may_be_trained_has_noise(make):
    """Up to the last with "sde", up to the last but one with "cps": a divergence is finite at each."""
    for kind, high in (("sde", 5), ("cps", 4)):
        module = moved(make(kind=kind, bounds=[high - 2, high], kl=0.3, noise_level=0.6))
        _, losses, gradient = run(module, rows(runs.PROMPTS[:1], 4))
        assert all(map(math.isfinite, losses))
        assert all(g.isfinite().all() for g in gradient.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind, inner_steps", [("sde", 1), ("cps", 2)])
def test_before_the_first_step_the_ratio_is_exactly_one(make, tiny_sd3, kind, inner_steps, dtype):
    """log p of the loss equals that of the roll-out bit for bit, and the loss is −A."""
    generator = runs.generator(tiny_sd3, dtype=dtype)
    module = moved(make(kind=kind, inner_steps=inner_steps, generator=generator))
    some = rows(runs.PROMPTS[:3], 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        rolled, losses, _ = run(module, some)
    assert rolled.z.dtype == rolled.log_prob.dtype == torch.float32
    assert torch.cat(module._notes["ratio"]).eq(1).all()
    assert torch.cat(module._notes["ratio_deviation"]).eq(0).all()
    assert torch.cat(module._notes["clip_fraction"]).eq(0).all()
    assert len(torch.cat(module._notes["ratio"])) == 12 * 2
    parts = module._micro_batches(some)
    expected = [
        -float(rolled.advantages[part.positions].sum()) * inner_steps / 12 / 2
        for part in parts
        for _ in rolled.window
    ]
    assert losses == pytest.approx(expected, abs=1e-6) and max(map(abs, losses)) > 1e-2


def test_an_update_with_two_steps_clips_in_the_second(tmp_path):
    """The first step trains on policy, the second on samples of the policy before it."""

    class Watched(FlowGRPO):
        def losses(self, some, cond, rolled, w):
            before = len(self._notes["ratio"])
            found = super().losses(some, cond, rolled, w)
            step = self.trainer.global_step
            ratios.setdefault(step, []).extend(self._notes["ratio"][before].tolist())
            images.setdefault(step, set()).update(zip(some.index, some.number, strict=True))
            return found

    ratios: dict[int, list[float]] = {}
    images: dict[int, set] = {}
    module = in_a_world(
        Watched, gaussian(), 4, inner_steps=2, window=2, bounds=[0, 3], group_size=2, lr=0.02
    )
    trainer = runs.fit(module, tmp_path, max_steps=4, max_epochs=-1)
    assert trainer.global_step == 4
    for first in (0, 2):
        assert set(ratios[first]) == {1.0}
        assert max(abs(x - 1) for x in ratios[first + 1]) > 1e-4
        assert len(images[first]) == len(images[first + 1]) == 4
        assert not images[first] & images[first + 1]


# Against closed forms.


@pytest.mark.parametrize(
    "kind, noise_level, stop", [("sde", 0.7, None), ("cps", 0.8, None), ("sde", 0.7, [6, 6])]
)
def test_the_gradient_is_that_of_the_expected_value(kind, noise_level, stop):
    """In a Gaussian world E[V] is a function of the mean path, whose gradient autograd knows.

    The module's is −∇E[V]/(Z·W·D) for "sde", whose log p is a mean over D entries; "cps" drops 1/(2s²) from it.
    """
    module = in_a_world(
        FlowGRPO, gaussian(), 10, group_size=1500, stop=stop, kind=kind, noise_level=noise_level
    )
    rolled, _, grads = run(module, rows(PROMPTS, 1500))
    Z = float(module._notes["reward_std"][0])
    window, end = rolled.window, 10 if stop is None else stop[0]
    z = module.walk(torch.zeros(1, 2, 1, 1), None, 0, window.start)
    for k in window:
        z = module._transition(z, None, k).mean
    z = module.walk(z, None, window.stop, end)
    shift = module.policy.parameters()["shift"]
    V = gaussian().value(z, float(module.sigmas[end]), linear())
    (expected,) = torch.autograd.grad(V.sum(), shift)
    found = torch.zeros(2)
    for k in window:
        std = float(module.sigmas[k + 1]) * math.sin(noise_level * math.pi / 2)
        scale = 1.0 if kind == "sde" else 2 * std**2
        found -= grads["shift"][k].flatten() * Z * 3 * 2 / scale
    expected = expected[window.start : window.stop].sum(0).flatten()
    assert expected.norm() > 0.1
    assert (found - expected).norm() < 0.15 * expected.norm()


def test_the_policy_moves_towards_the_tilted_world(tmp_path):
    world = gaussian()
    module = in_a_world(FlowGRPO, world, 8, group_size=24, lr=0.02, bounds=[0, 4])
    before = mean_image(module)
    runs.fit(
        module,
        tmp_path,
        max_steps=25,
        data=Prompts(prompts=PROMPTS, prompts_per_update=4),
        max_epochs=-1,
    )
    step = (mean_image(module) - before).flatten()
    direction = (world.tilt(linear()).means - world.means).flatten().float()
    assert step @ SLOPE.flatten() > 0.2
    assert torch.cosine_similarity(step, direction, dim=0) > 0.95


# Ranks, windows, values.


def test_two_ranks_are_one(make, monkeypatch):
    """Two ranks with two prompts each: the groups of one with four, and its gradient as the mean of theirs."""
    prompts = runs.PROMPTS[:4]
    torch.manual_seed(3)
    module = moved(make(kl=0.1))
    whole, _, expected = run(module, rows(prompts, 4))
    found = two_ranks(module, prompts, 4, monkeypatch)
    for rank, (rolled, _) in enumerate(found):
        assert rolled.window == whole.window
        torch.testing.assert_close(
            rolled.advantages, whole.advantages[8 * rank : 8 * rank + 8], rtol=1e-2, atol=1e-2
        )
    for key, gradient in expected.items():
        torch.testing.assert_close(
            (found[0][1][key] + found[1][1][key]) / 2, gradient, rtol=1e-2, atol=1e-3
        )


def test_windows():
    """Fast: inside of its bounds, another for other updates, one for all images; plain: all steps but the last."""
    module = in_a_world(FlowGRPO, gaussian(), 6, window=2, bounds=[0, 4], group_size=2)
    starts = {module.rollout(rows(["a"], 2, update)).window.start for update in range(12)}
    assert starts == {0, 1, 2}
    plain = in_a_world(FlowGRPO, gaussian(), 6, window=None, group_size=2)
    rolled = plain.rollout(rows(["a"], 2))
    assert rolled.window == range(5) and rolled.z.shape == (2, 6, 2, 1, 1)


def test_a_value_at_a_stop_never_sees_lora(make, tiny_sd3, tiny_clip):
    from stitchvm.values.parts import Parts

    tweedie = TweedieFactory(velocity="prompt")
    module = moved(make(num_steps=4, stop=[3, 3], bounds=[0, 3], value=tweedie))
    some = rows(runs.PROMPTS[:2], 4)
    rolled = module.rollout(some)
    assert float(module._notes["tau"][0]) == 0.5
    reward, generator = runs.reward(tiny_clip)(), runs.generator(tiny_sd3)()
    value = tweedie(Parts(lambda: reward, lambda: generator)).bind(list(some.prompts))
    with torch.no_grad():
        z = module.walk(rolled.z[:, -1], module.conditions(some), rolled.window.stop, 3)
        clean = value(z, torch.full((8,), 0.5))
    torch.testing.assert_close(torch.cat(module._notes["reward"]), clean, rtol=1e-3, atol=1e-3)


def test_what_is_logged(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    module = in_a_world(FlowGRPO, gaussian(), 4, window=2, bounds=[0, 3], group_size=2, kl=0.1)
    runs.fit(module, tmp_path, max_steps=1, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = {"reward", "reward_std", "group_std", "zero_spread", "advantage_std", "adv_clipped"}
    names |= {"ratio", "ratio_deviation", "clip_fraction", "clip_fraction_high", "kl", "loss"}
    names |= {"clip_fraction_low", "approx_kl", "window_start", "grad_norm", "distance_ema"}
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])


# What cannot be.


def test_a_reward_that_is_not_finite_skips_the_update(tmp_path):
    class Broken(FlowGRPO):
        def scored(self, some, z, tau, name="reward"):
            found = super().scored(some, z, tau, name)
            return Scored(found.value * math.nan) if self.update == 0 else found

    module = in_a_world(Broken, gaussian(), 4, window=2, bounds=[0, 3], group_size=2)
    start = module.policy.state()
    assert runs.fit(module, tmp_path, max_steps=1, max_epochs=-1).global_step == 1
    assert module.skipped == 1
    assert any(not torch.equal(start[k], x) for k, x in module.policy.state().items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group_size": 1}, "would always be 0"),
        ({"bounds": [0, 6]}, "window of 2 steps within"),
        ({"bounds": [3, 4]}, "window of 2 steps within"),
        ({"bounds": [3]}, r"expected \[low, high\]"),
        ({"stop": [3, 5]}, "schedule of 3 steps"),
        ({"bounds": [0, 5]}, "has no noise"),
        ({"stop": [2, 6], "bounds": [0, 2]}, "lies outside of a schedule of 5 steps"),
        ({"kind": "ddim"}, "cps"),
        ({"noise_level": 0.0}, "nothing to learn from"),
        ({"noise_level": 1.5}, "cps"),
        ({"ratio_clip": 0.0}, "ratio_clip"),
        ({"inner_steps": 0}, "inner_steps = 0"),
        ({"std": "batch"}, "global"),
    ],
)
def test_settings_that_cannot_be(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_terminal_reward_before_the_end(make):
    with pytest.raises(ValueError, match="a terminal reward is not defined"):
        make(stop=[4, 4]).configure_model()
