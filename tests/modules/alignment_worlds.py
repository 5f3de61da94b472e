"""Closed-form worlds whose velocity can be trained: u_t(z) = the exact one + a shift per level; updates by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stitchvm.adapters.full import PolicyWeights
from stitchvm.modules import groups
from stitchvm.modules.alignment import Alignment
from stitchvm.modules.rows import Rows
from stitchvm.schedule import sigma_grid
from stitchvm.values.base import Generators, Value
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.world.closed_form import GaussianWorld, KnownReward, MixtureWorld
from tests.modules.alignment_fakes import FactorVAE
from tests.values.fakes import ClosedFormReward

SLOPE = torch.tensor([0.6, -0.8])[:, None, None]
PROMPTS = ["one", "two", "three", "four"]


def linear() -> KnownReward:
    """Returns r(z) = a·z with ‖a‖ = 1."""
    return KnownReward.linear(SLOPE)


def gaussian() -> GaussianWorld:
    """Returns N(m, 0.5) with event shape (2, 1, 1)."""
    return GaussianWorld(torch.tensor([0.5, 0.3])[:, None, None], 0.5)


class Field(nn.Module):
    """The exact velocity of a world, and a trained shift for each level of a grid."""

    def __init__(self, world: MixtureWorld, sigmas: Tensor) -> None:
        super().__init__()
        self.world, self.sigmas = world, sigmas[:-1]
        self.shift = nn.Parameter(torch.zeros(len(self.sigmas), *world.event))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        level = (t[:, None] - self.sigmas).abs().argmin(dim=1)
        return self.world.velocity(z, t) + self.shift[level]


class FieldGenerator(nn.Module):
    """A generator around a `Field`; prompts mean nothing, pixels are latents."""

    id, patch, null = "field", 1, None

    def __init__(self, world: MixtureWorld, num_steps: int) -> None:
        super().__init__()
        self.vae = FactorVAE()
        self.transformer = Field(world, sigma_grid(num_steps, kind="linear"))
        self.latent_channels, *size = world.event
        self.default_size = tuple(size)

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        return None

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        return None

    def velocity(
        self, z_t: Tensor, t: Tensor, cond: Any, guidance_scale: float | None = None
    ) -> Tensor:
        return self.transformer(z_t, t)


class ExactValue(Value):
    """E[r | z_t] of a world."""

    def __init__(self, world: MixtureWorld, known: KnownReward) -> None:
        super().__init__(ClosedFormReward(known))
        self.world, self.known = world, known

    def embed(
        self,
        z_t: Tensor,
        t: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        share = self.world.value(z_t, t, self.known) / self.reward.bound
        return torch.stack([share, (1 - share**2).sqrt()], dim=-1)


class ExactFactory(ValueFactory):
    """Builds an `ExactValue`."""

    def __init__(self, world: MixtureWorld, known: KnownReward) -> None:
        self.world, self.known = world, known

    def __call__(self, parts: Parts) -> ExactValue:
        return ExactValue(self.world, self.known)


def in_a_world(
    method: type[Alignment], world: MixtureWorld, num_steps: int, **model: Any
) -> Alignment:
    """Returns a module whose generator is a `Field` and whose value is exact, built and without a Trainer."""
    module = method(
        generator=partial(FieldGenerator, world, num_steps),
        value=ExactFactory(world, linear()),
        policy=PolicyWeights,
        num_steps=num_steps,
        grid="linear",
        micro_batch=None,
        **model,
    )
    module.configure_model()
    return module


def rows(prompts: Sequence[str], group_size: int, update: int = 0, first: int = 0) -> Rows:
    """Returns the rows of a batch of prompts with indices first, first + 1, …"""
    index = torch.arange(first, first + len(prompts))
    batch = {"index": index, "prompt": list(prompts)}
    return Rows.of(batch, group_size, 0, update, torch.device("cpu"))


def run(module: Alignment, some: Rows) -> tuple[Any, list[float], dict[str, Tensor]]:
    """Returns the roll-out, the losses and the summed-up gradients of an update, by name; makes no step."""
    for p in module.policy.parameters().values():
        p.grad = None
    rolled = module.rollout(some)
    losses = []
    for loss in module.micro_steps(some, rolled):
        if loss is not None:
            loss.backward()
            losses.append(loss.item())
    grads = {
        key: p.grad.clone() for key, p in module.policy.parameters().items() if p.grad is not None
    }
    return rolled, losses, grads


def two_ranks(
    module: Alignment, prompts: Sequence[str], group_size: int, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Any, dict[str, Tensor]]]:
    """Returns what each of two ranks with half of the prompts rolls out, and its gradient, one after the other."""
    half = len(prompts) // 2
    parts = [rows(prompts[:half], group_size), rows(prompts[half:], group_size, first=half)]
    sent: list[list[Tensor]] = [[], []]
    for part, own in zip(parts, sent, strict=True):  # what each rank sends

        def send(x: Tensor, own: list[Tensor] = own) -> Tensor:
            own.append(x)
            return x

        monkeypatch.setattr(groups, "gather", send)
        module.rollout(part)
    answers = [torch.cat(pair) for pair in zip(*sent, strict=True)]
    found = []
    for rank, part in enumerate(parts):
        left = list(answers)
        monkeypatch.setattr(groups, "gather", lambda x, left=left: left.pop(0))
        monkeypatch.setattr(type(module), "global_rank", rank)
        rolled, _, gradient = run(module, part)
        assert not left
        found.append((rolled, gradient))
    return found


def mean_image(module: Alignment, n: int = 512) -> Tensor:
    """Returns the mean of z_0 over roll-outs without noise, from noises that are the same for every policy."""
    noise = torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return module.walk(noise, None, 0, module.num_steps).mean(dim=0)
