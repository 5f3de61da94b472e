"""FSDP2 for a value model: what is sharded, and how its full state is gathered again."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stitchvm.value_model import StitchedValueModel

__all__ = ["full_state", "shard_value_model"]


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


def full_state(model: StitchedValueModel) -> dict[str, Tensor]:
    """Returns the state of stitch and tail; gathers shards, so every rank must call it."""
    return {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in model.trainable().items()
    }
