"""What every metric of the library answers with: an estimate, its standard error and its size.

Standard errors are over the test items with the gallery of images and texts held fixed. Items that share
an image or a prompt are not independent, so a ratio of sums over such clusters is used (`ratio`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A measured number.

    Attributes:
        value: The estimate, a scalar float64 tensor.
        stderr: Its standard error; NaN where it is not defined (a single item).
        n: The number of items, an int64 scalar.
    """

    value: Tensor
    stderr: Tensor
    n: Tensor


def mean(values: Tensor) -> Estimate:
    """Returns the mean of independent items with shape (N,) and its standard error s/√N."""
    values = values.double()
    n = len(values)
    stderr = values.std() / n**0.5 if n > 1 else torch.full_like(values.mean(), torch.nan)
    return Estimate(values.mean(), stderr, torch.tensor(n, device=values.device))


def ratio(hits: Tensor, counts: Tensor) -> Estimate:
    """Returns Σ hits / Σ counts over clusters, with the linearised (sandwich) standard error.

    With p the ratio, M the total count and G clusters: s.e.² = G/(G−1) · Σ_g (hits_g − p·counts_g)² / M².

    Arguments:
        hits: The successes of each cluster, with shape (G,).
        counts: The items of each cluster, with shape (G,).
    """
    hits, counts = hits.double(), counts.double()
    total, clusters = counts.sum(), len(hits)
    p = hits.sum() / total
    spread = (hits - p * counts).square().sum()
    factor = clusters / (clusters - 1) if clusters > 1 else float("nan")
    return Estimate(p, (factor * spread).sqrt() / total, total.long())


def first_by_index(*keys: Tensor) -> Tensor:
    """Returns the positions of the first item of every distinct key, sorted by key.

    This removes what a distributed sampler repeats to give every process as many items, and makes the
    result independent of the order in which processes are gathered.

    Arguments:
        keys: One or two integer tensors with shape (N,); together they name an item.
    """
    table = torch.stack([key.long() for key in keys], dim=1)
    _, inverse = torch.unique(table, dim=0, return_inverse=True)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    first = inverse.new_full((count,), len(inverse))
    places = torch.arange(len(inverse), device=inverse.device)
    return first.scatter_reduce(0, inverse, places, reduce="amin")
