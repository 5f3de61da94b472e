"""FSDP2 for a value model and for a generator's transformer: what is sharded, and how full state is gathered again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from stitchvm.value_model import StitchedValueModel

__all__ = ["full_state", "shard_transformer", "shard_value_model", "sharded_mark"]


def shard_value_model(model: StitchedValueModel, mesh: DeviceMesh) -> None:
    """Shards stitch and tail over `mesh`, the tail block by block, and the frozen backbone likewise.

    Backbones and tails expose their repeated blocks as `blocks`; what is left becomes one root unit.
    """
    for module in (model.tail, model.backbone):
        blocks = getattr(module, "blocks", None)
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
        if next(module.parameters(), None) is not None:
            fully_shard(module, mesh=mesh)
    fully_shard(model.stitch, mesh=mesh)


def shard_transformer(
    transformer: Any, mesh: DeviceMesh, replicated: Iterable[nn.Parameter] | None = None
) -> None:
    """Shards a diffusers transformer over `mesh`, block by block.

    Adapters stay whole on every rank: they are small, float32 beside bfloat16 blocks, and their gradients are averaged
    once per update instead of in every backward pass. With them stays whatever is outside of the blocks (embeddings
    and head, a few percent), so that a value model may borrow the transformer's blocks: shards can be used only by the
    module that owns them, in its forward.

    Arguments:
        transformer: The transformer, on this rank's device.
        mesh: The ranks.
        replicated: The adapters; None if the transformer's own weights are trained, which are all sharded then.
    """
    lists = [m for m in transformer.children() if isinstance(m, nn.ModuleList)]
    blocks = [
        block for each in lists for block in each if next(block.parameters(), None) is not None
    ]
    whole = set() if replicated is None else set(replicated)
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    if replicated is not None:
        inside = {p for block in blocks for p in block.parameters()}
        whole |= {p for p in transformer.parameters() if p not in inside}
    fully_shard(transformer, mesh=mesh, ignored_params=whole)


def sharded_mark(mesh: DeviceMesh | None) -> nn.Parameter:
    """Returns an unused weight in shards: Lightning reads a checkpoint only into a model that has one.

    Without ranks to shard over it is whole, so that the weights behind it have the same numbers in every checkpoint.
    """
    if mesh is None:
        return nn.Parameter(torch.zeros(1), requires_grad=False)
    zeros = torch.zeros(mesh.size(), device=mesh.device_type)
    return nn.Parameter(distribute_tensor(zeros, mesh, [Shard(0)]), requires_grad=False)


def full_state(model: StitchedValueModel) -> dict[str, Tensor]:
    """Returns the state of stitch and tail; gathers shards, so every rank must call it."""
    return {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in model.trainable().items()
    }
