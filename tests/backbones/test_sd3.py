"""Tests of what is particular to SD3: the position table, the timestep, the depth of the last block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from stitchvm.backbones.sd3 import SD3Backbone
from tests.tiny import sd3_folder


@pytest.mark.parametrize("size", [(8, 8), (12, 4), (24, 24), (2, 6)])
def test_position_windows_are_the_centre_of_the_table(
    tiny_sd3: Path, size: tuple[int, int]
) -> None:
    stock = SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer")
    backbone = SD3Backbone(str(tiny_sd3), max_depth=0, dtype="float32", null_tokens=12)
    z_t = torch.randn(1, 4, *size)
    expected = stock.pos_embed(z_t)
    for _ in range(2):
        h = backbone(z_t, torch.rand(1), 0)
        assert torch.equal(h.flatten(2).transpose(1, 2), expected)


def test_only_the_window_is_in_memory(tiny_sd3: Path) -> None:
    backbone = SD3Backbone(str(tiny_sd3), max_depth=0, dtype="float32", null_tokens=12)
    table = backbone.network.pos_embed.table
    assert not table._kept
    for _ in range(3):
        backbone(torch.randn(1, 4, 8, 8), torch.rand(1), 0)
    assert [tuple(window.shape) for window in table._kept.values()] == [(1, 16, 32)]
    assert not any("pos_embed.pos_embed" in name for name, _ in backbone.named_buffers())


def test_latents_beyond_the_table(tiny_sd3: Path) -> None:
    backbone = SD3Backbone(str(tiny_sd3), max_depth=0, dtype="float32", null_tokens=12)
    with pytest.raises(ValueError, match=r"at most 24.*use smaller images"):
        backbone(torch.randn(1, 4, 26, 8), torch.rand(1), 0)


def test_noise_level_is_not_rounded_to_the_dtype(tiny_sd3: Path) -> None:
    """502 and 503 are one number in bfloat16; SD3's timestep is float32."""
    backbone = SD3Backbone(str(tiny_sd3), max_depth=1, dtype="bfloat16", null_tokens=12)
    z_t = torch.randn(1, 4, 8, 8)
    low, high = (backbone(z_t, torch.tensor([t]), 1) for t in (0.502, 0.503))
    assert not torch.equal(low, high)


def test_without_dual_attention(tmp_path: Path) -> None:
    """SD 3.5 Large has no dual-attention blocks."""
    folder = sd3_folder(tmp_path, dual_attention_layers=(), num_layers=3)
    backbone = SD3Backbone(str(folder), dtype="float32", null_tokens=12)
    stock = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    z_t, t = torch.randn(2, 4, 8, 12), torch.rand(2)
    with torch.no_grad():
        expected = stock(
            z_t,
            timestep=1000 * t,
            encoder_hidden_states=backbone.null_context.repeat(2, 1, 1),
            pooled_projections=backbone.null_pooled.repeat(2, 1),
            return_dict=False,
        )[0]
        for depth in range(4):
            assert torch.equal(backbone.suffix(backbone.prefix(z_t, t, depth)), expected)
