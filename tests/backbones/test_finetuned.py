"""A generator with what a fine-tuning left: the velocity is that of training, and values see the frozen network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stitchvm.adapters.export import WEIGHTS, export_lora
from stitchvm.adapters.export_full import export_transformer
from stitchvm.adapters.full import PolicyWeights
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.backbones.finetuned import CONFIG, LORA
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward
from stitchvm.samplers.guidance import GuidedSampler
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.stitched import StitchedValue

PROMPTS = ["a red circle", "a blue square"]


@torch.no_grad()
def policy_of(generator: Generator, kind: type = PolicyAdapters) -> Any:
    """A policy whose copy "ema" is another than its start."""
    policy = kind(generator.transformer, copies=("ema",))
    source = torch.Generator().manual_seed(1)
    for p in policy.parameters("ema").values():
        p.add_(0.1 * torch.randn(p.shape, generator=source))
    return policy


def velocity(generator: Generator, scale: float = 2.0) -> torch.Tensor:
    z_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = generator.encode_prompts(PROMPTS)
    return generator.velocity(z_t, torch.tensor([0.3, 0.8]), cond, guidance_scale=scale)


@pytest.fixture(scope="module", params=["sd3", "flux"])
def path(request: pytest.FixtureRequest) -> str:
    folder: Path = request.getfixturevalue(f"tiny_{request.param}")
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_lora_weights_give_the_velocity_of_training(path: str, dtype: str, tmp_path: Path) -> None:
    trained = Generator(path, dtype=dtype, text_tokens=12)
    base = velocity(trained)
    policy = policy_of(trained)
    export_lora(policy, tmp_path / "lora", base_model=path, name="ema")
    with policy.use("ema"):
        expected = velocity(trained)
    assert not torch.equal(expected, base)

    loaded = Generator(path, dtype=dtype, text_tokens=12, finetuned=str(tmp_path / "lora"))
    assert torch.equal(velocity(loaded), expected)
    assert loaded.finetuned == str(tmp_path / "lora") and loaded.id == path
    assert {p.dtype for p in loaded.transformer.parameters()} == {loaded.dtype}
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


@torch.no_grad()
def test_small_updates_of_bfloat16_weights_are_kept(tiny_sd3: Path, tmp_path: Path) -> None:
    """Added to the weights, they would be lost: 2⁻¹² of them is below half a last digit."""
    trained = Generator(str(tiny_sd3), dtype="bfloat16", text_tokens=12)
    base = velocity(trained)
    policy = policy_of(trained)
    for key, p in policy.parameters("ema").items():
        p.mul_(2**-4 if ".lora_B." in key else 1)
    export_lora(policy, tmp_path, base_model=str(tiny_sd3), name="ema")
    loaded = Generator(str(tiny_sd3), dtype="bfloat16", text_tokens=12, finetuned=str(tmp_path))
    assert not torch.equal(velocity(loaded), base)


@torch.no_grad()
def test_a_whole_transformer_takes_the_place(path: str, tmp_path: Path) -> None:
    trained = Generator(path, text_tokens=12)
    policy = policy_of(trained, PolicyWeights)
    export_transformer(policy, tmp_path / "full", base_model=path, name="ema")
    with policy.use("ema"):
        expected = velocity(trained)
    loaded = Generator(path, text_tokens=12, finetuned=str(tmp_path / "full"))
    assert torch.equal(velocity(loaded), expected)


def test_a_value_sees_the_transformer_as_it_was(
    tiny_sd3: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """With LoRA on the one they share, with a whole other one on a backbone of its own."""
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    backbone = SD3Backbone(str(tiny_sd3), max_depth=2, dtype="float32", null_tokens=12)
    folder = StitchedValueModel(backbone, reward, (2, 1)).save_pretrained(tmp_path / "value")
    plain = Generator(str(tiny_sd3), text_tokens=12)
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.4, 0.4])
    expected = StitchedValue.from_pretrained(folder, plain, reward).bind(PROMPTS)(z_t, t)

    export_lora(policy_of(plain), tmp_path / "lora", base_model=str(tiny_sd3), name="ema")
    whole = Generator(str(tiny_sd3), text_tokens=12)
    export_transformer(
        policy_of(whole, PolicyWeights), tmp_path / "full", base_model="x", name="ema"
    )
    for name, shares in (("lora", True), ("full", False)):
        tuned = Generator(str(tiny_sd3), text_tokens=12, finetuned=str(tmp_path / name))
        value = StitchedValue.from_pretrained(folder, tuned, reward)
        borrowed = getattr(value.value_model.backbone, "network", None) is tuned.transformer
        assert borrowed == shares
        assert torch.equal(value.bind(PROMPTS)(z_t, t), expected)
        # the sampler does not take the value's prefix for the velocity's
        samples = [
            GuidedSampler(num_steps=3, strength=strength, guidance_scale=2.0)(
                tuned, PROMPTS, value, seeds=0, latent_size=(8, 8)
            ).latents
            for strength in (0.0, 1e-6)
        ]
        assert torch.allclose(*samples, atol=1e-4)


def test_what_is_not_for_it(tiny_sd3: Path, tiny_flux: Path, tmp_path: Path) -> None:
    for family, path in (("sd3", tiny_sd3), ("flux", tiny_flux)):
        generator = Generator(str(path), text_tokens=12)
        export_lora(policy_of(generator), tmp_path / family, base_model="x", name="ema")
    generator = Generator(str(tiny_flux), text_tokens=12)
    policy = policy_of(generator, PolicyWeights)
    export_transformer(policy, tmp_path / "flux-full", base_model="x", name="ema")
    other = json.loads((tiny_sd3 / CONFIG).read_text())
    (tmp_path / "large/transformer").mkdir(parents=True)
    (tmp_path / "large" / CONFIG).write_text(json.dumps(other | {"num_layers": 38}))
    assert LORA == WEIGHTS
    given = load_file(tmp_path / "sd3" / LORA)
    key = next(key for key in given if ".lora_A." in key)
    for name, weights in {
        "text": given | {"text_encoder.a.lora_A.weight": torch.zeros(1)},
        "none": {},
        "half": {key: given[key]},
        "wide": given | {key: torch.zeros(32, 7)},
        "flat": given | {key: torch.zeros(3)},
        "rank": given | {key: given[key][:7].clone()},
        "no-a": {k: x for k, x in given.items() if k != key},
    }.items():
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / LORA)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / LORA).write_bytes((tmp_path / "sd3" / LORA).read_bytes()[:-8])
    for name, error, message in (
        ("flux", ValueError, "another model: the transformer has no 'single_transformer_blocks"),
        ("flux-full", ValueError, "holds a FluxTransformer2DModel, but the pipeline has a SD3"),
        (
            "large",
            ValueError,
            "large' is of another model: its num_layers is 38, the pipeline's 5",
        ),
        ("text", ValueError, "'text_encoder.a.lora_A.weight', expected LoRA weights of a"),
        ("none", ValueError, "holds nothing"),
        ("half", ValueError, "not whole: 'transformer.*A.weight' has no B"),
        (
            "wide",
            ValueError,
            r"another model: '.*' has shape \(32, 7\), for weights of \(\d+, \d+\)",
        ),
        ("flat", ValueError, r"another model: '.*' has shape \(3,\), for weights of"),
        ("rank", ValueError, "damaged: '.*A.weight' has rank 7, its B 32"),
        ("no-a", ValueError, "not whole: 'transformer.*B.weight' has no A"),
        ("cut", ValueError, "is damaged or no safetensors file"),
        ("nowhere", FileNotFoundError, "no such file or folder"),
        (".", FileNotFoundError, "neither pytorch_lora_weights.safetensors nor transformer/"),
    ):
        with pytest.raises(error, match=message):
            Generator(str(tiny_sd3), text_tokens=12, finetuned=str(tmp_path / name))
