"""Gradients come back to FLUX's attention in one layout, which cuDNN's backward pass counts on.

A single block of FLUX joins the attention's output and the MLP's, so the gradient of the one is a slice of theirs:
rows of 3072 numbers, 15,360 apart. In a double block rows lie side by side. torch (2.11, with cuDNN 9.19) prepares
cuDNN's backward kernel for the layout that comes first and takes it again for the other: on an H200 the gradient of
FLUX.1-dev was 6 % too short, or memory was read that nobody had allocated. Copied, slices are like the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["dense_gradients"]


def dense_gradients(transformer: Any) -> None:
    """Makes gradients into the attention of a transformer's single blocks contiguous; values stay the same.

    Arguments:
        transformer: The diffusers transformer, of any family; what has been done already is not done again.
    """
    for block in getattr(transformer, "single_transformer_blocks", ()):
        if _copied not in block.attn._forward_hooks.values():
            block.attn.register_forward_hook(_copied)


def _copied(module: Any, args: Any, output: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output
    answer: Tensor = _Copied.apply(output)
    return answer


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
