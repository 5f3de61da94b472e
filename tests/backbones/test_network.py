"""Tests of the transformer backbones: every prefix and suffix is diffusers' own forward, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stitchvm.backbones.flux import FluxBackbone
from stitchvm.backbones.network import NetworkBackbone
from stitchvm.backbones.sd3 import SD3Backbone

FAMILIES = ["sd3", "flux"]
CLASSES: dict[str, type[Any]] = {"sd3": SD3Backbone, "flux": FluxBackbone}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{family}")


@pytest.fixture(scope="module")
def whole(family: str, folder: Path) -> NetworkBackbone:
    return CLASSES[family](str(folder), dtype="float32", null_tokens=12)


def latents(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rectangular latents and noise levels that bfloat16 cannot hold."""
    return torch.randn(3, 4, 12, 8).to(dtype), torch.tensor([0.1003, 0.503, 0.9171])


def stock_forward(folder: Path, backbone: NetworkBackbone, z_t: Tensor, t: Tensor) -> Tensor:
    """diffusers' own transformer, called as its pipeline calls it."""
    dtype, batch, (height, width) = backbone.dtype, len(z_t), z_t.shape[2:]
    tokens = backbone.null_context.repeat(batch, 1, 1)
    text = {
        "encoder_hidden_states": tokens,
        "pooled_projections": backbone.null_pooled.repeat(batch, 1),
    }
    if isinstance(backbone, SD3Backbone):
        model = SD3Transformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype
        )
        return model(z_t.to(dtype), timestep=t * 1000, return_dict=False, **text)[0]
    model = FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype
    )
    packed = FluxPipeline._pack_latents(z_t.to(dtype), batch, 4, height, width)
    out = model(
        packed,
        timestep=(t * 1000).to(dtype) / 1000,
        guidance=torch.full([1], 3.5).expand(batch),
        img_ids=FluxPipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, "cpu", dtype
        ),
        txt_ids=torch.zeros(tokens.shape[1], 3, dtype=dtype),
        return_dict=False,
        **text,
    )[0]
    return FluxPipeline._unpack_latents(out, height, width, 1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefix_and_suffix_are_the_forward_of_diffusers(
    family: str, folder: Path, dtype: str
) -> None:
    backbone = CLASSES[family](str(folder), dtype=dtype, null_tokens=12)
    z_t, t = latents()
    expected = stock_forward(folder, backbone, z_t, t)
    assert expected.dtype == backbone.dtype
    for depth in range(backbone.num_blocks + 1):
        u = backbone.suffix(backbone.prefix(z_t, t, depth))
        assert torch.equal(u, expected), depth
        assert u.is_contiguous()


@torch.no_grad()
def test_truncated_loading_gives_the_same_features(
    family: str, folder: Path, whole: NetworkBackbone
) -> None:
    z_t, t = latents()
    features = whole.features(z_t, t, range(whole.num_blocks + 1))
    for depth in range(whole.num_blocks):
        cut = CLASSES[family](str(folder), max_depth=depth, dtype="float32", null_tokens=12)
        assert (cut.loaded_blocks, cut.num_blocks) == (depth, whole.num_blocks)
        assert cut.num_parameters() < whole.num_parameters()
        h = cut(z_t, t, depth)
        assert h.shape == (3, cut.width(depth), 6, 4)
        assert h.is_contiguous()
        assert torch.equal(h, features[depth]), depth
        assert torch.equal(h, whole(z_t, t, depth)), depth


@torch.no_grad()
def test_selected_samples_go_on_as_before(whole: NetworkBackbone) -> None:
    z_t, t = latents()
    index = torch.tensor([2, 0, 0])
    state = whole.prefix(z_t, t, 2).select(index)
    expected = whole.suffix(whole.prefix(z_t[index], t[index], 2))
    torch.testing.assert_close(whole.suffix(state), expected)


def test_it_is_frozen_and_gradients_flow_to_the_latents(whole: NetworkBackbone) -> None:
    z_t, t = latents()
    z_t.requires_grad_()
    plain = torch.autograd.grad(whole(z_t, t, 4).square().sum(), z_t)[0]
    assert plain.abs().sum() > 0
    whole.gradient_checkpointing = True
    again = torch.autograd.grad(whole(z_t, t, 4).square().sum(), z_t)[0]
    whole.gradient_checkpointing = False
    assert torch.equal(plain, again)
    assert not any(p.requires_grad for p in whole.parameters())
    assert not any(m.training for m in whole.train().modules())


def test_null_text_is_no_part_of_the_state(whole: NetworkBackbone) -> None:
    assert not any("null" in key for key in whole.state_dict())
    assert {"null_context", "null_pooled"} <= {name for name, _ in whole.named_buffers()}


def test_the_configuration_builds_the_same_features(whole: NetworkBackbone) -> None:
    z_t, t = latents()
    again = type(whole)(**{**whole.init_args, "max_depth": 2})
    assert again.null_tokens == 12
    assert again.init_args == {**whole.init_args, "max_depth": 2}
    assert torch.equal(again(z_t, t, 2), whole(z_t, t, 2))


@torch.no_grad()
def test_autocast_outside_changes_nothing(whole: NetworkBackbone) -> None:
    z_t, t = latents()
    expected = whole(z_t, t, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole(z_t, t, 3), expected)


@torch.no_grad()
def test_flops_are_those_counted_while_running(whole: NetworkBackbone) -> None:
    z_t, t = latents()
    for depth in range(whole.num_blocks + 1):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            whole(z_t[:1], t[:1], depth)
        assert counter.get_total_flops() == whole.flops((12, 8), depth), depth


def test_a_truncated_backbone_has_no_suffix(family: str, folder: Path) -> None:
    cut = CLASSES[family](str(folder), max_depth=2, dtype="float32", null_tokens=12)
    z_t, t = latents()
    with pytest.raises(
        ValueError, match=r"first 2 of 5 blocks.*load the backbone with max_depth=None"
    ):
        cut.suffix(cut.prefix(z_t, t, 2))
    with pytest.raises(ValueError, match=r"only the first 2 of 5 blocks were loaded.*max_depth=3"):
        cut(z_t, t, 3)
    with pytest.raises(ValueError, match=r"expected 0 ... 5"):
        cut.features(z_t, t, [1, 6])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 8, 8), r"\(4, 8, 8\), expected \(B, 4, H, W\).*z_t\[None\]"),
        ((2, 16, 8, 8), "expected 4 channels.*encode the images with the VAE of that model"),
        ((2, 4, 8, 7), "divisible by 2"),
    ],
)
def test_wrong_latents(whole: NetworkBackbone, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(torch.randn(shape), torch.rand(2), 1)


def test_wrong_noise_levels(whole: NetworkBackbone) -> None:
    with pytest.raises(ValueError, match=r"noise levels have shape \(\), expected \(2,\)"):
        whole(torch.randn(2, 4, 8, 8), torch.tensor(0.5), 1)


def test_wrong_family(family: str, folder: Path) -> None:
    other = CLASSES["flux" if family == "sd3" else "sd3"]
    with pytest.raises(ValueError, match="use SD3Backbone for SD3Transformer2DModel"):
        other(str(folder))


def test_sharding_over_one_process(family: str, folder: Path, whole: NetworkBackbone) -> None:
    import torch.distributed as dist

    z_t, t = latents()
    with torch.no_grad():
        expected = whole(z_t, t, 2)
    backbone = CLASSES[family](str(folder), max_depth=3, dtype="float32", null_tokens=12)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        backbone.shard(dist.init_device_mesh("cpu", (1,)))
        with torch.no_grad():
            assert torch.equal(backbone(z_t, t, 2), expected)
            assert torch.equal(backbone.features(z_t, t, [2])[2], expected)
    finally:
        dist.destroy_process_group()
