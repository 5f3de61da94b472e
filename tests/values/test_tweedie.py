"""Which velocity a Tweedie value takes, what it leaves for the sampler, and what checkpointing keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stitchvm.generator import Generator
from stitchvm.path import FlowPath
from stitchvm.rewards.clip import CLIPReward
from stitchvm.values.parts import Parts
from stitchvm.values.tweedie import TweedieFactory, TweedieValue, checkpointed
from tests.values.fakes import ClosedFormReward, WorldGenerator, known, mixture

G = 2.5
PROMPTS = ["0.5", "-2", "1"]


class GuidedWorld(WorldGenerator):
    """A closed-form world under classifier-free guidance; a prompt "+x" adds x to the means."""

    guidance_scale = G

    def runs_null_branch(self, guidance_scale: float | None = None) -> bool:
        return (self.guidance_scale if guidance_scale is None else guidance_scale) > 1

    def velocity_parts(
        self, z_t: Tensor, t: Tensor, cond: Any, guidance_scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        u, prompt = super().velocity(z_t, t, None, 1.0), super().velocity(z_t, t, cond, 1.0)
        g = self.guidance_scale if guidance_scale is None else guidance_scale
        return u + g * (prompt - u), prompt - u


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("velocity", ["null", "prompt", "cfg"])
def test_each_velocity_has_its_closed_form(velocity: str, checkpointing: bool) -> None:
    world, generator = mixture(), GuidedWorld(mixture())
    value = TweedieValue(
        generator, ClosedFormReward(known()), velocity=velocity, checkpointing=checkpointing
    )
    z_t, t = world.sample(3).requires_grad_(), torch.tensor([0.2, 0.5, 0.9])
    shift = torch.tensor([0.5, -2, 1]).double().reshape(3, 1, 1, 1)
    level = t.double().reshape(3, 1, 1, 1)
    null = world.denoise(z_t, t)
    prompt = world.denoise(z_t - (1 - level) * shift, t) + shift
    # guidance is linear in u, hence in D = z − t·u
    clean = {"null": null, "prompt": prompt, "cfg": null + G * (prompt - null)}[velocity]
    exact = known()(clean)
    v = value.bind(PROMPTS)(z_t, t)
    assert torch.allclose(v, exact, atol=1e-5)
    (gradient,) = torch.autograd.grad(v.sum(), z_t)
    (wanted,) = torch.autograd.grad(exact.sum(), z_t)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-5)

    v, u, direction = value.bind(PROMPTS).with_velocity(z_t, t, generator.encode_prompts(PROMPTS))
    assert torch.allclose(v, exact, atol=1e-5)
    assert torch.allclose(FlowPath.denoise(z_t, u, t), clean, atol=1e-5)
    if velocity == "cfg":
        assert torch.allclose(-level * direction, prompt - null, atol=1e-5)
    else:
        assert direction is None


def test_a_scale_of_its_own() -> None:
    world, generator = mixture(), GuidedWorld(mixture())
    z_t, t, reward = world.sample(3), torch.full((3,), 0.6), ClosedFormReward(known())

    def v(**settings: Any) -> Tensor:
        return TweedieValue(generator, reward, **settings).bind(PROMPTS)(z_t, t)

    assert torch.allclose(v(velocity="cfg", guidance_scale=1.0), v(velocity="prompt"), atol=1e-5)
    assert torch.allclose(v(velocity="cfg", guidance_scale=0.0), v(), atol=1e-5)
    assert torch.equal(v(velocity="cfg", guidance_scale=G), v(velocity="cfg"))
    assert (v(velocity="cfg") - v(velocity="prompt")).abs().min() > 0.05


def test_what_a_sampler_may_take() -> None:
    generator, reward = GuidedWorld(mixture()), ClosedFormReward(known())

    def part(velocity: str, scale: float | None = None, own: float | None = None) -> str | None:
        value = TweedieValue(generator, reward, velocity=velocity, guidance_scale=own)
        return value.bind(PROMPTS).velocity_part(generator, PROMPTS, scale)

    assert [part(v) for v in ("null", "prompt", "cfg")] == ["null", "prompt", "whole"]
    assert part("cfg", G) == "whole" and part("cfg", 3.0) is None
    assert part("cfg", 3.0, own=3.0) == "whole" and part("cfg", own=3.0) is None
    # one branch: the prompt's is the whole, the null text's is not run
    assert [part(v, 1.0) for v in ("null", "prompt", "cfg")] == [None, "whole", None]

    bound = TweedieValue(generator, reward, velocity="cfg").bind(PROMPTS)
    assert bound.velocity_part(GuidedWorld(mixture()), PROMPTS) is None
    assert bound.velocity_part(generator, PROMPTS[::-1]) is None
    null = TweedieValue(generator, reward).bind()
    assert null.velocity_part(generator, PROMPTS) == "null"


def test_the_velocity_of_a_real_generator_is_its_own(tiny_sd3: Path, tiny_clip: Path) -> None:
    generator = Generator(str(tiny_sd3), text_tokens=12, guidance_scale=4.5)
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    prompts = ["a red circle", "a blue square"]
    value = TweedieValue(generator, reward, velocity="cfg").bind(prompts)
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8])
    cond = generator.encode_prompts(prompts)
    with torch.no_grad():
        v, u, direction = value.with_velocity(z_t, t, cond)
        assert torch.equal(v, value(z_t, t))
        for got, own in zip((u, direction), generator.velocity_parts(z_t, t, cond), strict=True):
            assert torch.equal(got, own)
        pixels = generator.vae.decode(FlowPath.denoise(z_t, u, t))
        assert torch.allclose(v, reward(pixels, reward.encode_text(prompts)), atol=1e-5)


def test_checkpointing_keeps_less_and_changes_nothing(tiny_sd3: Path, tiny_clip: Path) -> None:
    reward = CLIPReward(model=f"local-dir:{tiny_clip}").requires_grad_(False)
    prompts, t = ["a red circle", "a blue square"], torch.tensor([0.3, 0.8])
    z_t = torch.randn(2, 4, 8, 8, requires_grad=True)
    kept, gradients = {}, {}
    for name in ("nothing", "whole", "blocks"):
        generator = Generator(
            str(tiny_sd3),
            text_tokens=12,
            guidance_scale=4.5,
            gradient_checkpointing=name == "blocks",
        )
        value = TweedieValue(generator, reward, velocity="cfg", checkpointing=name != "nothing")
        bound = value.bind(prompts)
        size: dict[int, int] = {}

        def pack(x: Tensor, size: dict[int, int] = size) -> Tensor:
            size[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            v = bound(z_t, t)
        kept[name] = sum(size.values())
        (gradients[name],) = torch.autograd.grad(v.sum(), z_t)
    assert torch.allclose(gradients["whole"], gradients["nothing"], rtol=1e-4, atol=1e-7)
    assert torch.allclose(gradients["blocks"], gradients["nothing"], rtol=1e-4, atol=1e-7)
    assert kept["whole"] < kept["blocks"] < 0.7 * kept["nothing"]


def settings(*parts: torch.nn.Module) -> list[Any]:
    """Returns everything about networks that is neither a weight nor a submodule, and what their weights are."""
    plain = (bool, str, int, float)
    return [
        (
            name,
            {k: v for k, v in vars(module).items() if isinstance(v, plain)},
            "_gradient_checkpointing_func" in vars(module),
            [(p.requires_grad, p.dtype) for p in module.parameters(recurse=False)],
        )
        for part in parts
        for name, module in part.named_modules()
    ]


def test_a_value_leaves_what_it_shares_as_it_was(tiny_sd3: Path, tiny_clip: Path) -> None:
    generator = Generator(str(tiny_sd3), text_tokens=12, guidance_scale=4.5)
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    generator.transformer.proj_out.weight.requires_grad_(True)  # as of a policy in training
    before = settings(generator, reward)
    value = TweedieValue(generator, reward, velocity="cfg", checkpointing=True)
    bound, t = value.bind(["a red circle"]), torch.tensor([0.4])
    z_t = torch.randn(1, 4, 8, 8, requires_grad=True)
    v = bound(z_t, t)
    assert settings(generator, reward) == before
    torch.autograd.grad(v.sum(), z_t)
    with pytest.raises(ValueError, match="for the VAE of"), checkpointed(generator.vae):
        generator.vae.decode(torch.randn(1, 3, 8, 8))
    assert settings(generator, reward) == before
    # a decoder that its owner has checkpointed stays so
    generator.vae.network.enable_gradient_checkpointing()
    before = settings(generator, reward)
    torch.autograd.grad(bound(z_t, t).sum(), z_t)
    assert settings(generator, reward) == before


def test_errors_say_what_is_wrong() -> None:
    generator, reward = GuidedWorld(mixture()), ClosedFormReward(known())
    with pytest.raises(ValueError, match="expected one of null, prompt, cfg"):
        TweedieValue(generator, reward, velocity="both")
    with pytest.raises(ValueError, match="which has no guidance"):
        TweedieValue(generator, reward, guidance_scale=3.0)
    with pytest.raises(ValueError, match="no prompts came"):
        TweedieValue(generator, reward, velocity="cfg").bind()(
            torch.zeros(1, 2, 1, 1), torch.ones(1)
        )
    factory = TweedieFactory("cfg", guidance_scale=3.0, checkpointing=True)
    value = factory(Parts(reward=lambda: reward, generator=lambda: generator))
    assert (value.velocity, value.guidance_scale, value.checkpointing) == ("cfg", 3.0, True)
