"""Compiled blocks compute what they computed, with one compilation for all of a kind; traced without a compiler."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from stitchvm import compilation
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.compilation import compile_forward, require_compiler
from stitchvm.generator import Generator
from stitchvm.rewards.clip import CLIPReward


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces and differentiates as for a compiler, then runs the graph as it is."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    compilation._compiled.cache_clear()


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def velocity(generator: Generator, batch: int = 2) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    z = torch.randn(batch, generator.latent_channels, 8, 8, generator=random)
    cond = generator.encode_prompts(["a red circle"]).repeat(batch)
    return generator.velocity(z, torch.full((batch,), 0.6), cond)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_generator_computes_the_same(family: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(f"tiny_{family}"))
    plain = Generator(folder, text_tokens=12, guidance_scale=3.5)
    compiled = Generator(folder, text_tokens=12, guidance_scale=3.5, compile=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(velocity(compiled), velocity(plain), rtol=1e-5, atol=1e-5)
        once = graphs()
        velocity(compiled)
        assert graphs() == once  # of one kind as before
        velocity(compiled, 3)
        assert graphs() == 2 * once  # of another shape
        z = torch.randn(1, compiled.latent_channels, 4, 4)
        torch.testing.assert_close(compiled.vae.decode(z), plain.vae.decode(z))
    network = compiled.transformer
    blocks = [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]
    kinds = {tuple(name for name, _ in block.named_parameters()) for block in blocks}
    # FLUX: a stream that comes with other strides is another kind, too
    assert len(kinds) <= once <= len(kinds) + (family == "flux") < len(blocks)


def test_adapters_and_checkpointing(tiny_sd3: Path) -> None:
    """Gradients of the policy, its copies and the frozen model, with blocks that are run again."""

    def found(compile: bool) -> list[torch.Tensor]:
        generator = Generator(str(tiny_sd3), text_tokens=12, compile=compile)
        policy = PolicyAdapters(generator.transformer, r=2, alpha=4)
        for weight in policy.trainable():
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))
        policy.enable_gradient_checkpointing()
        with policy.use("old"), torch.no_grad():
            answer = [velocity(generator)]
        with policy.off():
            answer.append(velocity(generator))
        u = velocity(generator)
        grads = torch.autograd.grad(u.square().sum(), policy.trainable())
        return [*answer, u, *grads]

    for one, other in zip(found(True), found(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert graphs() > 3


def test_a_copy_is_a_plain_module_with_its_own_weights(tiny_clip: Path, tmp_path: Path) -> None:
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    block = reward.repeated()[0]
    plain = type(block)
    compile_forward([block])
    cls = type(block)
    assert cls is not plain and isinstance(block, plain) and cls.__name__ == plain.__name__
    compile_forward([block])
    assert type(block) is cls  # compiled once
    torch.save(block, tmp_path / "block.pt")
    again = torch.load(tmp_path / "block.pt", weights_only=False)
    twin = copy.deepcopy(block)
    assert type(again) is type(twin) is plain
    for weight in twin.parameters():
        torch.nn.init.zeros_(weight)
    x = torch.randn(1, 5, reward.width)
    assert not torch.equal(block(x), x)
    torch.testing.assert_close(again(x), block(x))
    torch.testing.assert_close(twin(x), x)  # the residual alone
    tail = reward.tail(1)  # copies the blocks
    for weight in reward.parameters():
        torch.nn.init.zeros_(weight)
    assert not torch.equal(tail.blocks[0](x), x)


def test_a_missing_compiler_is_said_before_anything_is_loaded(
    tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_compiler(True)  # traced: needs none
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    require_compiler(False)
    require_compiler("aot_eager")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .* compile: false"):
        Generator("nowhere", compile=True)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name if name == "g++" else None)
    require_compiler(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a C compiler .* and the package triton"):
        require_compiler("inductor")
    with pytest.raises(
        ValueError, match=r"compile: aot: expected true, false or one of .*inductor"
    ):
        require_compiler("aot")


def test_weights_are_freed_with_the_generator(tiny_sd3: Path) -> None:
    """Not when the garbage collector comes along: they may be the better part of a GPU's memory."""
    generator = Generator(str(tiny_sd3), text_tokens=12, compile=True)
    weight = weakref.ref(generator.transformer.transformer_blocks[0].attn.to_q.weight)
    gc.collect()
    gc.disable()
    try:
        del generator
        assert weight() is None
    finally:
        gc.enable()
