"""Gradients that every rank has summed up by itself, averaged at once; their norm and its limit.

Weights that FSDP2 has sharded are the exception: it averages their gradients in each backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stitchvm.adapters.policy import full_tensor
from stitchvm.modules.ranks import world_size

__all__ = ["average_gradients", "clip_gradients", "gradient_norm", "warm_up"]


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Replaces gradients by their means over ranks, and returns the mean loss, all in one exchange.

    What is not finite on one rank is not finite on any afterwards.

    Arguments:
        parameters: The trained weights; one without a gradient gets zeros.
        loss: This rank's loss, a scalar.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world_size() == 1:
        return loss
    own = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    flat = torch.cat([loss.reshape(1).float(), *(g.flatten().float() for g in own)])
    dist.all_reduce(flat)
    flat /= world_size()
    mean, *parts = flat.split([1, *(g.numel() for g in own)])
    for gradient, part in zip(own, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return mean.reshape(())


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Returns the ℓ2 norm of all gradients together, a scalar; every rank must call it under FSDP2."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return full_tensor(nn.utils.get_total_norm(gradients))


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scales gradients of norm `norm` down to `limit`, if they are longer."""
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def warm_up(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns a schedule that rises linearly over some steps, from 1/steps, and stays."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, steps))
    )
