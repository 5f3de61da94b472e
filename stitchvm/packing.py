"""Half the size of fp16: matrices as int8 with one scale per row, everything else as fp16.

    W ≈ diag(s) Q,      s_k = max_l |W_kl| / 127,      |W − diag(s) Q| ≤ s/2 entrywise

For value models that are shipped: rounding to 1/254 of a row's largest entry is far below what their metrics see
(the shipped ones' cards say how far). Training, resuming and `stitchvm fit` know nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = ".scale"
LEAST = 4096  # entries; smaller matrices are not worth a rounding


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state with its large weight matrices as int8 and `NAME.scale` (rows,) float32, the rest as fp16."""
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        value = value.detach().float()
        if not name.endswith("weight") or value.ndim < 2 or value.numel() < LEAST:
            packed[name] = value.half()
            continue
        rows = value.flatten(1)
        scale = rows.abs().amax(1).clamp_min(1e-12) / 127
        packed[name] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
        packed[name + SCALE] = scale
    return packed


def unpack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state that `pack` was given, rounded; any other state as it is.

    Raises:
        ValueError: If an int8 matrix has no scale of its own.
    """
    answer: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in state:
            continue
        if value.dtype == torch.int8:
            scale = state.get(name + SCALE)
            if scale is None or scale.shape != value.shape[:1]:
                raise ValueError(
                    f"{name} is int8 with shape {tuple(value.shape)}, but there is no {name + SCALE} with shape "
                    f"({len(value)},): the file is not what `pack` wrote."
                )
            value = (value.flatten(1).float() * scale.float()[:, None]).view(value.shape)
        answer[name] = value
    return answer
