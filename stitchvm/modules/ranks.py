"""What the processes of a run tell each other. Alone, each function returns what it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_agree", "all_mean", "gather", "gather_objects", "leave", "world_size"]


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """Returns the rows of all ranks, x (B, ...) one after the other in the order of the ranks; B is the same on all."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_objects(value: Any) -> list[Any]:
    """Returns plain data of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def all_mean(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the means over ranks of scalars by name, in one exchange; a rank may lack some."""
    flat = [values[name].detach().double() for name in values]
    own = dict(zip(values, torch.stack(flat).tolist() if flat else [], strict=True))
    ranks = gather_objects(own)
    names = dict.fromkeys(name for each in ranks for name in each)
    found = {name: [each[name] for each in ranks if name in each] for name in names}
    return {name: sum(each) / len(each) for name, each in found.items()}


def all_agree(yes: bool, device: torch.device) -> bool:
    """Returns whether all ranks say yes."""
    if world_size() == 1:
        return yes
    flag = torch.tensor(float(yes), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def leave() -> None:
    """Ends the process group, once all is done.

    Lightning does so with NCCL only. Left to the interpreter's exit, Gloo's threads now and then abort the process
    ("terminate called without an active exception"), and a finished run looks like a failed one.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
