"""Guidance against the exact tilted moments of a Gaussian, its scalings, and real Tweedie and stitched values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stitchvm.generator import Generator
from stitchvm.rewards.base import NotFiniteError, Reward
from stitchvm.samplers.base import Run, Sampler, Samples
from stitchvm.samplers.guidance import MODES, GuidedSampler, exact_coefficient, rms, unit
from stitchvm.samplers.plain import PlainSampler
from stitchvm.samplers.sde import NU, Kernel
from stitchvm.schedule import sigma_grid
from stitchvm.values.base import BoundValue, Prefixes, Value
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.tweedie import TweedieValue
from stitchvm.world.closed_form import GaussianWorld, KnownReward
from tests.samplers.fakes import ClosedFormGenerator, KnownValue

PROMPTS = ["a red circle", "a blue square left of the red circle"]
K, Y, M, S2 = (
    4.0,
    1.5,
    0.5,
    0.09,
)  # r = −2‖z − 1.5‖² on N(0.5, 0.09 I): tilted to N(0.7647, 0.0662 I)
THREE = ["ode", "linear_sde", "linear"]


def world() -> GaussianWorld:
    return GaussianWorld(torch.full((1, 2, 2), M), S2)


def reward() -> KnownReward:
    return KnownReward.quadratic(torch.full((1, 2, 2), Y).double(), k=K)


def guide(t: float, nu: float, kind: str = "soft", first: float = 0.0) -> tuple[float, float]:
    """Returns the affine drift (κ, c) of guidance on the Gaussian, with J, c and D written out."""
    v = (1 - t) ** 2 * S2 + t**2
    slope = (1 - t) * S2 / v  # J = dD/dz
    gain = -K / (1 + K * S2 * t**2 / v) if kind == "soft" else -K
    gain *= slope * exact_coefficient(first if t == 1 else t, nu)
    return gain * slope, gain * (M - slope * (1 - t) * M - Y)


def moments(sigmas: Tensor, nu: str, kind: str = "soft", coefficient: Any = None) -> tuple:
    """Returns mean and variance of the recursion; `coefficient` replaces ν in that of guidance."""
    kernel, steps = Kernel(nu), len(sigmas) - 1
    table = {float(sigmas[k]): kernel.nu_at(k, sigmas) for k in range(steps)}

    def affine(t: float) -> tuple[float, Tensor]:
        told = table[t] if coefficient is None else coefficient
        slope, offset = guide(t, told, kind, float(sigmas[1]))
        return slope, torch.tensor(offset).double()

    mean, variance = world().sampler_moments(sigmas, lambda t: table[t] ** 2, affine)
    return float(mean.mean()), variance


def sample(sampler: Sampler, n: int, kind: str = "soft") -> Tensor:
    value = KnownValue(world(), reward(), kind)
    return sampler(ClosedFormGenerator(world()), ["0"] * n, value, seeds=0).latents.double()


@pytest.mark.parametrize("nu", list(NU))
def test_moments_are_those_of_the_exact_recursion(nu: str) -> None:
    sampler = GuidedSampler(num_steps=12, nu=nu, grid="single")
    z = sample(sampler, 4000)
    mean, variance = moments(sigma_grid(12, shift=3.0, kind="single"), nu)
    assert float(z.mean()) == pytest.approx(mean, abs=4 * (variance / z.numel()) ** 0.5)
    assert float(z.var()) == pytest.approx(variance, rel=4 * (2 / z.numel()) ** 0.5)


@pytest.mark.parametrize("nu", THREE)
def test_the_exact_coefficient_leads_to_the_tilted_distribution(nu: str) -> None:
    tilted = world().tilt(reward())
    goal = float(tilted.means.mean()), float(tilted.variances)
    assert goal == pytest.approx((0.7647, 0.0662), abs=5e-5)
    mean, variance = moments(sigma_grid(8000, kind="linear"), nu)
    assert mean == pytest.approx(goal[0], abs=3e-4) and variance == pytest.approx(
        goal[1], abs=3e-4
    )
    z = sample(GuidedSampler(num_steps=250, nu=nu, grid="linear"), 500)
    assert float(z.mean()) == pytest.approx(goal[0], abs=0.004 + 4 * (goal[1] / z.numel()) ** 0.5)
    assert float(z.var()) == pytest.approx(goal[1], rel=0.03 + 4 * (2 / z.numel()) ** 0.5)


def test_without_half_nu_squared_it_would_not() -> None:
    # so the coefficient is pinned: this is what −t/(1 − t) alone gives
    mean, variance = moments(sigma_grid(8000, kind="linear"), "linear_sde", coefficient=0.0)
    assert (mean, variance) == pytest.approx((0.7355, 0.0674), abs=1e-4)
    z = sample(GuidedSampler(num_steps=100, grid="linear"), 1000)
    assert float(z.mean()) - mean > 5 * (variance / z.numel()) ** 0.5


def test_the_tweedie_gradient_goes_too_far() -> None:
    grid = sigma_grid(8000, kind="linear")
    means = [moments(grid, nu, "tweedie")[0] for nu in THREE]
    assert means == pytest.approx([0.8198, 0.8186, 0.8180], abs=1e-4)
    assert moments(grid, "ode", "tweedie")[1] == pytest.approx(0.0628, abs=1e-4)
    z = sample(GuidedSampler(num_steps=100, grid="linear"), 1000, "tweedie")
    assert float(z.mean()) == pytest.approx(0.8186, abs=0.01)


class Scaled:
    """A known value, times a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def bind(self, prompts: Any = None, *, generator: Any = None) -> BoundScaled:
        return BoundScaled(self.factor)


class BoundScaled(BoundValue):
    """`Scaled`, bound."""

    name = "scaled value"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, z_t: Tensor, t: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        return self.factor * world().soft_value(z_t.double(), t, reward())

    def select(self, index: Tensor) -> BoundScaled:
        return self


@pytest.mark.parametrize("mode", ["unit_norm", "abs_reward"])
@pytest.mark.parametrize("factor", [1e-25, 40.0])
def test_scalings_forget_the_scale_of_the_reward(mode: str, factor: float) -> None:
    sampler = GuidedSampler(0.05, mode, num_steps=5)
    generator = ClosedFormGenerator(world())
    one, other = (sampler(generator, ["0", "1"], Scaled(c)).latents for c in (1.0, factor))
    assert torch.allclose(one, other, atol=1e-5)
    plain = PlainSampler(num_steps=5, nu="linear_sde")(generator, ["0", "1"]).latents
    assert not torch.allclose(one, plain, atol=0.01)


def watch(sampler: Sampler, *args: Any, **kwargs: Any) -> tuple[list[Tensor], Samples]:
    """Returns the latents at every level, and the samples."""
    levels: list[Tensor] = []
    runs: list[Run] = []
    begin = sampler.begin

    def begins(run: Run) -> None:
        begin(run)
        runs.append(run)
        levels.append(run.z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "begin", begins)
        samples = sampler(*args, on_step=lambda record: levels.append(runs[0].z), **kwargs)
    return levels, samples


@pytest.mark.parametrize("mode", MODES)
def test_the_first_step_is_written_out_by_hand(sd3: Generator, clip: Reward, mode: str) -> None:
    value = TweedieValue(sd3, clip)
    settings: dict[str, Any] = {"num_steps": 4, "nu": "linear", "grid": "linear"}
    guided, samples = watch(GuidedSampler(0.3, mode, **settings), sd3, PROMPTS, value)
    plain, _ = watch(PlainSampler(**settings), sd3, PROMPTS)
    assert torch.equal(guided[0], plain[0])
    z, one = guided[0].clone().requires_grad_(), torch.ones(2)
    v = value.bind(PROMPTS)(z, one)
    (gradient,) = torch.autograd.grad(v.sum(), z)
    _, direction = sd3.velocity_parts(guided[0], one, sd3.encode_prompts(PROMPTS))
    v, norm = v.detach(), gradient.flatten(1).norm(dim=1)
    factor = {
        "exact": (0.75 / 0.25 + 1 / 2) * 0.3 * 0.25 * one,
        "raw": 0.3 * one,
        "unit_norm": 0.3 / norm,
        "abs_reward": 0.3 / v.abs(),
        "cfg_rms": 0.2 * 0.3 * 4.5 * rms(direction) / rms(gradient),
    }[mode]
    update = factor.reshape(2, 1, 1, 1) * gradient
    assert torch.allclose(guided[1] - plain[1], update, rtol=1e-3, atol=1e-5)
    assert update.abs().max() > 1e-3
    record = samples.records[0]
    assert record.step == 1 and record.sigma == 1 and record.values.shape == (2, 1)
    assert torch.allclose(record.values[:, 0], v, atol=1e-5)
    wanted = {
        "gradient_rms": rms(gradient),
        "update_rms": rms(update),
        # at t = 1 the score is −z: CFG moves the mean through u alone
        "cfg_rms": 0.25 * 4.5 * rms(direction),
    }
    wanted["update_to_cfg"] = wanted["update_rms"] / wanted["cfg_rms"]
    assert record.info.keys() == wanted.keys()
    for name, number in wanted.items():
        assert torch.allclose(record.info[name], number, rtol=1e-3), name


def test_cfg_moves_the_mean_by_what_the_record_says(sd3: Generator, clip: Reward) -> None:
    sampler = GuidedSampler(1e-9, "raw", num_steps=4, nu="linear", grid="linear")
    levels, samples = watch(sampler, sd3, PROMPTS[:1], TweedieValue(sd3, clip))
    sigmas, z, t = sigma_grid(4, kind="linear"), levels[1], torch.tensor([0.75])
    cond = sd3.encode_prompts(PROMPTS[:1])
    u, direction = sd3.velocity_parts(z, t, cond)
    with_cfg = sampler.kernel.mean(z, u, 1, sigmas)
    without = sampler.kernel.mean(z, u - 4.5 * direction, 1, sigmas)
    assert torch.allclose(rms(with_cfg - without), samples.records[1].info["cfg_rms"], rtol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "unit_norm"])
@pytest.mark.parametrize("estimator", ["tweedie", "stitched"])
def test_a_sample_does_not_depend_on_the_batch(
    sd3: Generator, clip: Reward, value_folder: Path, mode: str, estimator: str
) -> None:
    value: Value = TweedieValue(sd3, clip, velocity="cfg")
    if estimator == "stitched":
        value = StitchedValue.from_pretrained(value_folder, generator=sd3)
    sampler = GuidedSampler(0.3, mode, num_steps=3)
    three = [*PROMPTS, PROMPTS[0]]
    together = sampler(sd3, three, value, seeds=[5, 6, 5]).latents
    alone = sampler(sd3, PROMPTS[:1], value, seeds=[5]).latents
    assert torch.allclose(together[0], alone[0], atol=1e-4)
    assert torch.allclose(together[0], together[2], atol=1e-4)
    pieces = GuidedSampler(0.3, mode, num_steps=3, micro_batch=2)(
        sd3, three, value, seeds=[5, 6, 5]
    )
    assert torch.allclose(together, pieces.latents, atol=1e-4)
    plain = PlainSampler(num_steps=3, nu="linear_sde")(sd3, three, seeds=[5, 6, 5]).latents
    assert not torch.allclose(together, plain, atol=0.01)


@pytest.mark.parametrize("estimator", ["stitched", "null", "prompt", "cfg"])
def test_sharing_changes_the_work_and_not_the_samples(
    sd3: Generator, clip: Reward, value_folder: Path, estimator: str
) -> None:
    if estimator == "stitched":
        value: Value = StitchedValue.from_pretrained(value_folder, generator=sd3)
    else:
        value = TweedieValue(sd3, clip, velocity=estimator)
    first, last = sd3.transformer.transformer_blocks[0], sd3.transformer.transformer_blocks[-1]
    rows = {first: 0, last: 0}

    def count(block: Any, args: Any, kwargs: Any) -> None:
        rows[block] += len(kwargs["hidden_states"])

    hooks = [block.register_forward_pre_hook(count, with_kwargs=True) for block in rows]
    answers, work = [], []
    for share in (True, False):
        sampler = GuidedSampler(0.5, num_steps=3, share_prefix=share)
        answers.append(sampler(sd3, PROMPTS, value))
        work.append((rows[first], rows[last]))
        rows.update({first: 0, last: 0})
    for hook in hooks:
        hook.remove()
    assert torch.allclose(answers[0].latents, answers[1].latents, atol=1e-4)
    assert answers[0].calls["continued"] == 6 and answers[1].calls["continued"] == 0
    # rows through the first and the last block, for 3 steps of 2 samples
    wanted = {
        "stitched": [(12, 12), (18, 12)],
        "null": [(12, 12), (18, 18)],
        "prompt": [(12, 12), (18, 18)],
        "cfg": [(12, 12), (24, 24)],
    }
    assert work == wanted[estimator]
    if estimator == "cfg":  # the very calls that the sampler makes itself
        assert torch.equal(answers[0].latents, answers[1].latents)


def test_a_distilled_generator_takes_the_velocity_of_its_own_scale(
    flux: Generator, clip: Reward
) -> None:
    value = TweedieValue(flux, clip, velocity="cfg")
    answers = [
        GuidedSampler(0.5, num_steps=3, share_prefix=share)(
            flux, PROMPTS, value, latent_size=(8, 8)
        )
        for share in (True, False)
    ]
    assert answers[0].calls["continued"] == 6 and answers[1].calls["continued"] == 0
    assert torch.equal(answers[0].latents, answers[1].latents)
    assert "cfg_rms" not in answers[0].records[0].info
    for velocity in ("null", "prompt"):
        value = TweedieValue(flux, clip, velocity=velocity)
        samples = GuidedSampler(0.5, num_steps=2)(flux, PROMPTS, value, latent_size=(8, 8))
        assert samples.calls["continued"] == 0
    with pytest.raises(ValueError, match="one branch only"):
        GuidedSampler(mode="cfg_rms", num_steps=2)(flux, PROMPTS, value, latent_size=(8, 8))


def test_strength_zero_is_the_plain_sampler(sd3: Generator, value_folder: Path) -> None:
    value = StitchedValue.from_pretrained(value_folder, generator=sd3)
    plain = PlainSampler(num_steps=4, nu="linear_sde")(sd3, PROMPTS)
    for mode in MODES:
        samples = GuidedSampler(0.0, mode, num_steps=4)(sd3, PROMPTS, value)
        assert torch.equal(samples.latents, plain.latents)
    assert not torch.equal(GuidedSampler(num_steps=4)(sd3, PROMPTS, value).latents, plain.latents)


def test_guidance_acts_where_it_is_told_to() -> None:
    generator = ClosedFormGenerator(world())

    def acts(**settings: Any) -> list[int]:
        value = KnownValue(world(), reward())
        sampler = GuidedSampler(num_steps=10, grid="linear", **settings)
        records = sampler(generator, ["0"], value).records
        steps = [record.step - 1 for record in records if record.values is not None]
        assert [round(10 * level) for _, level in value.asked] == [10 - k for k in steps]
        return steps

    assert acts() == list(range(10))
    assert acts(window=(0.2, 0.8)) == [2, 3, 4, 5, 6, 7]
    assert acts(window=(0.2, 0.8), every=4) == [2, 6]
    assert acts(levels=(0.3, 0.75)) == [3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="none of the 10 steps"):
        acts(window=(0.0, 0.2), levels=(0.0, 0.5))


@pytest.mark.parametrize("shift", [1.32, 1.43])
def test_a_first_level_that_rounding_would_move_off_one(shift: float) -> None:
    """float32 makes 1.0000001 and 0.99999994 of it: no level, or a coefficient t/(1 − t) of 1.7e7."""
    generator, value = ClosedFormGenerator(world()), KnownValue(world(), reward())
    one, other = (
        GuidedSampler(num_steps=8, nu="paper", grid="single", shift=s)(generator, ["0"], value)
        for s in (shift, shift + 0.001)
    )
    assert torch.allclose(one.latents, other.latents, atol=0.01)


def test_zero_gradients_and_zero_rewards_move_nothing() -> None:
    x = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[3e-30, -4e-30]]])
    assert torch.allclose(unit(x), torch.tensor([[[0.6, 0.8]], [[0.0, 0.0]], [[0.6, -0.8]]]))
    generator = ClosedFormGenerator(world())
    plain = PlainSampler(num_steps=4, nu="linear_sde")(generator, ["0"]).latents
    for mode in ("unit_norm", "abs_reward"):
        samples = GuidedSampler(1.0, mode, num_steps=4)(generator, ["0"], Scaled(0.0))
        assert torch.equal(samples.latents, plain)


def test_a_reward_that_is_not_finite_is_named(sd3: Generator, clip: Reward) -> None:
    broken = copy.deepcopy(clip)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    value = TweedieValue(sd3, broken, velocity="cfg")
    message = r"step 1, σ = 1, TweedieValue of .* of the prompts \['a red circle'.*not finite"
    with pytest.raises(NotFiniteError, match=message):
        GuidedSampler(num_steps=2)(sd3, PROMPTS, value)


def test_errors_say_what_is_wrong(sd3: Generator) -> None:
    generator, value = ClosedFormGenerator(world()), KnownValue(world(), reward())
    value.differentiable = False
    with pytest.raises(ValueError, match="known value is not differentiable"):
        GuidedSampler(num_steps=2)(generator, ["0"], value)
    value.differentiable = True
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"gradient of known value, and torch\.inference_mode"),
    ):
        GuidedSampler(num_steps=2)(generator, ["0"], value)
    with pytest.raises(ValueError, match="asks a value, but none is configured"):
        GuidedSampler(num_steps=2)(generator, ["0"])
    with pytest.raises(
        ValueError, match=r"value is not finite at step 1, σ = 1, prompt '0\.5' \(scaled"
    ):
        GuidedSampler(num_steps=2)(generator, ["0.5"], Scaled(float("nan")))
    with pytest.raises(
        ValueError,
        match=r"latent is not finite at step 1, σ = 1, prompt '0' \(known value\): lower",
    ):
        GuidedSampler(1e39, "raw", num_steps=2)(generator, ["0"], value)
    with pytest.raises(ValueError, match="infinite at t = 1"):
        GuidedSampler(num_steps=1, nu="linear")(generator, ["0"], value)
    for settings, message in (
        ({"mode": "loud"}, "expected one of exact"),
        ({"strength": float("nan")}, "expected a finite number"),
        ({"window": (0.5, 0.5)}, r"window = \[0\.5, 0\.5\]"),
        ({"levels": (0.0, 2.0)}, r"levels = \[0\.0, 2\.0\]"),
        ({"every": 0}, "every = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GuidedSampler(**settings)
    with pytest.raises(ValueError, match="one branch only"):
        GuidedSampler(mode="cfg_rms", num_steps=2)(generator, ["0"], value)
