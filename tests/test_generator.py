"""Tests of stitchvm/generator.py: the velocity is the pipelines' own."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from stitchvm.backbones.flux import unpack
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.backbones.text import Condition
from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward
from stitchvm.value_model import StitchedValueModel
from tests.tiny import flux_folder

PROMPTS = ["a red circle", "a blue square left of the red circle"]


@pytest.fixture(scope="module")
def sd3(tiny_sd3: Path) -> Generator:
    return Generator(str(tiny_sd3), text_tokens=12)


@pytest.fixture(scope="module")
def flux(tiny_flux: Path) -> Generator:
    return Generator(str(tiny_flux), text_tokens=12, guidance_scale=3.5)


def euler(
    generator: Generator, z_t: Tensor, sigmas: Tensor, cond: Condition, scale: float
) -> Tensor:
    """The ODE of Eq. (26) with ν = 0, in float32."""
    for sigma, following in pairwise(sigmas):
        u = generator.velocity(z_t, sigma.expand(len(z_t)), cond, guidance_scale=scale)
        z_t = z_t + (following - sigma) * u
    return z_t


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_euler_loop_reproduces_the_sd3_pipeline(
    sd3: Generator, tiny_sd3: Path, scale: float
) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipeline.set_progress_bar_config(disable=True)
    z_t = torch.randn(2, 4, 12, 8)
    # The pipeline encodes "" once for each prompt, which rounds otherwise than encoding it once.
    null = sd3.null.repeat(2)
    latents = pipeline(
        PROMPTS,
        negative_prompt_embeds=null.tokens,
        negative_pooled_prompt_embeds=null.pooled,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=z_t.clone(),
        height=24,
        width=16,
        max_sequence_length=12,
        output_type="latent",
    ).images
    with torch.no_grad():
        own = euler(sd3, z_t, pipeline.scheduler.sigmas, sd3.encode_prompts(PROMPTS), scale)
    assert torch.equal(own, latents)


@pytest.mark.parametrize("distilled", [True, False])
def test_euler_loop_reproduces_the_flux_pipeline(
    flux: Generator, tiny_flux: Path, distilled: bool, tmp_path: Path
) -> None:
    folder = tiny_flux if distilled else flux_folder(tmp_path, guidance_embeds=False)
    generator = flux if distilled else Generator(str(folder), text_tokens=12)
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 3.5} if distilled else {"true_cfg_scale": 3.5}
    options |= {} if distilled else {"negative_prompt": ["", ""]}
    z_t = torch.randn(2, 4, 12, 8)
    latents = pipeline(
        PROMPTS,
        num_inference_steps=4,
        latents=FluxPipeline._pack_latents(z_t, 2, 4, 12, 8),
        height=24,
        width=16,
        max_sequence_length=12,
        output_type="latent",
        **options,
    ).images
    with torch.no_grad():
        cond = generator.encode_prompts(PROMPTS)
        own = euler(generator, z_t, pipeline.scheduler.sigmas, cond, 3.5)
    assert torch.equal(own, unpack(latents, (6, 4)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_prompts_are_encoded_as_the_pipeline_does(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    options = {"prompt_2": PROMPTS, "max_sequence_length": 12}
    if family == "sd3":
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
        options |= {"prompt_3": PROMPTS, "do_classifier_free_guidance": False}
        tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, **options)
    else:
        pipeline = FluxPipeline.from_pretrained(folder)
        tokens, pooled, _ = pipeline.encode_prompt(PROMPTS, **options)
    cond = Generator(str(folder), text_tokens=12).encode_prompts(PROMPTS)
    assert torch.equal(cond.tokens, tokens)
    assert torch.equal(cond.pooled, pooled)


def test_prompts_are_kept_in_memory_and_on_disk(tiny_sd3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd3, folder)
    generator = Generator(str(folder), text_tokens=12, prompt_cache=str(tmp_path / "kept"))
    cond = generator.encode_prompts(PROMPTS)
    generator.free_text_encoders()
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        (folder / name / "model.safetensors").rename(folder / name / "away")
    again = generator.encode_prompts([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert torch.equal(again.tokens, cond.tokens[[1, 0, 1]])
    with pytest.raises(OSError, match=r"model\.safetensors"):
        generator.encode_prompts(["above"])
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        (folder / name / "away").rename(folder / name / "model.safetensors")
    other = Generator(str(folder), text_tokens=12, prompt_cache=str(tmp_path / "kept"))
    assert torch.equal(other.encode_prompts(PROMPTS).pooled, cond.pooled)
    assert not other._memory.encoders._loaded


def test_memory_is_bounded(tiny_sd3: Path) -> None:
    generator = Generator(str(tiny_sd3), text_tokens=4, prompts_in_memory=2)
    cond = generator.encode_prompts(["a", "of", "the"])
    assert len(cond) == 3
    assert list(generator._memory.kept) == ["of", "the"]


def test_prompts_encoded_ahead_do_not_depend_on_the_others(tiny_sd3: Path) -> None:
    one, many = (Generator(str(tiny_sd3), text_tokens=4, prompts_in_memory=1) for _ in range(2))
    one.encode_ahead(["a red circle"])
    many.encode_ahead(["a blue square", "a red circle", "of", "a red circle"])
    assert not one._memory.encoders._loaded and not many._memory.encoders._loaded
    conds = [generator.encode_prompts(["a red circle"]) for generator in (one, many)]
    assert torch.equal(conds[0].tokens, conds[1].tokens)
    assert torch.equal(conds[0].pooled, conds[1].pooled)
    assert len(many.encode_prompts(["of", "a blue square"])) == 2
    assert not many._memory.encoders._loaded, "all of them were kept"


@pytest.mark.parametrize("folder", ["tiny_sd3", "tiny_flux"])
def test_prompts_encoded_ahead_have_one_encoder_in_memory_at_a_time(
    folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(request.getfixturevalue(folder))
    generator = Generator(path, text_tokens=4)
    _ = generator.null
    encoders = generator._memory.encoders
    load, loaded = encoders._load, []

    def spy(name: str, **options: Any) -> Any:
        if name.startswith("text_encoder"):
            assert not encoders._loaded, f"{name} is loaded beside {list(encoders._loaded)}"
            loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(encoders, "_load", spy)
    generator.encode_ahead([*PROMPTS, PROMPTS[0]])
    assert loaded == encoders._names() and not encoders._loaded
    other = Generator(path, text_tokens=4)
    for prompt in PROMPTS:
        ahead, alone = generator._memory.kept[prompt], other.encode_prompts([prompt])
        assert torch.equal(ahead.tokens, alone.tokens)
        assert torch.equal(ahead.pooled, alone.pooled)


def test_velocity_takes_one_prompt_for_all_and_is_differentiable(sd3: Generator) -> None:
    z_t = torch.randn(2, 4, 8, 8, requires_grad=True)
    cond = sd3.encode_prompts(PROMPTS[:1])
    t = torch.tensor([0.2, 0.8])
    u = sd3.velocity(z_t, t, cond, guidance_scale=2.0)
    torch.testing.assert_close(u, sd3.velocity(z_t, t, cond.repeat(2), guidance_scale=2.0))
    u.sum().backward()
    assert z_t.grad is not None and z_t.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in sd3.parameters())


def test_low_precision_keeps_the_dtype_of_the_latents(tiny_sd3: Path) -> None:
    generator = Generator(str(tiny_sd3), dtype="bfloat16", text_tokens=4)
    z_t = torch.randn(1, 4, 8, 8)
    u = generator.velocity(z_t, torch.tensor([0.5]), generator.encode_prompts(["a"]))
    assert u.dtype == torch.float32
    assert torch.equal(u, u.bfloat16().float())


def test_sizes(sd3: Generator, flux: Generator) -> None:
    assert sd3.default_size == flux.default_size == (8, 8)
    assert (sd3.family, sd3.latent_channels, sd3.patch) == ("sd3", 4, 2)
    assert (flux.family, flux.latent_channels, flux.patch) == ("flux", 4, 2)


def test_guidance_branches_share_the_null_text_with_a_backbone(
    sd3: Generator, tiny_sd3: Path
) -> None:
    backbone = SD3Backbone(str(tiny_sd3), max_depth=1, dtype="float32", null_tokens=12)
    assert torch.equal(sd3.null.tokens, backbone.null_context)
    assert torch.equal(sd3.null.pooled, backbone.null_pooled)


# Around a pipeline that is in memory.


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_around_a_pipeline_it_is_the_loaded_generator(
    family: str, scale: float, request: pytest.FixtureRequest
) -> None:
    folder, loaded = (request.getfixturevalue(name) for name in (f"tiny_{family}", family))
    pipe = DiffusionPipeline.from_pretrained(folder)
    generator = Generator.from_pipeline(pipe, text_tokens=12)
    assert generator.transformer is pipe.transformer and generator.vae.network is pipe.vae
    assert (generator.id, generator.family, generator.text_tokens) == (str(folder), family, 12)
    assert generator.default_size == loaded.default_size
    z_t, t = torch.randn(2, 4, 12, 8), torch.tensor([0.3, 0.9])
    own, theirs = generator.encode_prompts(PROMPTS), loaded.encode_prompts(PROMPTS)
    assert torch.equal(own.tokens, theirs.tokens) and torch.equal(own.pooled, theirs.pooled)
    assert torch.equal(generator.null.tokens, loaded.null.tokens)
    u = generator.velocity(z_t, t, own, guidance_scale=scale)
    assert torch.equal(u, loaded.velocity(z_t, t, theirs, guidance_scale=scale))
    for steps, size in ((4, (12, 8)), (7, None)):
        assert torch.equal(generator.sigmas(steps, size), loaded.sigmas(steps, size))
    z_0 = torch.randn(1, 4, 8, 8)
    assert torch.equal(generator.vae.decode(z_0), loaded.vae.decode(z_0))


def test_around_a_pipeline_the_defaults_are_those_of_its_call(
    tiny_sd3: Path, tiny_flux: Path, tmp_path: Path
) -> None:
    folders = [tiny_sd3, tiny_flux, flux_folder(tmp_path, guidance_embeds=False)]
    pipes = [DiffusionPipeline.from_pretrained(folder) for folder in folders]
    generators = [Generator.from_pipeline(pipe) for pipe in pipes]
    assert [g.guidance_scale for g in generators] == [7.0, 3.5, 1.0]
    assert [g.text_tokens for g in generators] == [256, 512, 512]
    assert Generator.from_pipeline(pipes[0], guidance_scale=2.0).guidance_scale == 2


def test_around_a_pipeline_the_scheduler_is_as_it_was_set(tiny_sd3: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_sd3)
    generator = Generator.from_pipeline(pipe)
    before = generator.sigmas(4)
    pipe.scheduler.set_shift(1.0)  # leaves the configuration as it was
    assert not torch.equal(generator.sigmas(4), before)
    pipe.scheduler.set_timesteps(4)
    assert torch.equal(generator.sigmas(4), pipe.scheduler.sigmas)
    generator.sigmas(9)
    assert len(pipe.scheduler.sigmas) == 5  # it is not disturbed


def test_around_a_pipeline_its_dtype_and_text_encoders_are_used(tiny_sd3: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_sd3, torch_dtype=torch.bfloat16)
    generator = Generator.from_pipeline(pipe, text_tokens=12)
    assert generator.dtype == generator.vae.dtype == torch.bfloat16
    assert generator.encode_prompts(["a"]).tokens.dtype == torch.bfloat16
    pipe.text_encoder_2.text_projection.weight.data.mul_(2)
    options = {"prompt_2": ["red"], "prompt_3": ["red"], "do_classifier_free_guidance": False}
    pooled = pipe.encode_prompt(["red"], max_sequence_length=12, **options)[2]
    assert torch.equal(generator.encode_prompts(["red"]).pooled, pooled)
    generator.free_text_encoders()
    assert pipe.text_encoder is not None and len(generator.encode_prompts(["blue"])) == 1


def test_around_a_pipeline_adapters_stay_trainable(tiny_sd3: Path) -> None:
    from peft import LoraConfig

    pipe = DiffusionPipeline.from_pretrained(tiny_sd3)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    Generator.from_pipeline(pipe)
    left = [name for name, p in pipe.transformer.named_parameters() if p.requires_grad]
    assert left and all("lora_" in name for name in left)
    assert not any(p.requires_grad for p in pipe.vae.parameters())


def test_a_value_model_runs_on_the_pipelines_transformer(
    tiny_sd3: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    backbone = SD3Backbone(str(tiny_sd3), max_depth=2, dtype="float32", null_tokens=5)
    model = StitchedValueModel(backbone, reward, (2, 1))
    folder = model.save_pretrained(tmp_path / "value")
    pipe = DiffusionPipeline.from_pretrained(tiny_sd3)
    generator = Generator.from_pipeline(pipe, text_tokens=12)
    lent = generator.lend(StitchedValueModel.read(folder))  # with 5 tokens of null text, not 12
    assert lent is not None and lent.network is pipe.transformer
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    assert torch.equal(lent(z_t, t, 2), backbone(z_t, t, 2))


def test_pipelines_that_do_not_fit(tiny_sd3: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_sd3)
    euler, pipe.scheduler = pipe.scheduler, FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match=r"FlowMatchHeun.*expected a FlowMatchEuler"):
        Generator.from_pipeline(pipe)
    pipe.scheduler = euler
    pipe.vae._hf_hook = object()  # as accelerate's offloading leaves it
    with pytest.raises(ValueError, match="offloaded to the CPU by hooks"):
        Generator.from_pipeline(pipe)
    del pipe.vae._hf_hook
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="without text encoders"):
        Generator.from_pipeline(pipe).encode_prompts(["a"])
    with pytest.raises(ValueError, match="no prompts"):
        Generator.from_pipeline(pipe).encode_prompts([])
    pipe.transformer = torch.nn.Identity()
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline with a Identity came"):
        Generator.from_pipeline(pipe)


def test_bad_inputs(sd3: Generator, tiny_sd3: Path, tmp_path: Path) -> None:
    cond, t = sd3.encode_prompts(PROMPTS), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"expected \(B, 4, H, W\).*another model's VAE"):
        sd3.velocity(torch.randn(2, 16, 8, 8), t, cond)
    with pytest.raises(ValueError, match="image size divisible by 4"):
        sd3.velocity(torch.randn(2, 4, 8, 7), t, cond)
    with pytest.raises(ValueError, match=r"3 latents .* and 2 prompts.*cond.repeat"):
        sd3.velocity(torch.randn(3, 4, 8, 8), torch.rand(3), cond)
    with pytest.raises(ValueError, match="no prompts"):
        sd3.encode_prompts([])
    for encode in (sd3.encode_prompts, sd3.encode_ahead):
        with pytest.raises(ValueError, match="are one text, 'a red circle': put it into a list"):
            encode("a red circle")
    with pytest.raises(FileNotFoundError, match="no diffusers pipeline"):
        Generator(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected 1 \.\.\. 512"):
        Generator(str(tiny_sd3), text_tokens=600)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "DiTTransformer"}')
    with pytest.raises(ValueError, match="DiTTransformer, expected one of SD3"):
        Generator(str(tmp_path))
