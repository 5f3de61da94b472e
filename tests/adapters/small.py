"""What the tests of adapters share: a small generator, adapters that are not zero, their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.generator import Generator

Z_T, T = (
    torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
    torch.tensor([0.3, 0.8]),
)


def generator_of(folder: Path, **options: Any) -> Generator:
    return Generator(str(folder), text_tokens=12, **options)


def scatter(policy: PolicyAdapters) -> None:
    """Gives every adapter its own random weights, A and B."""
    for number, name in enumerate(("default", *policy.copies)):
        source = torch.Generator().manual_seed(number)
        for weight in policy.parameters(name).values():
            weight.data.copy_(torch.randn(weight.shape, generator=source) * 0.3)


def velocity(generator: Generator, z_t: Tensor = Z_T) -> Tensor:
    return generator.velocity(z_t, T, generator.null)


def gradients(policy: PolicyAdapters, name: str = "default") -> list[Tensor | None]:
    found = [p.grad for p in policy.parameters(name).values()]
    for p in policy.trainable():
        p.grad = None
    return found
