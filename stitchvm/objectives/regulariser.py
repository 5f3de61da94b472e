r"""The output regulariser: how far the policy's velocity has moved from the frozen model's.

    R(θ; θ_0) = mean over the entries of (u_θ(z_t) − u_{θ_0}(z_t))²

at the *same* states z_t, averaged over the steps where it is taken. DRaFT's λR (63, 64) and the term that
DiffusionNFT's reference calls KL are both this. It is zero, with a zero gradient, at a LoRA's start (B = 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stitchvm.path import working_dtype

__all__ = ["mean_over_entries", "output_regulariser"]


def mean_over_entries(x: Tensor) -> Tensor:
    """Returns the mean of x over all axes but the first, with shape (B,)."""
    return x.flatten(1).mean(1)


def output_regulariser(u: Tensor | Sequence[Tensor], u_ref: Tensor | Sequence[Tensor]) -> Tensor:
    """Returns R with shape (B,), differentiable in u; no gradient goes into `u_ref`.

    Arguments:
        u: The policy's velocities, with shape (B, ...), of one step or of several.
        u_ref: The frozen model's at the same states, likewise.

    Raises:
        ValueError: If the numbers of steps or the shapes differ, or there is no step.
    """
    steps = [u] if isinstance(u, Tensor) else list(u)
    references = [u_ref] if isinstance(u_ref, Tensor) else list(u_ref)
    shapes = [tuple(x.shape) for x in steps], [tuple(x.shape) for x in references]
    if not steps or shapes[0] != shapes[1]:
        raise ValueError(
            f"the policy's velocities have shapes {shapes[0]}, the frozen model's {shapes[1]}: expected one pair per "
            "step, at the same states."
        )
    dtype = working_dtype(*steps, *references)
    each = [
        mean_over_entries((x.to(dtype) - y.detach().to(dtype)).square())
        for x, y in zip(steps, references, strict=True)
    ]
    return torch.stack(each).mean(0)
