r"""Advantages: rewards of the images of one prompt, relative to each other.

With R_n the reward of sample n and g its group (the images of one prompt in one update):

    A_n = (R_n − mean_g R) / (s + ε),   s = std of the group ("group") or of all rewards ("global")

`std = "global"` is what the references of DiffusionNFT and Flow-GRPO use: the spread of *all* rewards of the update,
so that the differences between prompts are in the denominator too and shrink every advantage when prompts are diverse.
ε = 1e-4 and the population's standard deviation (ddof 0) are theirs.

Several rewards are added up before: R = Σ_k w_k R_k, as they are ("none": the scale of one reward decides the mix),
each standardised over all samples ("global") or within each group ("group").

A group may be scattered over ranks: gather rewards and groups, then call these functions with all of them. The
arithmetic is done on the CPU in float64 and in an order of its own, so that every rank, and every order of the
samples, gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Advantages", "combine_rewards", "group_advantages", "group_keys"]


@dataclass(frozen=True, eq=False)
class Advantages:
    """Advantages and what to log of them.

    Attributes:
        values: A_n, float32 with shape (N,), on the rewards' device.
        stats: "reward_mean", "reward_std" (of all), "group_std" (mean over groups), "zero_spread" (the share of groups
            whose rewards are all equal: they teach nothing), "groups", "group_size_min", "group_size_max" and
            "advantage_std".
    """

    values: Tensor
    stats: dict[str, float]


def group_keys(prompts: Sequence[str]) -> Tensor:
    """Returns an integer for each prompt, int64 with shape (N,): equal for equal texts, on every rank."""
    digests = [hashlib.blake2b(prompt.encode(), digest_size=8).digest() for prompt in prompts]
    keys = [int.from_bytes(digest, "little") >> 1 for digest in digests]
    return torch.tensor(keys, dtype=torch.int64)


def combine_rewards(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    normalise: str = "none",
    groups: Tensor | None = None,
) -> Tensor:
    """Returns the weighted sum R = Σ_k w_k R_k, float64 with shape (N,) on the CPU.

    Arguments:
        rewards: Each reward's values, with shape (N,).
        weights: Each reward's weight w_k.
        normalise: "none", "global" (each reward minus its mean, over its standard deviation) or "group" (the same
            within each group). Rewards without any spread contribute nothing then.
        groups: The samples' groups, integers with shape (N,); needed for "group".

    Raises:
        ValueError: If names, lengths or `normalise` are wrong, or a reward is not finite.
    """
    if not rewards or rewards.keys() != weights.keys():
        raise ValueError(
            f"rewards {sorted(rewards)} and weights {sorted(weights)} must have the same names, at least one: "
            "give every reward a weight."
        )
    if normalise not in ("none", "global", "group") or (normalise == "group" and groups is None):
        raise ValueError(
            f'normalise = "{normalise}": expected "none", "global" or "group", the last with `groups`.'
        )
    lengths = {name: tuple(value.shape) for name, value in rewards.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"rewards have shapes {lengths}: expected one shape (N,).")
    total = torch.zeros(len(next(iter(rewards.values()))), dtype=torch.float64)
    for name in sorted(rewards):
        value = _rewards(rewards[name], name)
        if normalise != "none":
            table = _Groups(value, groups if normalise == "group" else None)
            value = _divide(table.deviation, table.std(0)[table.index])
        total += weights[name] * value
    return total


def group_advantages(
    rewards: Tensor, groups: Tensor, *, std: str = "global", eps: float = 1e-4, ddof: int = 0
) -> Advantages:
    """Returns the advantages A_n = (R_n − mean of the group)/(s + ε) of all samples of an update.

    They sum to zero in each group; a group of one, and one whose rewards are all equal, has advantages of exactly 0.

    Arguments:
        rewards: The rewards R_n of all samples on all ranks, with shape (N,).
        groups: The samples' groups, integers with shape (N,), such as those of `group_keys`.
        std: s is the standard deviation of all rewards ("global") or of the group's ("group").
        eps: ε.
        ddof: What is subtracted from the count in the variance: 0 (both references) or 1.

    Raises:
        ValueError: If the shapes differ, a reward is not finite, or `std`, `eps` or `ddof` is out of its range.
    """
    if std not in ("global", "group"):
        raise ValueError(f'std = "{std}": expected "global" or "group".')
    if eps < 0 or ddof not in (0, 1):
        raise ValueError(f"eps = {eps}, ddof = {ddof}: expected eps ≥ 0 and ddof 0 or 1.")
    values = _rewards(rewards, "reward")
    table = _Groups(values, groups)
    whole = _Groups(values, None)
    spread, overall = table.std(ddof), whole.std(ddof)
    scale = spread[table.index] if std == "group" else overall.expand(len(values))
    advantages = _divide(table.deviation, scale + eps)
    stats = {
        "reward_mean": whole.mean.item(),
        "reward_std": overall.item(),
        "group_std": spread.mean().item(),
        "zero_spread": table.flat.double().mean().item(),
        "groups": float(len(table.mean)),
        "group_size_min": table.count.min().item(),
        "group_size_max": table.count.max().item(),
        "advantage_std": advantages.sort().values.square().mean().sqrt().item(),
    }
    return Advantages(advantages.float().to(rewards.device), stats)


def _rewards(values: Tensor, name: str) -> Tensor:
    values = values.detach().double().cpu()
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} has shape {tuple(values.shape)}: expected (N,), one per sample.")
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} is not finite for {len(bad)} of {len(values)} samples (first: {bad[:5]}): skip this update, or "
            "look at those images."
        )
    return values


class _Groups:
    """Sums by group (all one group for None), in an order that depends on the values only.

    Attributes:
        index: Each sample's group, numbered from 0, with shape (N,).
        count: The groups' sizes, float64 with shape (G,), likewise `mean`.
        flat: Whether all values of a group are equal, with shape (G,).
        deviation: Each sample's distance from its group's mean, with shape (N,).
    """

    def __init__(self, values: Tensor, groups: Tensor | None) -> None:
        if groups is None:
            groups = torch.zeros(len(values), dtype=torch.int64)
        groups = groups.detach().cpu()
        if groups.shape != values.shape or groups.is_floating_point():
            raise ValueError(
                f"groups have shape {tuple(groups.shape)} and dtype {groups.dtype} beside {len(values)} rewards: "
                "expected one integer per reward."
            )
        _, self.index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
        self.count = counts.double()
        order = values.argsort(stable=True)
        self._order = order[self.index[order].argsort(stable=True)]
        ends = counts.cumsum(0)
        low, high = values[self._order][ends - counts], values[self._order][ends - 1]
        self.flat = low == high
        # a mean of equal numbers may differ from them in the last bit
        self.mean = torch.where(self.flat, low, self._sum(values) / self.count)
        self.deviation = values - self.mean[self.index]

    def std(self, ddof: int) -> Tensor:
        """Returns the groups' standard deviations with shape (G,); 0 for a group of one."""
        squares = self._sum(self.deviation.square())
        return (squares / (self.count - ddof).clamp_min(1)).sqrt()

    def _sum(self, values: Tensor) -> Tensor:
        sums = torch.zeros(len(self.count), dtype=torch.float64)
        return sums.index_add_(0, self.index[self._order], values[self._order])


def _divide(deviation: Tensor, scale: Tensor) -> Tensor:
    """Returns deviation/scale, 0 where the scale is 0."""
    spread = scale > 0
    return torch.where(spread, deviation / torch.where(spread, scale, 1.0), 0.0)
