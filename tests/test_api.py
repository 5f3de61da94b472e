"""A few lines of Python: the samplers' own answers, on a pipeline's own networks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stitchvm
from stitchvm import api
from stitchvm.backbones.latent import LatentBackbone
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.rewards.clip import CLIPReward
from stitchvm.samplers.best_of_n import BestOfN
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.guidance import GuidedSampler
from stitchvm.samplers.plain import PlainSampler
from stitchvm.samplers.svdd import SVDD
from stitchvm.value_model import StitchedValueModel

PROMPTS = ["a red circle", "a blue square left of the red circle"]


@pytest.fixture(scope="module")
def pipe(tiny_sd3: Path) -> Any:
    pipe = stitchvm.load_pipeline(tiny_sd3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def generator(pipe: Any) -> stitchvm.Generator:
    return stitchvm.Generator.from_pipeline(pipe, guidance_scale=4.5, text_tokens=12)


@pytest.fixture(scope="module")
def folder(tiny_sd3: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    backbone = SD3Backbone(str(tiny_sd3), max_depth=2, dtype="float32", null_tokens=12)
    model = StitchedValueModel(backbone, CLIPReward(model=f"local-dir:{tiny_clip}"), (2, 1))
    torch.nn.init.normal_(model.stitch.F.weight, std=0.3)
    return model.save_pretrained(tmp_path_factory.mktemp("value"))


def bytes_of(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_the_package_itself_is_light() -> None:
    code = (
        "import sys, stitchvm\n"
        "assert not {'torch', 'numpy', 'diffusers'} & sys.modules.keys()\n"
        "assert set(stitchvm.__all__) <= set(dir(stitchvm)) and stitchvm.__version__\n"
        "assert not hasattr(stitchvm, 'nothing')\n"
        "assert stitchvm.sample.__module__ == 'stitchvm.api'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in stitchvm.__all__:
        found = getattr(stitchvm, name)
        assert name == "__version__" or found.__name__ == name
    assert stitchvm._HOMES.keys() == set(stitchvm.__all__) - {"__version__"}


def test_plain_samples_are_the_pipelines(pipe: Any, generator: stitchvm.Generator) -> None:
    options = {"num_steps": 4, "guidance_scale": 4.5}
    result = stitchvm.sample(
        pipe, PROMPTS, seeds=[3, 8], height=24, width=16, max_sequence_length=12, **options
    )
    sampler = PlainSampler(**options)
    start: list[Tensor] = []
    sampler.begin = lambda run: start.append(run.z)  # type: ignore[method-assign]
    sampler(generator, PROMPTS, seeds=[3, 8], latent_size=(12, 8))
    null = generator.null.repeat(2)
    images = pipe(
        PROMPTS,
        latents=start[0],
        num_inference_steps=4,
        guidance_scale=4.5,
        max_sequence_length=12,
        height=24,
        width=16,
        negative_prompt_embeds=null.tokens,
        negative_pooled_prompt_embeds=null.pooled,
    ).images
    assert [image.size for image in result.images] == [(16, 24)] * 2
    for ours, theirs in zip(result.images, images, strict=True):
        assert torch.equal(bytes_of(ours), bytes_of(theirs))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("guidance", {"strength": 2.0, "mode": "unit_norm"}),
        ("fk", {"particles": 3, "lam": 5.0, "proposals": 2}),
        ("best_of_n", {"particles": 3}),
        ("svdd", {"proposals": 3}),
    ],
)
def test_methods_are_the_samplers(
    generator: stitchvm.Generator, folder: Path, method: str, options: dict[str, Any]
) -> None:
    value = stitchvm.load_value(folder, generator)
    result = stitchvm.sample(
        generator, PROMPTS, value, method, seeds=5, num_steps=5, micro_batch=4, **options
    )
    classes = {"guidance": GuidedSampler, "fk": FKSteering, "best_of_n": BestOfN, "svdd": SVDD}
    sampler = classes[method](num_steps=5, micro_batch=4, **options)
    terminal = stitchvm.TerminalValue(generator.vae, value.reward)
    own = sampler(generator, PROMPTS, value, seeds=5, final_value=terminal)
    assert torch.equal(result.samples.latents, own.latents)
    with torch.no_grad():
        pixels = generator.vae.decode(own.latents, clamp=True)
    for image, wanted in zip(result.images, pixels, strict=True):
        assert (bytes_of(image) - 255 * wanted).abs().max() <= 0.501
    if sampler.particles > 1:
        # the clean reward on the image chose, not the value model
        text = value.encode_text(PROMPTS)
        with torch.no_grad():
            r = value.reward(
                generator.vae.decode(own.particles.flatten(0, 1)), text.repeat_interleave(3, 0)
            )
        torch.testing.assert_close(result.samples.final_values, r.reshape(2, 3))
    # and a sampler that is made already
    again = stitchvm.sample(generator, PROMPTS, str(folder), sampler, seeds=5)
    assert torch.equal(again.samples.latents, own.latents)


def test_a_final_value_may_be_given(generator: stitchvm.Generator, folder: Path) -> None:
    value = stitchvm.load_value(folder, generator)
    options = {"method": "best_of_n", "num_steps": 3, "particles": 2}
    samples = stitchvm.sample(generator, PROMPTS, value, final_value=value, **options).samples
    v = value.bind(PROMPTS).select(torch.tensor([0, 0, 1, 1]))
    expected = v(samples.particles.flatten(0, 1), torch.zeros(4)).reshape(2, 2)
    torch.testing.assert_close(samples.final_values, expected)


def test_sums_of_values_steer(generator: stitchvm.Generator, folder: Path) -> None:
    stitched = stitchvm.load_value(folder, generator)
    tweedie = stitchvm.TweedieValue(generator, stitched.reward)
    value = stitchvm.WeightedValue({"a": stitched, "b": tweedie}, {"b": 0.5})
    steps = {"num_steps": 4, "guidance_scale": 4.5}
    result = stitchvm.sample(
        generator, PROMPTS, value, "guidance", strength=2.0, mode="unit_norm", nu="ode", **steps
    )
    plain = stitchvm.sample(generator, PROMPTS, **steps)
    v, zero = value.bind(PROMPTS), torch.zeros(2)
    assert (v(result.samples.latents, zero) > v(plain.samples.latents, zero)).all()
    best = stitchvm.sample(generator, PROMPTS, value, "best_of_n", particles=2, **steps).samples
    text = value.encode_text(PROMPTS)
    with torch.no_grad():
        r = value.reward(generator.vae.decode(best.latents), text)
    torch.testing.assert_close(best.final_values.max(dim=1).values, r)


def test_a_value_model_shares_the_pipelines_transformer(pipe: Any, folder: Path) -> None:
    value = stitchvm.load_value(folder, pipe)
    assert value.value_model.backbone.network is pipe.transformer
    alone = stitchvm.load_value(folder)
    assert alone.value_model.backbone.network is not pipe.transformer
    reward = alone.reward
    assert stitchvm.load_value(folder, pipe, reward=reward).reward is reward
    result = stitchvm.sample(
        pipe, PROMPTS[0], value, "guidance", num_steps=3, max_sequence_length=12
    )
    # its null text is the sampler's, so that the null branch goes on from the value's blocks
    assert result.samples.calls["continued"] == 3
    assert len(result.images) == 1


def test_flux_pipelines_too(tiny_flux: Path, tiny_clip: Path) -> None:
    from stitchvm.backbones.flux import FluxBackbone

    pipe = stitchvm.load_pipeline(tiny_flux)
    pipe.set_progress_bar_config(disable=True)
    backbone = FluxBackbone(str(tiny_flux), max_depth=3, dtype="float32", null_tokens=12)
    model = StitchedValueModel(backbone, CLIPReward(model=f"local-dir:{tiny_clip}"), (3, 1))
    torch.nn.init.normal_(model.stitch.F.weight, std=0.3)
    value = stitchvm.StitchedValue(model.requires_grad_(False))
    options = {"num_steps": 3, "max_sequence_length": 12, "height": 24, "width": 16}
    guided = stitchvm.sample(
        pipe, PROMPTS, value, "guidance", strength=2.0, mode="unit_norm", nu="ode", **options
    )
    plain = stitchvm.sample(pipe, PROMPTS, **options)
    assert [image.size for image in guided.images] == [(16, 24)] * 2
    v, zero = value.bind(PROMPTS), torch.zeros(2)
    assert (v(guided.samples.latents, zero) > v(plain.samples.latents, zero)).all()


def test_what_is_wrong_is_said(
    pipe: Any, generator: stitchvm.Generator, folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    def sample(*arguments: Any, **options: Any) -> None:
        stitchvm.sample(generator, PROMPTS, *arguments, **options)

    with pytest.raises(ValueError, match="method = 'dps': expected one of plain, guidance, fk"):
        sample(method="dps")
    with pytest.raises(
        ValueError, match=r"'best_of_n' has no \['lam', 'n'\]: it has particles, nu"
    ):
        sample(method="best_of_n", n=4, lam=1)
    with pytest.raises(ValueError, match=r"the options \['num_steps'\]: set them where"):
        sample(method=PlainSampler(), num_steps=3)
    with pytest.raises(ValueError, match="GuidedSampler asks a value, but none"):
        sample(method="guidance")
    with pytest.raises(ValueError, match="height 30 and width 30: expected multiples of 4"):
        sample(height=30)
    with pytest.raises(ValueError, match="height 128 and width 8: expected at most 48 pixels"):
        sample(height=128, width=8)
    with pytest.raises(ValueError, match="max_sequence_length = 7, but the generator has 12"):
        sample(max_sequence_length=7)
    with pytest.raises(ValueError, match="there are no prompts"):
        stitchvm.sample(generator, [])
    with pytest.raises(ValueError, match="expected a StableDiffusion3Pipeline"):
        stitchvm.sample(object(), PROMPTS)
    with pytest.raises(FileNotFoundError, match="the embedded world has no 'world:sd4'"):
        stitchvm.load_pipeline("world:sd4")
    other = StitchedValueModel(
        LatentBackbone(16), CLIPReward(model=f"local-dir:{tiny_clip}"), (0, 1)
    )
    with pytest.raises(ValueError, match="reads latents of 16 channels"):
        stitchvm.load_value(other.save_pretrained(tmp_path / "other"), pipe)


def test_the_size_of_one_side_is_that_of_both(generator: stitchvm.Generator) -> None:
    assert api.latent_size(generator, None, None) is None
    assert api.latent_size(generator, 24, None) == api.latent_size(generator, None, 24) == (12, 12)
    assert api.latent_size(generator, 24, 16) == (12, 8)
