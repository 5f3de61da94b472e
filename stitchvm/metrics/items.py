"""The mean of a number per item, each item counted once whatever processes repeat."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from stitchvm.metrics.estimate import Estimate, first_by_index, mean


class ItemMean(Metric):
    """The mean over all items, exact under several devices; `compute` returns an `Estimate`."""

    values: list[Tensor]
    index: list[Tensor]

    full_state_update = False
    is_differentiable = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("values", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor, index: Tensor) -> None:
        """Adds items.

        Arguments:
            values: One number per item, with shape (B,).
            index: The items' indices in the data set, with shape (B,).

        Raises:
            ValueError: If shapes disagree or a value is not finite.
        """
        if values.shape != index.shape or values.dim() != 1:
            raise ValueError(
                f"got values {tuple(values.shape)} and index {tuple(index.shape)}: expected two vectors of one length."
            )
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            raise ValueError(f"the values of the items {index[bad].tolist()[:5]} are not finite.")
        self.values.append(values.detach().double())
        self.index.append(index.long())

    def items(self) -> tuple[Tensor, Tensor]:
        """Returns indices and values of all items added on this process, sorted by index."""
        index, values = dim_zero_cat(self.index), dim_zero_cat(self.values)
        keep = first_by_index(index)
        return index[keep], values[keep]

    def compute(self) -> Estimate:
        """Returns the mean with its standard error over items."""
        return mean(self.items()[1])
