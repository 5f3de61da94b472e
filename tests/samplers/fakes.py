"""A generator, a reward and values whose flow and expectations are those of a closed-form world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.schedule import sigma_grid
from stitchvm.values.base import BoundValue, Prefixes
from stitchvm.world.closed_form import KnownReward, MixtureWorld
from tests.values.fakes import IdentityVAE


class ClosedFormGenerator(nn.Module):
    """The exact velocity of a closed-form world with event shape (C, H, W); a prompt "+x" adds x to the means."""

    id = "closed form"

    def __init__(self, world: MixtureWorld) -> None:
        super().__init__()
        self.world, self.vae, self.null = world, IdentityVAE(), None
        self.latent_channels, *size = world.event
        self.default_size = tuple(size)
        self.device = torch.device("cpu")
        self.calls: list[int] = []

    def sigmas(self, num_steps: int, latent_size: tuple[int, int] | None = None) -> Tensor:
        return sigma_grid(num_steps, kind="linear")

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(prompt or 0) for prompt in prompts]).double()

    def velocity(
        self, z_t: Tensor, t: Tensor, cond: Any, guidance_scale: float | None = None
    ) -> Tensor:
        self.calls.append(len(z_t))
        shift = cond.reshape(-1, 1, 1, 1)
        level = t.reshape(-1, 1, 1, 1).to(z_t.dtype)
        moved = z_t.double() - (1 - level) * shift
        return (self.world.velocity(moved, t) - shift).to(z_t.dtype)


class KnownValue:
    """A value with a closed form: "expected" E[r | z_t], "soft" log E[exp r | z_t] or "tweedie" r(D(z_t))."""

    def __init__(self, world: MixtureWorld, reward: KnownReward, kind: str = "soft") -> None:
        self.world, self.reward, self.kind = world, reward, kind
        self.differentiable = True
        self.asked: list[tuple[int, float]] = []

    def bind(self, prompts: Sequence[str] | None = None, *, generator: Any = None) -> KnownBound:
        return KnownBound(self)


class KnownBound(BoundValue):
    """`KnownValue` bound to prompts, which it ignores."""

    name = "known value"

    def __init__(self, value: KnownValue) -> None:
        self.value = value

    def __call__(self, z_t: Tensor, t: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        v = self.value
        v.asked.append((len(z_t), float(t[0])))
        z_t = z_t.double() if v.differentiable else z_t.detach().double()
        if v.kind == "soft":
            return v.world.soft_value(z_t, t, v.reward)
        if v.kind == "expected":
            return v.world.value(z_t, t, v.reward)
        return v.world.tweedie_value(z_t, t, v.reward)

    def select(self, index: Tensor) -> KnownBound:
        return self
