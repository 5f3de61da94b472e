"""Tests of backbones that borrow a generator's transformer, with LoRA adapters on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

from stitchvm.backbones.flux import FluxBackbone
from stitchvm.backbones.network import NetworkBackbone
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.generator import Generator

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "context_embedder"]


def borrow(folder: Path) -> tuple[Generator, NetworkBackbone]:
    """Returns a generator and a backbone on its transformer."""
    generator = Generator(str(folder), text_tokens=12)
    kind = SD3Backbone if generator.family == "sd3" else FluxBackbone
    backbone = kind.from_transformer(
        generator.transformer, generator.null, id=generator.id, null_tokens=generator.text_tokens
    )
    return generator, backbone


def velocity(generator: Generator, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The generator's velocity under the null text, with its adapters as they are."""
    scale = 1.0 if generator.family == "sd3" else 3.5
    return generator.velocity(z_t, t, generator.null, guidance_scale=scale)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_borrowed_backbone_ignores_adapters(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    generator, backbone = borrow(folder)
    z_t, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.tensor([0.3, 0.8])
    before = backbone(z_t, t, 4)
    gradient = torch.autograd.grad(before.square().sum(), z_t)[0]
    generator.transformer.add_adapter(
        LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    )
    trainable = {n for n, p in generator.transformer.named_parameters() if p.requires_grad}
    assert trainable
    base = backbone.suffix(backbone.prefix(z_t, t, 2))
    adapted = velocity(generator, z_t, t)
    assert not torch.equal(adapted, base)

    for checkpointing in (False, True):
        backbone.gradient_checkpointing = checkpointing
        after = backbone(z_t, t, 4)
        assert torch.equal(after, before)
        assert torch.equal(torch.autograd.grad(after.square().sum(), z_t)[0], gradient)
    # The adapters are as they were: on, and trainable.
    assert torch.equal(velocity(generator, z_t, t), adapted)
    assert trainable == {n for n, p in generator.transformer.named_parameters() if p.requires_grad}
    generator.transformer.disable_adapters()
    backbone(z_t, t, 1)
    assert torch.equal(velocity(generator, z_t, t), base)


def test_nothing_is_copied_or_registered(tiny_sd3: Path) -> None:
    generator, backbone = borrow(tiny_sd3)
    assert backbone.network is generator.transformer
    assert not list(backbone.parameters())
    assert not backbone.state_dict()
    assert backbone.loaded_blocks == backbone.num_blocks == 5
    assert backbone.init_args == {
        "path": str(tiny_sd3),
        "max_depth": None,
        "dtype": "float32",
        "null_tokens": 12,
    }
    with pytest.raises(ValueError, match="borrowed transformer cannot be sharded"):
        backbone.shard(None)


def test_merged_adapters_are_an_error(tiny_sd3: Path) -> None:
    generator, backbone = borrow(tiny_sd3)
    generator.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    generator.transformer.fuse_lora()
    with pytest.raises(ValueError, match="merged into the transformer"):
        backbone(torch.randn(1, 4, 8, 8), torch.rand(1), 1)


def test_wrong_transformer_or_setting(tiny_sd3: Path) -> None:
    generator, _ = borrow(tiny_sd3)
    with pytest.raises(
        ValueError, match="takes a FluxTransformer2DModel, got a SD3Transformer2DModel"
    ):
        FluxBackbone.from_transformer(generator.transformer, generator.null)
    with pytest.raises(ValueError, match="no setting 'guidance'"):
        SD3Backbone.from_transformer(generator.transformer, generator.null, guidance=3.5)
    wide = SD3Transformer2DModel.from_config(
        {**generator.transformer.config, "joint_attention_dim": 64}
    )
    with pytest.raises(ValueError, match="belong to another model"):
        SD3Backbone.from_transformer(wide, generator.null)
