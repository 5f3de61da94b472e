"""Gradients that every rank has summed up by itself, averaged at once; their norm and its limit.

Weights that FSDP2 has sharded are the exception: it averages their gradients in each backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stitchvm.adapters.policy import full_tensor
from stitchvm.modules.ranks import world_size

__all__ = ["average_gradients", "clip_gradients", "gradient_norm"]

AT_ONCE = 2**27  # half a gigabyte; all of LoRA's are less


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Replaces gradients by their means over ranks, and returns the mean loss, all in one exchange.

    Those of more than `AT_ONCE` numbers take several, so that no second copy of them all need lie beside them. What is
    not finite on one rank is not finite on any afterwards.

    Arguments:
        parameters: The trained weights; one without a gradient gets zeros.
        loss: This rank's loss, a scalar.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world_size() == 1:
        return loss
    mean = loss.detach().clone().float()
    own = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for part in _portions([mean, *own]):
        flat = torch.cat([x.flatten().float() for x in part])
        dist.all_reduce(flat)
        flat /= world_size()
        for x, found in zip(part, flat.split([x.numel() for x in part]), strict=True):
            x.copy_(found.view_as(x))
    return mean


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Returns the ℓ2 norm of all gradients together, a scalar; every rank must call it under FSDP2."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return full_tensor(nn.utils.get_total_norm(gradients))


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scales gradients of norm `norm` down to `limit`, if they are longer."""
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def _portions(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields tensors in turn, as many together as have at most `AT_ONCE` numbers, or one."""
    portion: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        numbers += tensor.numel()
        if portion and numbers > AT_ONCE:
            yield portion
            portion, numbers = [], tensor.numel()
        portion.append(tensor)
    yield portion
