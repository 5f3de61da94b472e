"""A generator whose velocity is a small trainable network, values with known gradients, and DRaFT with both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.adapters.full import PolicyWeights
from stitchvm.modules.draft import DRaFT
from stitchvm.modules.held_out import Evaluation
from stitchvm.rewards.base import NotFiniteError
from stitchvm.samplers.plain import PlainSampler
from stitchvm.values.base import Generators, Value
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.terminal import TerminalValue
from tests.values.fakes import FakeReward, IdentityVAE

SHAPE = (3, 4, 4)


class Scale(nn.Module):
    """u = a·z."""

    def __init__(self, a: float = -0.3) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.a * z


class Curved(nn.Module):
    """A velocity that is nonlinear in z, t and the weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.W = nn.Parameter(0.5 * torch.randn(3, 3, generator=generator, device="cpu"))
        self.b = nn.Parameter(torch.randn(3, generator=generator, device="cpu"))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        mixed = torch.einsum("ij,bjhw->bihw", self.W, z)
        return torch.tanh(mixed + (self.b * t[:, None])[..., None, None])


class NetworkGenerator(nn.Module):
    """The generator around such a network; `calls` counts rows."""

    id, patch, latent_channels, guidance_scale = "network", 1, SHAPE[0], 1.0

    def __init__(self, network: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.transformer, self.vae = network(), FactorVAE()
        self.default_size, self.device = SHAPE[1:], torch.device("cpu")
        self.calls: list[int] = []

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1)

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        self.encoded = list(prompts)

    def velocity(
        self, z_t: Tensor, t: Tensor, cond: Any, guidance_scale: float | None = None
    ) -> Tensor:
        assert guidance_scale == 1.0 and len(z_t) == len(cond) == len(t)
        self.calls.append(len(z_t))
        return self.transformer(z_t, t)


class FactorVAE(IdentityVAE):
    """Pixels are latents; their values need not lie in [0, 1]."""

    factor, scale, shift = 1, 1.0, 0.0

    def decode(self, z_0: Tensor, clamp: bool = False) -> Tensor:
        pixels = super().decode(z_0)
        return pixels.clamp(0, 1) if clamp else pixels


class Sum(Value):
    """V(z, t) = (1 + t)·sum of w·z, any level; NaN or an error on request."""

    def __init__(self, w: float = 0.1) -> None:
        super().__init__(FakeReward(uses_text=False))
        self.w, self.asked = w, []

    def embed(
        self,
        z_t: Tensor,
        t: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        self.asked.append((z_t.detach().clone(), t.clone()))
        return ((1 + t) * self.w * z_t.flatten(1).sum(1))[:, None]

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        return image[:, 0]


class Given(ValueFactory):
    """Builds what it was given."""

    def __init__(self, value: Value) -> None:
        self.value = value

    def __call__(self, parts: Parts) -> Value:
        return self.value


class TerminalSum(ValueFactory):
    """A terminal value."""

    def __call__(self, parts: Parts) -> Value:
        return TerminalValue(parts.vae, FakeReward(uses_text=False))


def networks(
    network: Callable[[], nn.Module] = Curved, value: Value | None = None
) -> dict[str, Any]:
    """Returns the arguments generator, value and policy of an alignment module."""
    return {
        "generator": partial(NetworkGenerator, network),
        "value": Given(value or Sum()),
        "policy": PolicyWeights,
    }


def draft(value: Sum | None = None, cls: type[DRaFT] = DRaFT, **settings: Any) -> DRaFT:
    """Returns a small DRaFT on `networks`."""
    defaults = {"num_steps": 3, "lam": 0.1, "lr": 0.05, "micro_batch": 3, "group_size": 2}
    return cls(**(networks(Curved, value) | defaults | settings))


def evaluated(**settings: Any) -> DRaFT:
    """Returns one whose held-out prompts are scored by a fake reward."""
    sampler = PlainSampler(num_steps=2, guidance_scale=1.0, grid="single")
    rewards = {"fake": partial(FakeReward, uses_text=False)}
    return draft(evaluation=Evaluation(rewards, sampler=sampler, pictures=3), **settings)


class Broken(Sum):
    """Fails in one way or the other when it is asked for the n-th time, counted from 0."""

    def __init__(self, kind: str, *when: int) -> None:
        super().__init__()
        self.kind, self.when = kind, when

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        v = image[:, 0]
        if len(self.asked) - 1 not in self.when:
            return v
        if self.kind == "error":
            raise NotFiniteError("the reward is not finite")
        if self.kind == "value":
            return torch.where(torch.arange(len(v)) == 0, torch.nan, v)
        return v + (0 * v).sqrt()  # finite, but not its gradient
