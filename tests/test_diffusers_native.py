"""Callbacks in diffusers' own pipelines, against the pipelines without them and against our own step loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.callbacks import MultiPipelineCallbacks
from torch import Tensor

from stitchvm.backbones.flux import unpack
from stitchvm.diffusers_native import FKCallback, GuidanceCallback
from stitchvm.generator import Generator
from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.samplers.guidance import GuidedSampler
from stitchvm.samplers.scheduler import sde_scheduler
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import BoundValue
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.terminal import TerminalValue
from tests.rewards.tiny import head_file

PROMPTS = ["a red circle", "a blue square left of the red circle"]


@pytest.fixture(scope="module", params=["sd3", "flux"])
def setup(
    request: pytest.FixtureRequest, tiny_clip: Path, tmp_path_factory: Any
) -> dict[str, Any]:
    """Returns a pipeline, a generator around it and a value on its transformer."""
    pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(f"tiny_{request.param}"))
    pipe.set_progress_bar_config(disable=True)
    generator = Generator.from_pipeline(pipe, guidance_scale=3.5, text_tokens=12)
    head = head_file(tmp_path_factory.mktemp("head") / "head.pth")
    reward = AestheticReward(model=f"local-dir:{tiny_clip}", head=str(head))
    torch.manual_seed(0)
    model = StitchedValueModel(generator.null_branch(), reward, (2, 1))
    torch.nn.init.normal_(model.stitch.F.weight, std=0.3)
    value = StitchedValue(model.eval().requires_grad_(False))
    return {"pipe": pipe, "generator": generator, "value": value, "family": request.param}


def run(setup: dict[str, Any], start: Tensor, callback: Any = None, **options: Any) -> Tensor:
    """Returns the pipeline's final latents (B, C, H, W) from a first latent, at 12 x 8."""
    pipe, flux = setup["pipe"], setup["family"] == "flux"
    if flux:
        start = FluxPipeline._pack_latents(start, len(start), 4, 12, 8)
    else:
        null = setup["generator"].null.repeat(2)
        options["negative_prompt_embeds"] = null.tokens
        options["negative_pooled_prompt_embeds"] = null.pooled
    if options.get("num_images_per_prompt", 1) > 1:
        options.pop("negative_prompt_embeds", None)
        options.pop("negative_pooled_prompt_embeds", None)
    latents = pipe(
        PROMPTS,
        latents=start.clone(),
        guidance_scale=3.5,
        height=24,
        width=16,
        max_sequence_length=12,
        output_type="latent",
        callback_on_step_end=callback,
        **{"num_inference_steps": 5, **options},
    ).images
    return unpack(latents, (6, 4)) if flux else latents


def size(setup: dict[str, Any]) -> dict[str, int]:
    return {"height": 24, "width": 16} if setup["family"] == "flux" else {}


def ours(setup: dict[str, Any], start: Tensor, **options: Any) -> Tensor:
    """Returns the latents of our sampler from the same first latent, the first step not guided."""
    sampler = GuidedSampler(
        num_steps=5, nu="ode", levels=(0.0, 0.999), share_prefix=False, **options
    )
    begin = sampler.begin

    def at_start(own: Any) -> None:
        own.z = start.clone()
        begin(own)

    sampler.begin = at_start  # type: ignore[method-assign]
    return sampler(setup["generator"], PROMPTS, setup["value"], latent_size=(12, 8)).latents


def test_strength_0_leaves_the_pipeline_alone(setup: dict[str, Any]) -> None:
    start = torch.randn(2, 4, 12, 8)
    callback = GuidanceCallback(setup["value"], PROMPTS, strength=0, **size(setup))
    assert torch.equal(run(setup, start, callback), run(setup, start))
    assert callback.records == []


@pytest.mark.parametrize(
    ("mode", "strength"), [("raw", 30.0), ("unit_norm", 0.7), ("abs_reward", 60.0), ("exact", 30)]
)
def test_it_is_the_guided_sampler(setup: dict[str, Any], mode: str, strength: float) -> None:
    start = torch.randn(2, 4, 12, 8)
    callback = GuidanceCallback(setup["value"], PROMPTS, strength, mode, **size(setup))
    latents = run(setup, start, callback)
    expected = ours(setup, start, mode=mode, strength=strength)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    plain = run(setup, start)
    assert (latents - plain).abs().max() > 0.05
    value, zero = setup["value"].bind(PROMPTS), torch.zeros(2)
    assert (value(latents, zero) > value(plain, zero)).all()
    levels = setup["pipe"].scheduler.sigmas
    assert [record.sigma for record in callback.records] == levels[1:-1].tolist()
    assert callback.records[0].values is not None and callback.records[0].values.shape == (2, 1)
    # a second run with the same callback starts anew
    assert torch.equal(run(setup, start, callback), latents)


def test_it_acts_where_it_is_told(setup: dict[str, Any]) -> None:
    start, options = torch.randn(2, 4, 12, 8), {"strength": 30.0, "mode": "raw"}
    window = {"window": (0.4, 0.8), "every": 2}
    callback = GuidanceCallback(setup["value"], PROMPTS, **options, **window, **size(setup))
    latents = run(setup, start, callback)
    assert [record.step for record in callback.records] == [3]
    expected = ours(setup, start, **options, **window)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def test_several_images_of_a_prompt_and_micro_batches(setup: dict[str, Any]) -> None:
    start = torch.randn(4, 4, 12, 8)
    callbacks = [
        GuidanceCallback(setup["value"], PROMPTS, 30.0, micro_batch=rows, **size(setup))
        for rows in (None, 3)
    ]
    several = [run(setup, start, one, num_images_per_prompt=2) for one in callbacks]
    torch.testing.assert_close(*several, rtol=1e-4, atol=1e-4)
    assert callbacks[0].records[0].values.shape == (2, 2)


class Depends(BoundValue):
    """A value for tests: +mean of the latent for the first prompt, −mean for others; keeps what it was shown."""

    name = "known"

    def __init__(self, prompts: list[str], shown: list[tuple[Tensor, float]]) -> None:
        self.prompts, self.shown = prompts, shown

    def __call__(self, z_t: Tensor, t: Tensor, prefixes: Any = None) -> Tensor:
        self.shown.append((z_t.detach().clone(), float(t[0])))
        sign = torch.tensor([1.0 if prompt == PROMPTS[0] else -1.0 for prompt in self.prompts])
        return sign * z_t.mean(dim=(1, 2, 3))

    def select(self, index: Tensor) -> Depends:
        return Depends([self.prompts[i] for i in index.tolist()], self.shown)


class DependsValue:
    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, float]] = []

    def bind(self, prompts: Any = None, *, generator: Any = None) -> Depends:
        return Depends(list(prompts), self.shown)


def test_the_value_sees_unpacked_latents_at_the_pipelines_levels(setup: dict[str, Any]) -> None:
    start, value = torch.randn(2, 4, 12, 8), DependsValue()
    after: list[Tensor] = []

    def spy(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        changed = callback(pipe, step, t, kwargs)
        after.append(changed["latents"])
        return changed

    callback = GuidanceCallback(value, PROMPTS, 10.0, **size(setup))
    run(setup, start, spy)
    levels = setup["pipe"].scheduler.sigmas.tolist()
    assert [t for _, t in value.shown] == pytest.approx(levels[1:-1])
    for (z, _), latents in zip(value.shown, after[:-1], strict=True):
        expected = unpack(latents, (6, 4)) if setup["family"] == "flux" else latents
        assert torch.equal(z, expected)
    # the gradient of a mean is 1/384: ± 10/384 at each of four steps
    plain = run(setup, start)
    assert (after[-1].shape == plain.shape) == (setup["family"] == "sd3")


def test_low_precision_latents_keep_their_dtype(setup: dict[str, Any]) -> None:
    pipe, callback = setup["pipe"], GuidanceCallback(DependsValue(), PROMPTS, 1.0, **size(setup))
    packed = torch.randn(2, 4, 12, 8).bfloat16()
    if setup["family"] == "flux":
        packed = FluxPipeline._pack_latents(packed, 2, 4, 12, 8)
    pipe.scheduler.set_timesteps(3, mu=0.5) if setup["family"] == "flux" else (
        pipe.scheduler.set_timesteps(3)
    )
    assert callback(pipe, 0, None, {"latents": packed})["latents"] is packed
    changed = callback(pipe, 1, None, {"latents": packed})["latents"]
    assert changed.dtype == torch.bfloat16 and changed.shape == packed.shape


# Feynman–Kac steering.


@pytest.fixture
def noisy(setup: dict[str, Any]) -> Any:
    """Gives the pipeline steps of the SDE for one test."""
    pipe, before = setup["pipe"], setup["pipe"].scheduler
    pipe.scheduler = sde_scheduler(before, seed=4)
    yield setup
    pipe.scheduler = before


def fk(setup: dict[str, Any], value: Any, **options: Any) -> FKCallback:
    return FKCallback(
        value,
        PROMPTS,
        particles=3,
        **{"resample_every": 1, "resample_from": 1, "resample_to": 4, **size(setup), **options},
    )


def test_lambda_0_leaves_the_pipeline_alone(noisy: dict[str, Any]) -> None:
    start, several = torch.randn(6, 4, 12, 8), {"num_images_per_prompt": 3}
    callback = fk(noisy, noisy["value"], lam=0.0)
    latents = run(noisy, start, callback, **several)
    assert torch.equal(latents, run(noisy, start, **several))
    assert [record.step for record in callback.records] == [1, 2, 3, 4]
    assert callback.samples is not None
    final = noisy["value"].bind(PROMPTS).select(torch.tensor([0, 0, 0, 1, 1, 1]))
    v = final(latents, torch.zeros(6)).reshape(2, 3)
    torch.testing.assert_close(callback.samples.final_values, v)
    assert torch.equal(callback.samples.chosen, v.argmax(dim=1))
    images = list(range(6))
    assert callback.best(images) == [int(v[0].argmax()), 3 + int(v[1].argmax())]
    assert torch.equal(callback.samples.latents, latents[callback.best(images)])


def test_particles_are_resampled_by_the_value_of_their_own_prompt(noisy: dict[str, Any]) -> None:
    start, several = torch.randn(6, 4, 12, 8), {"num_images_per_prompt": 3}
    value = DependsValue()
    options = {"lam": 1e6, "lam_per": "value", "resample_from": 2, "resample_to": 2}
    states: list[Tensor] = []
    callback = fk(noisy, value, **options)

    def spy(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        states.append(kwargs["latents"].clone())
        changed = callback(pipe, step, t, kwargs)
        states.append(changed["latents"])
        return changed

    run(noisy, start, spy, **several)
    before, after = states[2], states[3]
    (seen, level), *_ = value.shown
    assert level == pytest.approx(float(noisy["pipe"].scheduler.sigmas[2]))
    means = seen.mean(dim=(1, 2, 3)).reshape(2, 3)
    best = [int(means[0].argmax()), 3 + int(means[1].argmin())]
    # with so large a λ the best particle of each prompt takes all places, bit for bit
    assert torch.equal(after, before[[best[0]] * 3 + [best[1]] * 3])
    assert torch.equal(
        callback.records[0].ancestors, torch.tensor([best[:1] * 3, [best[1] - 3] * 3])
    )
    final = run(noisy, start, callback, **several)
    assert not torch.equal(final[0], final[1])  # new noise tells them apart again


def test_steering_raises_the_value(noisy: dict[str, Any]) -> None:
    several = {"num_images_per_prompt": 3}
    value, start = noisy["value"], torch.randn(6, 4, 12, 8)
    row, zero = torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(6)
    steered = run(noisy, start, fk(noisy, value, lam=20.0), **several)
    plain = run(noisy, start, **several)
    v = [value.bind(PROMPTS).select(row)(z, zero).mean() for z in (steered, plain)]
    assert v[0] > v[1]


def test_both_callbacks_together(noisy: dict[str, Any]) -> None:
    start, several = torch.randn(6, 4, 12, 8), {"num_images_per_prompt": 3}
    guide = GuidanceCallback(noisy["value"], PROMPTS, 0.5, "unit_norm", **size(noisy))
    steer = fk(noisy, noisy["value"], lam=0.0)
    both = run(noisy, start, MultiPipelineCallbacks([guide, steer]), **several)
    assert torch.equal(both, run(noisy, start, guide, **several))
    assert [record.step for record in steer.records] == [1, 2, 3, 4]


def test_the_terminal_reward_may_choose(noisy: dict[str, Any]) -> None:
    terminal = TerminalValue(noisy["generator"].vae, noisy["value"].reward)
    callback = fk(noisy, noisy["value"], lam=1.0, final_value=terminal, final="best")
    latents = run(noisy, torch.randn(6, 4, 12, 8), callback, num_images_per_prompt=3)
    v = noisy["value"].reward(noisy["generator"].vae.decode(latents)).reshape(2, 3)
    assert callback.samples is not None
    torch.testing.assert_close(callback.samples.final_values, v)
    assert torch.equal(callback.samples.chosen, v.argmax(dim=1))


def test_an_ode_is_refused_and_diffusers_own_noise_is_not(setup: dict[str, Any]) -> None:
    pipe, before = setup["pipe"], setup["pipe"].scheduler
    start, several = torch.randn(6, 4, 12, 8), {"num_images_per_prompt": 3}
    with pytest.raises(ValueError, match="deterministic, so that resampled particles would stay"):
        run(setup, start, fk(setup, setup["value"]), **several)
    pipe.scheduler = sde_scheduler(before, nu="ode")
    with pytest.raises(ValueError, match="deterministic"):
        run(setup, start, fk(setup, setup["value"]), **several)
    stochastic = {"stochastic_sampling": True}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(before.config, **stochastic)
    callback = fk(setup, setup["value"], lam=1e6)
    assert run(setup, start, callback, **several).isfinite().all()
    guided = GuidanceCallback(setup["value"], PROMPTS, mode="exact", **size(setup))
    with pytest.raises(ValueError, match="stochastic_sampling draws others"):
        run(setup, torch.randn(2, 4, 12, 8), guided)
    pipe.scheduler = before


# The scheduler.


def test_without_noise_it_is_diffusers_scheduler(setup: dict[str, Any]) -> None:
    pipe, before, start = setup["pipe"], setup["pipe"].scheduler, torch.randn(2, 4, 12, 8)
    plain = run(setup, start)
    pipe.scheduler = sde_scheduler(before, nu="ode")
    assert torch.equal(run(setup, start), plain)
    assert (
        pipe.scheduler.config == before.config and type(before) is FlowMatchEulerDiscreteScheduler
    )
    pipe.scheduler = sde_scheduler(before, seed=1)
    noisy = run(setup, start)
    assert torch.equal(run(setup, start), noisy)
    assert (noisy - plain).abs().max() > 0.1
    pipe.scheduler = before


def test_a_step_is_the_kernels() -> None:
    scheduler = sde_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), "linear", scale=0.5)
    scheduler.set_timesteps(4)
    z, u = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    sigmas, random = scheduler.sigmas, torch.Generator().manual_seed(0)
    first = scheduler.step(u, scheduler.timesteps[0], z, generator=random).prev_sample
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    expected = scheduler.kernel.mean(z, u, 0, sigmas) + scheduler.kernel.std(0, sigmas) * noise
    assert torch.equal(first, expected)
    low = scheduler.step(u.bfloat16(), scheduler.timesteps[1], z, return_dict=False)[0]
    assert low.dtype == torch.bfloat16 and scheduler.step_index == 2


def test_without_noise_a_step_in_bfloat16_is_diffusers_own() -> None:
    before = FlowMatchEulerDiscreteScheduler(shift=3.0)
    after = sde_scheduler(before, nu="ode")
    z, u = torch.randn(2, 64, 64).bfloat16(), torch.randn(2, 64, 64).bfloat16()
    for scheduler in (before, after):
        scheduler.set_timesteps(7)
    for t in before.timesteps[:3]:
        a, b = (scheduler.step(u, t, z).prev_sample for scheduler in (before, after))
        assert torch.equal(a, b) and a.dtype == torch.bfloat16
    assert before.step_index == after.step_index == 3


def test_levels_are_read_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie on a GPU, which would be waited for at every step."""
    scheduler, read = sde_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)), []
    monkeypatch.setattr(
        "stitchvm.samplers.scheduler.check_levels", lambda x: read.append(x) or x.float()
    )
    for steps in (4, 6):
        scheduler.set_timesteps(steps)
        z = torch.zeros(1, 2, 2, 2)
        for t in scheduler.timesteps:
            z = scheduler.step(z, t, z).prev_sample
    assert [len(x) for x in read] == [5, 7]


def test_exact_guidance_knows_the_noise_of_the_schedulers_steps(noisy: dict[str, Any]) -> None:
    callback = GuidanceCallback(noisy["value"], PROMPTS, 30.0, "exact", **size(noisy))
    run(noisy, torch.randn(2, 4, 12, 8), callback)
    kernel, sigmas = noisy["pipe"].scheduler.kernel, noisy["pipe"].scheduler.sigmas
    for k, record in enumerate(callback.records, 1):
        t, dt = float(sigmas[k]), float(sigmas[k] - sigmas[k + 1])
        coefficient = 30 * dt * (t / (1 - t) + kernel.nu_at(k, sigmas) ** 2 / 2)
        ratio = record.info["update_rms"] / record.info["gradient_rms"]
        torch.testing.assert_close(ratio, torch.full_like(ratio, coefficient))


def test_bad_arguments(setup: dict[str, Any]) -> None:
    value, start = setup["value"], torch.randn(2, 4, 12, 8)
    with pytest.raises(ValueError, match="no prompts"):
        GuidanceCallback(value, [])
    with pytest.raises(ValueError, match="'cfg_rms' measures guidance by"):
        GuidanceCallback(value, PROMPTS, mode="cfg_rms")
    with pytest.raises(ValueError, match=r"\['nu', 'proposals'\] cannot be chosen"):
        FKCallback(value, PROMPTS, proposals=2, nu="linear")
    with pytest.raises(ValueError, match="2 latents, but the callback 3 prompts"):
        run(setup, start, GuidanceCallback(value, [*PROMPTS, "above"], **size(setup)))
    with pytest.raises(ValueError, match="at the first step only"):
        run(setup, start, GuidanceCallback(value, PROMPTS, window=(0, 0.2), **size(setup)))
    with pytest.raises(ValueError, match="pass it num_images_per_prompt=4"):
        run(setup, start, FKCallback(value, PROMPTS, **size(setup)))
    if setup["family"] == "flux":
        with pytest.raises(ValueError, match="height and width in pixels that the pipeline"):
            run(setup, start, GuidanceCallback(value, PROMPTS))
    with pytest.raises(
        ValueError, match=r"shows the callback \['prompt_embeds'\], but no latents"
    ):
        GuidanceCallback(value, PROMPTS)(setup["pipe"], 0, None, {"prompt_embeds": start})
    with pytest.raises(ValueError, match="3 images: expected the 8"):
        FKCallback(value, PROMPTS).best([1, 2, 3])
