"""Gradients of the LoRA policy whose adapters are switched before the backward pass, with checkpointing and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.generator import Generator
from tests.adapters.small import Z_T, generator_of, gradients, scatter, velocity


@pytest.fixture(params=["sd3", "flux"])
def generator(request: pytest.FixtureRequest) -> Generator:
    return generator_of(request.getfixturevalue(f"tiny_{request.param}"), guidance_scale=1.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_switching_before_backward_loses_nothing(
    generator: Generator, checkpointing: bool
) -> None:
    """Gradients, of weights and of latents, are those of the forward pass's weights, whatever is active later."""
    policy = PolicyAdapters(generator.transformer, r=2)
    scatter(policy)
    expected = {}
    for name in ("default", "old"):
        z_t = Z_T.clone().requires_grad_()
        with policy.use(name):
            velocity(generator, z_t).square().sum().backward()
        expected[name] = [z_t.grad, *(gradients(policy) if name == "default" else [])]
    # (the last SD3 block makes queries of the text that nothing reads)
    missing = [
        key
        for key, g in zip(policy.parameters(), expected["default"][1:], strict=True)
        if not g.any()
    ]
    assert all("blocks.4.attn.add_q_proj" in key for key in missing)
    assert len(missing) == (2 if generator.family == "sd3" else 0)
    if checkpointing:
        policy.enable_gradient_checkpointing()
    for name in ("default", "old"):
        for later in ("default", "old", "ema", None):
            z_t = Z_T.clone().requires_grad_()
            with policy.use(name):
                loss = velocity(generator, z_t).square().sum()
            with policy.off() if later is None else policy.use(later):
                loss.backward()
                assert policy.active == later
            found = [z_t.grad, *(gradients(policy) if name == "default" else [])]
            assert all(torch.equal(x, y) for x, y in zip(found, expected[name], strict=True))
    assert all(p.grad is None for name in policy.copies for p in policy.parameters(name).values())


def test_checkpointing_that_was_on_before_is_taken_over(tiny_sd3: Path) -> None:
    generator = generator_of(tiny_sd3, gradient_checkpointing=True)
    policy = PolicyAdapters(generator.transformer, r=2)
    scatter(policy)
    loss = velocity(generator, Z_T.clone().requires_grad_()).sum()
    with policy.use("old"):
        loss.backward()
    found = gradients(policy)
    plain = generator_of(tiny_sd3)
    twin = PolicyAdapters(plain.transformer, r=2)
    scatter(twin)
    velocity(plain).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(found, gradients(twin), strict=True))
    # and one that is switched on past it is refused
    generator.transformer.enable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="switched on past the policy"), policy.use("old"):
        pass


def test_whole_calls_are_checkpointed_through_the_policy(tiny_sd3: Path) -> None:
    generator = generator_of(tiny_sd3)
    policy = PolicyAdapters(generator.transformer, r=2)
    scatter(policy)
    velocity(generator).sum().backward()
    expected = gradients(policy)
    for name in ("old", None):
        loss = policy.checkpoint(velocity, generator).sum()
        with policy.use(name) if name else policy.off():
            loss.backward()
        assert all(torch.equal(x, y) for x, y in zip(gradients(policy), expected, strict=True))
        loss = checkpoint(velocity, generator, use_reentrant=False).sum()
        context = policy.use(name) if name else policy.off()
        with pytest.raises(RuntimeError, match=r"leave use\(\)/off\(\) before backward"), context:
            loss.backward()
        gradients(policy)
    # a foreign checkpoint is fine where nothing is switched
    checkpoint(velocity, generator, use_reentrant=False).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(gradients(policy), expected, strict=True))
