"""Random numbers that depend on what is sampled, not on how samples are batched.

A generator is seeded from a tuple of integers (a seed, a sample's index, an epoch, ...), so that the noise of
a sample is the same for every batch size, number of devices and point of resumption, and no random state has
to be stored for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["keyed_generator", "keyed_normal", "keyed_uniform"]


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator on `device` seeded by a hash of `key` (63 bits)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator


def keyed_normal(
    keys: Iterable[Sequence[int | str]], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Returns standard normal noise (B, *shape), float32, each row drawn from its own key."""
    rows = [
        torch.randn(
            *shape,
            generator=keyed_generator(*key, device=device),
            device=device,
            dtype=torch.float32,  # whatever the default is: the precision bf16-true changes it
        )
        for key in keys
    ]
    return torch.stack(rows)


def keyed_uniform(
    keys: Iterable[Sequence[int | str]], n: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns uniforms in [0, 1) with shape (B, n), float32, each row drawn from its own key.

    They are drawn on the CPU and moved: a noise level is then the same on every kind of device.
    """
    rows = [torch.rand(n, generator=keyed_generator(*key), dtype=torch.float32) for key in keys]
    return torch.stack(rows).to(device)
