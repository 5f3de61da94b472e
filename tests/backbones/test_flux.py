"""Tests of what is particular to FLUX: packing, the rounded timestep, the guidance input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from stitchvm.backbones.flux import FluxBackbone, image_ids, pack, pipeline_timestep, unpack
from tests.tiny import flux_folder


def test_packing_is_that_of_the_pipeline() -> None:
    z = torch.randn(2, 4, 12, 8)
    assert torch.equal(pack(z), FluxPipeline._pack_latents(z, 2, 4, 12, 8))
    assert torch.equal(unpack(pack(z), (6, 4)), z)
    ids = FluxPipeline._prepare_latent_image_ids(2, 6, 4, "cpu", torch.float32)
    assert torch.equal(image_ids((6, 4), z), ids)


def test_timestep_is_rounded_as_in_the_pipeline() -> None:
    t = torch.tensor([0.503])
    assert (pipeline_timestep(t, torch.bfloat16) * 1000).item() == 504
    torch.testing.assert_close(pipeline_timestep(t, torch.float32), t)


def test_guidance_is_an_input_of_distilled_models_only(tiny_flux: Path, tmp_path: Path) -> None:
    z_t, t = torch.randn(1, 4, 8, 8), torch.rand(1)
    settings = {"max_depth": 1, "dtype": "float32", "null_tokens": 12}
    low, high = (FluxBackbone(str(tiny_flux), guidance=g, **settings) for g in (1.0, 3.5))
    assert not torch.equal(low(z_t, t, 1), high(z_t, t, 1))
    assert high.init_args["guidance"] == 3.5
    folder = str(flux_folder(tmp_path, guidance_embeds=False))
    low, high = (FluxBackbone(folder, guidance=g, **settings) for g in (1.0, 3.5))
    assert torch.equal(low(z_t, t, 1), high(z_t, t, 1))
    assert low.flops((8, 8), 1) < FluxBackbone(str(tiny_flux), **settings).flops((8, 8), 1)


def test_depth_counts_double_and_single_blocks_as_one_sequence(tiny_flux: Path) -> None:
    backbone = FluxBackbone(str(tiny_flux), max_depth=3, dtype="float32", null_tokens=12)
    kinds = [type(block).__name__ for block in backbone.blocks]
    assert kinds == ["FluxTransformerBlock"] * 2 + ["FluxSingleTransformerBlock"]
    assert backbone.num_blocks == 5


def test_states_after_single_blocks_do_not_alias(tiny_flux: Path) -> None:
    backbone = FluxBackbone(str(tiny_flux), max_depth=4, dtype="float32", null_tokens=12)
    state = backbone.prefix(torch.randn(2, 4, 8, 8), torch.rand(2), 4)
    assert state.context is not None
    assert state.hidden.is_contiguous() and state.context.is_contiguous()
    assert state.hidden.untyped_storage().data_ptr() != state.context.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="divisible by 2"):
        backbone(torch.randn(1, 4, 7, 8), torch.rand(1), 1)
