"""Spearman's rank correlation (SRCC) of scores with human or true scores, each sample counted once.

torchmetrics' own coefficient (which averages tied ranks, as SciPy's) with samples told apart by index. The
standard error is Bonett and Wright's (2000) for Fisher's z, carried back: (1 − ρ²)·sqrt((1 + ρ²/2)/(n − 3)), and not
defined for n ≤ 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

from stitchvm.metrics.estimate import Estimate, first_by_index


class SpearmanCorrelation(Metric):
    """SRCC over all samples, exact under several devices; `compute` returns `{"srcc": Estimate}`."""

    score: list[Tensor]
    target: list[Tensor]
    index: list[Tensor]

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        for name in ("score", "target", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, score: Tensor, target: Tensor, index: Tensor) -> None:
        """Adds samples.

        Arguments:
            score: The scores, with shape (B,).
            target: What they are compared with, with shape (B,).
            index: The samples' indices in the data set, with shape (B,).

        Raises:
            ValueError: If shapes disagree or a score is not finite.
        """
        if not (score.shape == target.shape == index.shape and score.dim() == 1):
            raise ValueError(
                f"got score {tuple(score.shape)}, target {tuple(target.shape)} and index "
                f"{tuple(index.shape)}: expected three vectors of one length."
            )
        if not bool(torch.isfinite(score).all() & torch.isfinite(target).all()):
            raise ValueError("a score or its target is not finite: it has no rank.")
        self.score.append(score.double())
        self.target.append(target.double())
        self.index.append(index.long())

    def compute(self) -> dict[str, Estimate]:
        """Returns the rank correlation; NaN if one side is constant."""
        keep = first_by_index(dim_zero_cat(self.index))
        score, target = dim_zero_cat(self.score)[keep], dim_zero_cat(self.target)[keep]
        n = len(score)
        rho = torch.full((), torch.nan, dtype=torch.float64, device=score.device)
        if n > 1 and bool(score.min() < score.max()) and bool(target.min() < target.max()):
            rho = spearman_corrcoef(score, target).double()
        stderr = (1 - rho**2) * ((1 + rho**2 / 2) / (n - 3 if n > 3 else torch.nan)).sqrt()
        return {"srcc": Estimate(rho, stderr, torch.tensor(n, device=rho.device))}
