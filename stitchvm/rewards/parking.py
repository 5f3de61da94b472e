"""Networks that wait in CPU memory until they are called.

A stitched value needs of its reward what encodes prompts, once per batch, and what scores embeddings; what chooses and
judges finished images needs the vision tower, once per batch, too. In between, for all the steps of a sampler, a ViT-H
in float32 would hold 3.9 GB of a GPU for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["CPU", "present"]

CPU = torch.device("cpu")


@contextmanager
def present(module: nn.Module, device: torch.device, parked: bool) -> Iterator[None]:
    """Has a module on a device within the context, and back in CPU memory afterwards if it is parked.

    Arguments:
        module: The module.
        device: Where it is called.
        parked: Whether it waits in CPU memory; if not, nothing is moved.
    """
    if not parked or device == CPU:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(CPU)
