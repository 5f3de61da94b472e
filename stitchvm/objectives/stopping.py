r"""Where a roll-out stops: τ is drawn from a window of the schedule, the same on all ranks.

A schedule has levels σ_0 = 1 > σ_1 > … > σ_N = 0. *Stop k* means: k network calls, the latent z_τ at τ = σ_k. The paper
draws k ~ Unif{12 … 17} of 25 steps for DiffusionNFT and Unif{3 … 7} of 10 for DRaFT (Figure 7 has 2–12, 12–25 and
20–25 beside it); k = N is the terminal reward at τ = 0.

The draw comes from a generator keyed by integers (a seed, the update, perhaps the prompt), not from torch's global
random state: all ranks that ask with the same key agree, without talking. Within a group of one prompt τ must be one:
the spread of V(z_τ) depends on τ, and mixed levels would mix the scale of the advantages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stitchvm.randomness import keyed_generator

__all__ = ["StopWindow", "first_gradient_step", "stopped_grid", "training_levels"]


@dataclass(frozen=True)
class StopWindow:
    """The stopping window {low, …, high} of a schedule, both ends included.

    Attributes:
        low: The smallest number of network calls.
        high: The largest.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(
                f"stopping window {self.low}…{self.high}: expected 1 ≤ low ≤ high, counted in network calls "
                "(0 calls would stop at pure noise)."
            )

    def check(self, num_steps: int, backprop_steps: int | None = None) -> None:
        """Raises ValueError unless the window fits a schedule and a truncated back-propagation.

        Arguments:
            num_steps: The steps N of the schedule.
            backprop_steps: The K of DRaFT-K: the last steps that get a gradient; None for all of them.
        """
        if self.high > num_steps:
            raise ValueError(
                f"stopping window {self.low}…{self.high} lies outside of a schedule of {num_steps} steps: expected "
                f"high ≤ {num_steps} ({num_steps} is the end, τ = 0). Move the window or take more steps."
            )
        if backprop_steps is None:
            return
        if not 1 <= backprop_steps <= self.low:
            raise ValueError(
                f"K = {backprop_steps} with a roll-out that may stop after {self.low} steps: expected 1 ≤ K ≤ "
                f"{self.low}, so that every roll-out has K steps. Lower K, raise the window, or give no K to "
                "back-propagate through all steps."
            )

    def draw(self, *key: int | str) -> int:
        """Returns the stop k ~ Unif{low, …, high} that belongs to a key such as (seed, update)."""
        generator = keyed_generator("stop", *key)
        return int(torch.randint(self.low, self.high + 1, (), generator=generator))


def stopped_grid(sigmas: Tensor, stop: int) -> Tensor:
    """Returns the levels σ_0 … σ_k of a roll-out that stops after k calls, with shape (k + 1,).

    Raises:
        ValueError: If the schedule has fewer steps.
    """
    if not 1 <= stop < len(sigmas):
        raise ValueError(
            f"stop = {stop} of a schedule of {len(sigmas) - 1} steps: expected 1 … {len(sigmas) - 1} network calls."
        )
    return sigmas[: stop + 1]


def first_gradient_step(stop: int, backprop_steps: int | None) -> int:
    """Returns the first of the steps 0 … stop − 1 that gets a gradient: stop − K, or 0 if K is None or larger.

    It is drawn, or computed, once for a roll-out: the steps with a gradient are always its last ones.
    """
    return 0 if backprop_steps is None else max(stop - backprop_steps, 0)


def training_levels(
    sigmas: Tensor, stop: int, batch: int, *, fraction: float = 0.99, key: tuple[int | str, ...]
) -> Tensor:
    """Returns the levels t at which each sample is regressed, float32 with shape (batch, n), all above τ = σ_stop.

    As in DiffusionNFT's reference: the levels of the roll-out's own schedule, permuted for each sample anew, the first
    n = int(stop·fraction) of them (24 of 25, 9 of 10; at least one).

    Arguments:
        sigmas: The schedule σ_0 … σ_N.
        stop: The stop k; N for a roll-out to the end.
        batch: The number of samples.
        fraction: The share of the levels that is used, in (0, 1].
        key: What the permutations depend on; different on each rank, if samples are not to share theirs.

    Raises:
        ValueError: If the stop or the fraction is out of its range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: expected a share of the levels in (0, 1].")
    levels = stopped_grid(sigmas, stop)[:-1].float()
    number = max(int(stop * fraction), 1)
    generator = keyed_generator("levels", *key)
    ranks = torch.rand(batch, stop, dtype=torch.float64, generator=generator).argsort(1)
    return levels[ranks[:, :number].to(levels.device)]
