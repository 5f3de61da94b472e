"""The step loop against diffusers' pipelines and exact moments; streams, micro-batches, the shared prefix."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from stitchvm.backbones.flux import unpack
from stitchvm.generator import Generator
from stitchvm.path import FlowPath
from stitchvm.samplers.base import Noise, Record
from stitchvm.samplers.field import Field
from stitchvm.samplers.plain import PlainSampler
from stitchvm.samplers.sde import NU, Kernel, check_levels
from stitchvm.schedule import sigma_grid
from stitchvm.values.stitched import StitchedValue
from stitchvm.world.closed_form import GaussianWorld
from tests.samplers.fakes import ClosedFormGenerator

PROMPTS = ["a red circle", "a blue square left of the red circle"]


def test_without_noise_it_is_the_sd3_pipeline(sd3: Generator, tiny_sd3: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipeline.set_progress_bar_config(disable=True)
    samples = PlainSampler(num_steps=5)(sd3, PROMPTS, seeds=[3, 7])
    again = PlainSampler(num_steps=5)(sd3, PROMPTS, seeds=[3, 7])
    assert torch.equal(samples.latents, again.latents)
    start = PlainSampler(num_steps=5)
    seen: list[torch.Tensor] = []
    start.begin = lambda run: seen.append(run.z)  # type: ignore[method-assign]
    start(sd3, PROMPTS, seeds=[3, 7])
    null = sd3.null.repeat(2)
    latents = pipeline(
        PROMPTS,
        negative_prompt_embeds=null.tokens,
        negative_pooled_prompt_embeds=null.pooled,
        num_inference_steps=5,
        guidance_scale=4.5,
        latents=seen[0].clone(),
        height=16,
        width=16,
        max_sequence_length=12,
        output_type="latent",
    ).images
    assert torch.equal(samples.latents, latents)


def test_without_noise_it_is_the_flux_pipeline(flux: Generator, tiny_flux: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    pipeline.set_progress_bar_config(disable=True)
    sampler, seen = PlainSampler(num_steps=4), []
    sampler.begin = lambda run: seen.append(run.z)  # type: ignore[method-assign]
    samples = sampler(flux, PROMPTS, seeds=0, latent_size=(12, 8))
    latents = pipeline(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=3.5,
        latents=FluxPipeline._pack_latents(seen[0], 2, 4, 12, 8),
        height=24,
        width=16,
        max_sequence_length=12,
        output_type="latent",
    ).images
    assert torch.equal(samples.latents, unpack(latents, (6, 4)))


@pytest.mark.parametrize("nu", list(NU))
def test_moments_are_those_of_the_exact_recursion(nu: str) -> None:
    world = GaussianWorld(torch.full((1, 2, 2), 0.5), 0.09)
    sampler = PlainSampler(num_steps=12, nu=nu, grid="single")
    n = 4000
    samples = sampler(ClosedFormGenerator(world), ["0"] * n, seeds=0).latents.double()
    sigmas = sigma_grid(12, shift=3.0, kind="single")
    table = {float(sigmas[k]): sampler.kernel.nu_at(k, sigmas) ** 2 for k in range(12)}
    mean, variance = world.sampler_moments(sigmas, lambda t: table[t])
    count = samples.numel()
    assert float(samples.mean() - mean.mean()) == pytest.approx(
        0, abs=4 * (variance / count) ** 0.5
    )
    assert float(samples.var()) == pytest.approx(variance, rel=4 * (2 / count) ** 0.5)


@pytest.mark.parametrize("nu", list(NU))
def test_many_steps_reach_the_data(nu: str) -> None:
    world = GaussianWorld(torch.full((1, 1, 1), 0.5), 0.09)
    for steps, tolerance in ((250, 0.012), (1000, 0.003)):
        sigmas = sigma_grid(steps, kind="linear")
        kernel = Kernel(nu)
        table = {float(sigmas[k]): kernel.nu_at(k, sigmas) ** 2 for k in range(steps)}
        mean, variance = world.sampler_moments(sigmas, lambda t, table=table: table[t])
        assert float(mean) == pytest.approx(0.5, abs=1e-6)
        assert variance == pytest.approx(0.09, abs=tolerance)


def test_the_kernel_is_written_out_by_hand() -> None:
    sigmas = torch.tensor([1.0, 0.6, 0.25, 0.0])
    z, u = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    kernel = Kernel("linear_sde", scale=0.5)
    nu = 0.5 * 3 * 0.36
    mean = z + (0.25 - 0.6) * (u - nu**2 / 2 * FlowPath.score(z, u, 0.6))
    assert torch.allclose(kernel.mean(z, u, 1, sigmas), mean, atol=1e-6)
    assert kernel.std(1, sigmas) == pytest.approx(nu * 0.35**0.5, rel=1e-5)
    assert kernel.std(2, sigmas) == 0 and Kernel(noise_last=True).std(2, sigmas) > 0
    assert Kernel("paper").nu_at(0, sigmas) == pytest.approx((4 * 0.6 / 0.4) ** 0.5, rel=1e-6)
    drift = torch.ones_like(z)
    moved = kernel.mean(z, u, 1, sigmas, drift) - kernel.mean(z, u, 1, sigmas)
    assert torch.allclose(moved, torch.full_like(z, -0.35), atol=1e-6)


def test_a_sample_depends_on_its_seed_alone(sd3: Generator) -> None:
    sampler = PlainSampler(num_steps=3, nu="linear_sde")
    together = sampler(sd3, [*PROMPTS, PROMPTS[0]], seeds=[5, 6, 5]).latents
    alone = sampler(sd3, [PROMPTS[0]], seeds=[5]).latents
    pieces = PlainSampler(num_steps=3, nu="linear_sde", micro_batch=2)
    parts = pieces(sd3, [*PROMPTS, PROMPTS[0]], seeds=[5, 6, 5]).latents
    assert torch.allclose(together[0], alone[0], atol=1e-4)
    assert torch.allclose(together[0], together[2], atol=1e-4)
    assert torch.allclose(together, parts, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_seeds_are_numbers_whatever_holds_them(sd3: Generator) -> None:
    def latents(seeds: Any) -> torch.Tensor:
        return PlainSampler(num_steps=1)(sd3, PROMPTS, seeds=seeds).latents

    for same in (3, np.int64(3), (3, 4), torch.tensor([3, 4]), np.array([3, 4])):
        assert torch.equal(latents(same), latents([3, 4]))
    with pytest.raises(TypeError, match="float"):
        latents([3.0, 4.0])


def test_noise_does_not_depend_on_the_default_dtype() -> None:
    def drawn() -> torch.Tensor:
        return Noise([3, 4], 2, (1, 2, 2), torch.device("cpu")).draw(3)

    before = drawn()
    torch.set_default_dtype(torch.bfloat16)  # as the precision bf16-true does in a step
    try:
        assert torch.equal(drawn(), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_null_branch_goes_on_from_the_values_prefix(
    sd3: Generator, value_folder: Path
) -> None:
    value = StitchedValue.from_pretrained(value_folder, generator=sd3)
    assert value.value_model.backbone.network is sd3.transformer
    bound = value.bind(PROMPTS)
    shared = Field(sd3, PROMPTS, None, bound, micro_batch=2)
    apart = Field(sd3, PROMPTS, None, bound, share_prefix=False)
    assert shared.depths == (2,) and not apart.shares
    z, t, row = torch.randn(4, 4, 8, 8), torch.tensor(0.6), torch.tensor([0, 0, 1, 1])
    v, gradient, prefix = shared.value_gradient(z, t, row)
    v_apart, gradient_apart, none = apart.value_gradient(z, t, row)
    assert none is None and prefix is not None
    assert torch.allclose(v, v_apart, atol=1e-5)
    assert torch.allclose(gradient, gradient_apart, atol=1e-5)
    assert gradient.abs().max() > 1e-4
    u, direction = shared.velocity(z, t, row, prefix)
    u_apart, direction_apart = apart.velocity(z, t, row)
    assert torch.allclose(u, u_apart, atol=1e-4)
    assert torch.allclose(direction, direction_apart, atol=1e-4)
    assert shared.calls == {"gradient": 4, "velocity": 4, "continued": 4}
    v, prefix = shared.value(z, t, row)
    flipped = prefix.select(torch.tensor([3, 2, 1, 0]))
    u_flipped, _ = shared.velocity(z.flip(0), t, row.flip(0), flipped)
    assert torch.allclose(u_flipped.flip(0), u, atol=1e-4)


def test_nothing_is_shared_where_it_would_be_wrong(
    sd3: Generator, value_folder: Path, tiny_sd3: Path
) -> None:
    value = StitchedValue.from_pretrained(value_folder)
    assert not Field(sd3, PROMPTS, None, value.bind(PROMPTS)).shares  # its own copy of the weights
    value = StitchedValue.from_pretrained(value_folder, generator=sd3)
    assert not Field(sd3, PROMPTS, 1.0, value.bind(PROMPTS)).shares  # no null branch at g = 1
    other = Generator(str(tiny_sd3), text_tokens=16, guidance_scale=4.5)
    value = StitchedValue.from_pretrained(value_folder, generator=other)
    assert value.value_model.backbone.network is other.transformer
    assert not Field(other, PROMPTS, None, value.bind(PROMPTS)).shares  # another null text


@pytest.mark.parametrize("shift", [1.32, 1.43])
def test_levels_that_rounding_has_moved_off_one(tiny_sd3: Path, shift: float) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipe.scheduler = own = type(pipe.scheduler)(shift=shift)
    generator = Generator.from_pipeline(pipe, text_tokens=12)
    assert float(own.sigmas[0]) != 1
    assert check_levels([*own.sigmas[[0, 500, 999]].tolist(), 0.0])[0] == 1
    assert (
        PlainSampler(num_steps=2, guidance_scale=1.0)(generator, PROMPTS).latents.isfinite().all()
    )


def test_errors_say_what_is_wrong(sd3: Generator) -> None:
    with pytest.raises(ValueError, match="are one text, 'a red circle': put it into a list"):
        PlainSampler()(sd3, PROMPTS[0])
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        PlainSampler()(sd3, PROMPTS, seeds=[1])
    with pytest.raises(ValueError, match="no prompts"):
        PlainSampler()(sd3, [])
    with pytest.raises(ValueError, match="expected one of ode"):
        PlainSampler(nu="brownian")
    with pytest.raises(ValueError, match="at least 1 step"):
        PlainSampler(num_steps=0)
    with pytest.raises(ValueError, match="strictly falling"):
        check_levels(torch.tensor([1.0, 0.5, 0.5, 0.0]))


def test_records_name_the_level_reached(sd3: Generator) -> None:
    seen: list[Record] = []
    samples = PlainSampler(num_steps=3)(sd3, PROMPTS[:1], on_step=seen.append)
    levels = sd3.sigmas(3, sd3.default_size)
    assert [r.step for r in seen] == [1, 2, 3]
    assert all(
        r.sigma == float(s) for r, (_, s) in zip(samples.records, pairwise(levels), strict=True)
    )
