"""The LoRA policy: what it adapts, switching, and the frozen value beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from stitchvm.adapters.lora import PolicyAdapters, is_adapter_key, lora_targets
from stitchvm.backbones.flux import FluxBackbone
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.generator import Generator
from tests.adapters.small import Z_T, T, generator_of, gradients, scatter, velocity

SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


@pytest.fixture(params=["sd3", "flux"])
def generator(request: pytest.FixtureRequest) -> Generator:
    return generator_of(request.getfixturevalue(f"tiny_{request.param}"), guidance_scale=1.0)


# What is adapted.


@pytest.mark.parametrize(
    ("attn2", "modules", "millions"), [(False, 191, 18.776064), (True, 243, 23.887872)]
)
def test_both_readings_of_the_list_at_the_size_of_sd35_medium(attn2, modules, millions):
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**SD35_MEDIUM)
    policy = PolicyAdapters(transformer, attn2=attn2, copies=("ema",))
    assert len(policy.modules) == modules
    assert sum(p.numel() for p in policy.trainable()) == millions * 1e6
    assert sum(".attn2." in name for name in policy.modules) == (52 if attn2 else 0)
    assert sum(p.numel() for p in transformer.parameters() if p.requires_grad) == millions * 1e6
    assert {p.dtype for p in policy.parameters("ema").values()} == {torch.float32}


@pytest.mark.parametrize(("network", "modules"), [("sd35_large", 38 * 8 - 1), ("flux", 266)])
def test_the_list_at_the_size_of_the_larger_networks(network, modules):
    """FLUX.1: 19 double blocks with eight projections, 38 single ones with to_q, to_k and to_v."""
    large = SD35_MEDIUM | {
        "num_layers": 38,
        "num_attention_heads": 38,
        "dual_attention_layers": (),
    }
    with torch.device("meta"):
        transformer = (
            FluxTransformer2DModel() if network == "flux" else SD3Transformer2DModel(**large)
        )
    assert len(PolicyAdapters(transformer).modules) == modules


def test_targets_by_hand(tiny_sd3: Path, tiny_flux: Path) -> None:
    # 5 blocks with 8 projections, the last without to_add_out; 3 of them with a second attention of 4
    assert len(PolicyAdapters(generator_of(tiny_sd3).transformer, r=2).modules) == 5 * 8 - 1
    assert (
        len(PolicyAdapters(generator_of(tiny_sd3).transformer, r=2, attn2=True).modules) == 39 + 12
    )
    # 2 double blocks with 8, 3 single blocks with to_q, to_k, to_v
    assert len(PolicyAdapters(generator_of(tiny_flux).transformer, r=2).modules) == 2 * 8 + 3 * 3
    policy = PolicyAdapters(
        generator_of(tiny_sd3).transformer, r=2, targets=["context_embedder", "attn.to_q"]
    )
    assert policy.modules == ["context_embedder"] + [
        f"transformer_blocks.{i}.attn.to_q" for i in range(5)
    ]
    assert lora_targets()[3] == "attn.to_out.0" and lora_targets(True)[3] == "to_out.0"


def test_targets_that_match_nothing(tiny_sd3: Path) -> None:
    transformer = generator_of(tiny_sd3).transformer
    with pytest.raises(
        ValueError, match=r"\['attn.to_w'\] match no linear layer .* blocks have attn.add_k_proj"
    ):
        PolicyAdapters(transformer, targets=["attn.to_q", "attn.to_w"])
    with pytest.raises(ValueError, match="match no linear layer"):
        PolicyAdapters(transformer, targets=[])
    with pytest.raises(ValueError, match="expected a rank"):
        PolicyAdapters(transformer, r=0)
    with pytest.raises(ValueError, match="distinct names"):
        PolicyAdapters(transformer, copies=("default",))
    PolicyAdapters(transformer, r=2)
    with pytest.raises(ValueError, match="has adapters already"):
        PolicyAdapters(transformer, r=2)


def test_start(tiny_sd3: Path) -> None:
    """A ~ N(0, 1/r²) from the seed alone, B = 0: the policy is the frozen model, bit for bit."""
    generator = generator_of(tiny_sd3)
    base = velocity(generator)
    torch.manual_seed(5)
    policy = PolicyAdapters(generator.transformer, r=8, alpha=16, seed=3)
    assert torch.equal(velocity(generator), base)
    halves = {
        half: torch.cat([p.flatten() for k, p in policy.parameters().items() if half in k])
        for half in ("A", "B")
    }
    a = halves["A"].detach()
    assert not halves["B"].any()
    assert a.std().item() == pytest.approx(1 / 8, rel=0.05) and abs(a.mean().item()) < 0.01
    torch.manual_seed(6)
    twin = PolicyAdapters(generator_of(tiny_sd3).transformer, r=8, alpha=16, seed=3)
    other = PolicyAdapters(generator_of(tiny_sd3).transformer, r=8, alpha=16, seed=4)
    states = [x.state() for x in (policy, twin, other)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    key = "default.transformer_blocks.0.attn.to_q.lora_A.weight"
    assert not torch.equal(states[0][key], states[2][key])
    # copies are equal, and no aliases
    assert torch.equal(states[0][key], states[0][key.replace("default", "old")])
    assert (
        len(
            {
                p.data_ptr()
                for name in ("default", "old", "ema")
                for p in policy.parameters(name).values()
            }
        )
        == 3 * 78
    )
    assert policy.scale == 2.0


def test_update_is_alpha_over_r_times_b_a(generator: Generator) -> None:
    policy = PolicyAdapters(generator.transformer, r=2, alpha=6)
    scatter(policy)
    module = "transformer_blocks.1.attn.to_q"
    layer = generator.transformer.get_submodule(module)
    x = torch.randn(3, layer.in_features)
    a, b = (policy.parameters("old")[f"{module}.lora_{half}.weight"] for half in "AB")
    with policy.use("old"):
        assert torch.allclose(layer(x), layer.base_layer(x) + 3.0 * x @ a.T @ b.T, atol=1e-5)
    with policy.off():
        assert torch.equal(layer(x), layer.base_layer(x))


# Switching.


def test_contexts_switch_and_restore(generator: Generator) -> None:
    base = velocity(generator)
    policy = PolicyAdapters(generator.transformer, r=2)
    scatter(policy)
    trained = {name for name, p in generator.transformer.named_parameters() if p.requires_grad}
    assert trained == {
        n for n in dict(generator.transformer.named_parameters()) if ".default." in n
    }
    with torch.no_grad():
        first = velocity(generator)
        seen = {}
        for name in ("old", "ema"):
            with policy.use(name):
                assert policy.active == name
                seen[name] = velocity(generator)
                with policy.off():
                    assert policy.active is None
                    assert torch.equal(velocity(generator), base)
                    with policy.use("default"):
                        assert torch.equal(velocity(generator), first)
                assert torch.equal(velocity(generator), seen[name])
            assert policy.active == "default"
            assert torch.equal(velocity(generator), first)
    assert not torch.equal(seen["old"], seen["ema"]) and not torch.equal(seen["old"], first)
    assert trained == {n for n, p in generator.transformer.named_parameters() if p.requires_grad}
    with (
        pytest.raises(ValueError, match=r"no 'best', only \['default', 'old', 'ema'\]"),
        policy.use("best"),
    ):
        pass


@pytest.mark.parametrize("name", ["old", None])
def test_contexts_restore_after_an_exception(tiny_sd3: Path, name: str | None) -> None:
    generator = generator_of(tiny_sd3)
    policy = PolicyAdapters(generator.transformer, r=2)
    scatter(policy)
    before = velocity(generator)
    state = policy.state()
    with pytest.raises(KeyError), policy.use(name) if name else policy.off():
        raise KeyError
    assert policy.active == "default"
    assert torch.equal(velocity(generator), before)
    velocity(generator).sum().backward()
    assert all(g is not None for g in gradients(policy))
    assert all(torch.equal(value, policy.state()[key]) for key, value in state.items())


def test_switching_past_the_policy_is_noticed(tiny_sd3: Path) -> None:
    for tamper in (
        lambda t: t.set_adapter("old"),
        lambda t: t.disable_adapters(),
        lambda t: t.fuse_lora(adapter_names=["default"]),
        lambda t: t.requires_grad_(False),
    ):
        transformer = generator_of(tiny_sd3).transformer
        policy = PolicyAdapters(transformer, r=2)
        tamper(transformer)
        with pytest.raises(RuntimeError, match="past the policy"), policy.use("old"):
            pass
        with pytest.raises(RuntimeError, match="past the policy"):
            policy.state()
    # inside of a context, too: it is put right as far as flags go, or an error
    transformer = generator_of(tiny_sd3).transformer
    policy = PolicyAdapters(transformer, r=2)
    with pytest.raises(RuntimeError, match="with gradients for 'default' alone"), policy.off():
        transformer.set_adapter("ema")


# Precision.


def test_float32_adapters_over_bfloat16(tiny_sd3: Path) -> None:
    generator = generator_of(tiny_sd3, dtype="bfloat16")
    policy = PolicyAdapters(generator.transformer, r=2)
    scatter(policy)
    assert {p.dtype for name in ("default", "old") for p in policy.parameters(name).values()} == {
        torch.float32
    }
    assert generator.dtype == torch.bfloat16
    output = velocity(generator)
    output.square().sum().backward()
    found = gradients(policy)
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in found)
    # applied in the input's dtype: as if the adapter itself were bfloat16, as in a pipeline that loads it
    for p in policy.parameters().values():
        p.data = p.data.bfloat16().float()
    assert torch.equal(velocity(generator), output)
    layer = generator.transformer.get_submodule(policy.modules[0])
    x = torch.randn(2, layer.in_features).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    # a small update is kept in the weights though bfloat16 could not hold it
    weight = policy.trainable()[0]
    before = weight.detach().clone()
    weight.data += 1e-5 * weight.abs()
    assert not torch.equal(weight, before) and torch.equal(weight.bfloat16(), before.bfloat16())


# The frozen value beside the policy.


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_value_on_the_same_transformer_sees_no_adapter(
    generator: Generator, checkpointing: bool
) -> None:
    """DRaFT's step: gradients through a borrowed prefix equal those through a frozen copy of it."""
    sd3 = generator.family == "sd3"
    kind, copied = (
        (SD3Backbone, SD3Transformer2DModel) if sd3 else (FluxBackbone, FluxTransformer2DModel)
    )
    transformer = generator.transformer
    twin = copied.from_config(transformer.config)
    twin.load_state_dict(transformer.state_dict())
    twin.requires_grad_(False).eval()
    policy = PolicyAdapters(transformer, r=2)
    scatter(policy)
    if checkpointing:
        policy.enable_gradient_checkpointing()
    results = []
    for network in (transformer, twin):
        options = {} if sd3 else {"guidance": 1.0}
        value = kind.from_transformer(
            network, generator.null, gradient_checkpointing=checkpointing, **options
        )
        z_tau = Z_T - 0.2 * velocity(generator)
        features = value(z_tau, T - 0.2, 2)
        features.square().mean().backward()
        results.append([features.detach(), *gradients(policy)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert sum(bool(g.any()) for g in results[0][1:]) >= 2 * len(policy.modules) - 2
    # inside of off() and use() the value is the same too
    value = kind.from_transformer(
        transformer, generator.null, **({} if sd3 else {"guidance": 1.0})
    )
    z_tau = (Z_T - 0.2 * velocity(generator)).detach()
    for context in (policy.off(), policy.use("old")):
        with context:
            assert torch.equal(value(z_tau, T - 0.2, 2), results[0][0])


def test_keys_of_adapters(tiny_sd3: Path) -> None:
    transformer = generator_of(tiny_sd3).transformer
    frozen = set(transformer.state_dict())
    assert not any(is_adapter_key(key) for key in frozen)
    policy = PolicyAdapters(transformer, r=2)
    kept = {key for key in transformer.state_dict() if is_adapter_key(key)}
    assert len(kept) == 3 * 2 * len(policy.modules)
    assert len(transformer.state_dict()) - len(kept) == len(frozen)
