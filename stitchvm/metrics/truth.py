"""How far a value is from Monte Carlo truth E[r(z_0) | z_t] at one noise level.

The truth of a sample is the mean (a + b)/2 of two independent halves of its roll-outs, so its own noise is
known: E[(a − b)²]/4 =: s². With m the mean squared error and v the variance of the truth over samples,

    R² = 1 − m / v,      noise-corrected R² = 1 − (m − s²) / (v − s²),      RMSE = √m.

R² is 1 for the truth, 0 for the best constant, and negative for worse than that. The correction removes
the truth's noise from both, which the plain R² charges to the estimator. With ρ the correlation of estimate and
truth, ρ² is the R² after the best affine map of the estimate ("r2_calibrated"): what is lost between the two is
bias and scale, which a ranking, a resampling weight or a step size does not see. Standard errors: 1000 bootstrap
resamples of the samples, with a fixed seed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from stitchvm.metrics.estimate import Estimate, first_by_index


def truth_errors(estimate: Tensor, half_a: Tensor, half_b: Tensor) -> dict[str, Tensor]:
    """Returns r2, r2_corrected, r2_calibrated (ρ²), bias (mean of estimate − truth), rmse, truth_noise (s) and
    truth_std (√v) over the last dimension.

    Arguments:
        estimate: The estimated values, with shape (..., N).
        half_a: The truth from one half of the roll-outs, with shape (..., N).
        half_b: The truth from the other half, with shape (..., N).
    """
    truth = (half_a + half_b) / 2
    mse = (estimate - truth).square().mean(dim=-1)
    variance = truth.var(dim=-1, correction=0)
    noise = (half_a - half_b).square().mean(dim=-1) / 4
    spread = estimate.var(dim=-1, correction=0)
    both = (estimate * truth).mean(dim=-1) - estimate.mean(dim=-1) * truth.mean(dim=-1)
    return {
        "r2": 1 - mse / variance,
        "r2_corrected": 1 - (mse - noise) / (variance - noise),
        "r2_calibrated": both.square() / (spread * variance),
        "bias": (estimate - truth).mean(dim=-1),
        "rmse": mse.sqrt(),
        "truth_noise": noise.sqrt(),
        "truth_std": variance.sqrt(),
    }


class TruthError(Metric):
    """R² and RMSE against Monte Carlo truth; `compute` returns an `Estimate` per key of `truth_errors`."""

    estimate: list[Tensor]
    half_a: list[Tensor]
    half_b: list[Tensor]
    index: list[Tensor]

    full_state_update = False
    is_differentiable = False

    def __init__(self, resamples: int = 1000) -> None:
        super().__init__()
        self.resamples = resamples
        for name in ("estimate", "half_a", "half_b", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, estimate: Tensor, half_a: Tensor, half_b: Tensor, index: Tensor) -> None:
        """Adds samples (possibly none: every process must call it equally often).

        Arguments:
            estimate: The estimated values, with shape (B,).
            half_a: The truth from one half of the roll-outs, with shape (B,).
            half_b: The truth from the other half, with shape (B,).
            index: The samples' indices in the data set, with shape (B,).

        Raises:
            ValueError: If shapes disagree or a number is not finite.
        """
        if not (estimate.shape == half_a.shape == half_b.shape == index.shape) or index.dim() != 1:
            raise ValueError(
                f"got estimate {tuple(estimate.shape)}, truth {tuple(half_a.shape)} and "
                f"{tuple(half_b.shape)}, index {tuple(index.shape)}: expected vectors of one length."
            )
        if not all(bool(torch.isfinite(x).all()) for x in (estimate, half_a, half_b)):
            raise ValueError("a value or its Monte Carlo truth is not finite.")
        self.estimate.append(estimate.double())
        self.half_a.append(half_a.double())
        self.half_b.append(half_b.double())
        self.index.append(index.long())

    def compute(self) -> dict[str, Estimate]:
        """Returns the errors over all that was added, each sample counted once."""
        keep = first_by_index(dim_zero_cat(self.index))
        columns = [dim_zero_cat(s)[keep].cpu() for s in (self.estimate, self.half_a, self.half_b)]
        n = len(keep)
        picks = torch.randint(n, (self.resamples, n), generator=torch.Generator().manual_seed(0))
        values = truth_errors(*columns)
        resampled = truth_errors(*(column[picks] for column in columns))
        return {
            # few samples: a resample may be one of them n times, with no variance to divide by
            name: Estimate(
                value, resampled[name][resampled[name].isfinite()].std(), torch.tensor(n)
            )
            for name, value in values.items()
        }
