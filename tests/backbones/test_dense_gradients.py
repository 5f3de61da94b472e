"""Gradients reach attention in one layout wherever a kernel prepared for one may meet another."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stitchvm.backbones.dense_gradients import dense_gradients
from stitchvm.backbones.flux import FluxBackbone
from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward
from tests.tiny import flux_folder

Layouts = dict[tuple[Any, ...], set[tuple[int, ...]]]


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Layouts]:
    """Gives the strides of the gradients that attention was given, by the shapes and strides of its inputs."""
    found: Layouts = defaultdict(set)
    attention = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inputs = tuple((x.shape, x.stride()) for x in (query, key, value))
        output = attention(query, key, value, *args, **kwargs)
        if output.requires_grad:
            output.register_hook(lambda grad: found[inputs].add(grad.stride()))
        return output

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    yield found


def gradient(generator: Generator, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Returns the velocity and the gradient of a number made of it."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(batch, generator.latent_channels, 8, 8, generator=random).requires_grad_()
    cond = generator.encode_prompts(["a red circle"]).repeat(batch)
    u = generator.velocity(z, torch.full((batch,), 0.6), cond)
    return u.detach(), torch.autograd.grad((u**2).sum(), z)[0]


def unhook(transformer: Any) -> None:
    for block in transformer.single_transformer_blocks:
        block.attn._forward_hooks.clear()


@pytest.mark.parametrize("again", [False, True])
def test_flux_gives_one_layout(tiny_flux: Path, layouts: Layouts, again: bool) -> None:
    generator = Generator(str(tiny_flux), text_tokens=12, gradient_checkpointing=again)
    found = gradient(generator)
    assert layouts and all(len(strides) == 1 for strides in layouts.values())
    layouts.clear()
    unhook(generator.transformer)
    for x, y in zip(found, gradient(generator), strict=True):
        assert torch.equal(x, y)  # on a CPU, which takes gradients as they are
    assert max(len(strides) for strides in layouts.values()) == 2


def test_stable_diffusion_and_clip_do_by_themselves(
    tiny_sd3: Path, tiny_clip: Path, layouts: Layouts
) -> None:
    gradient(Generator(str(tiny_sd3), text_tokens=12))
    many = len(layouts)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    CLIPReward(model=f"local-dir:{tiny_clip}").embed(x).image.sum().backward()
    assert len(layouts) > many > 0
    assert all(len(strides) == 1 for strides in layouts.values())


def test_whoever_holds_the_transformer_has_it_done_once(tiny_flux: Path, tmp_path: Path) -> None:
    pipe = FluxPipeline.from_pretrained(flux_folder(tmp_path))
    for _ in range(2):
        generator = Generator.from_pipeline(pipe, text_tokens=12)
        generator.null_branch()
    loaded = FluxBackbone(str(tiny_flux), max_depth=3, dtype="float32", null_tokens=12)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(pipe.transformer)))
    assert isinstance(copied, FluxTransformer2DModel)
    for transformer in (pipe.transformer, loaded.network, copied):
        hooks = [len(b.attn._forward_hooks) for b in transformer.single_transformer_blocks]
        assert hooks and set(hooks) == {1}
    dense_gradients(torch.nn.Linear(2, 2))  # has no such blocks


@pytest.mark.gpu
def test_cudnn_agrees_with_other_kernels() -> None:
    """Attention of FLUX.1-dev's size, whose gradients come as in a single block, then as in a double one."""

    class Single(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    class Block(torch.nn.Module):
        attn = Single()

    class Transformer(torch.nn.Module):
        single_transformer_blocks = (Block(),)

    torch.manual_seed(0)
    dense_gradients(Transformer())
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = [torch.randn(1, 4608, 24, 128, **shape).requires_grad_() for _ in range(3)]
    wide = torch.randn(1, 4608, 15_360, **shape)
    found = {}
    for kernel in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel([kernel]):
            outputs = [Block.attn(*inputs) for _ in range(2)]
        grads = (wide[..., :3072], wide[..., :3072].contiguous())
        found[kernel] = [
            gradient.float()
            for y, grad in zip(outputs, grads, strict=True)
            for gradient in torch.autograd.grad(y, inputs, grad)
        ]
    for own, right in zip(*reversed(list(found.values())), strict=True):
        assert (own - right).norm() < 0.02 * right.norm()
