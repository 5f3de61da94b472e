r"""Resampling of weighted particles, in log-weights, for many prompts at once.

    W^n = exp(w^n − log Σ_m exp w^m),      ESS = (Σ W^n)² / Σ (W^n)² ∈ [1, N]

An ancestor a^n of slot n is found by inverting the cumulative weights at a point x^n ∈ [0, 1):

    multinomial:  x^n independent and uniform                           Var[count] = N W (1 − W)
    systematic:   x^n = (x + n/N) mod 1 with a single uniform x         count ∈ {⌊N W⌋, ⌈N W⌉}

Both give E[count^n] = N·W^n, and here even every single slot: P(a^n = m) = W^m, since x^n is uniform (systematic
points are usually sorted, so that slot 0 holds the first ancestors more often than it should).

Weights that are all equal change nothing: every particle stays where it is. So a potential without effect leaves the
plain samples bit for bit. Weights never leave the logarithm: at λ = 10 a reward of 22 (PickScore) is exp(220), which
clamped to 1e10, as in the published code of FK steering, makes all particles equal.

Everything is float64 on the CPU, where the uniforms come from: the same ancestors on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMES = ("systematic", "multinomial")


def normalise(log_weights: Tensor) -> Tensor:
    """Returns log W with shape (P, N): log-weights of which each row's exponentials sum to 1.

    Arguments:
        log_weights: Log-weights up to a constant per row, with shape (P, N); −∞ where a particle is impossible.

    Raises:
        ValueError: If a row has NaN or +∞, or is −∞ throughout, naming it.
    """
    if log_weights.ndim != 2 or 0 in log_weights.shape:
        raise ValueError(
            f"log-weights have shape {tuple(log_weights.shape)}: expected (P, N), at least one of each."
        )
    w = log_weights.detach().to("cpu", torch.float64)
    unusable = w.isnan().any(dim=1) | (w == torch.inf).any(dim=1) | (w == -torch.inf).all(dim=1)
    if bool(unusable.any()):
        place = int(unusable.nonzero()[0])
        raise ValueError(
            f"the log-weights {w[place].tolist()} of prompt {place} are no weights: expected at least one finite "
            "number, no NaN and no +∞. Look at the values they come from, or lower λ."
        )
    return w.log_softmax(dim=1)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Returns 1/Σ (W^n)² with shape (P,), from 1 (one particle has all) to N (all are equal).

    Arguments:
        log_weights: Log-weights up to a constant per row, with shape (P, N).
    """
    return (-(2 * normalise(log_weights)).logsumexp(dim=1)).exp()


def ancestors(log_weights: Tensor, uniforms: Tensor, scheme: str = "systematic") -> Tensor:
    """Returns which particle each slot continues, with shape (P, N); a particle of weight 0 never.

    Arguments:
        log_weights: Log-weights up to a constant per row, with shape (P, N).
        uniforms: Uniforms in [0, 1): (P, `uniforms_needed`).
        scheme: "systematic" or "multinomial".

    Raises:
        ValueError: If the weights are none, or the number of uniforms is not that of the scheme.
    """
    log_w = normalise(log_weights)
    prompts, n = log_w.shape
    needed = uniforms_needed(scheme, n)
    if tuple(uniforms.shape) != (prompts, needed):
        raise ValueError(
            f"uniforms have shape {tuple(uniforms.shape)}: expected {(prompts, needed)} for {scheme} resampling."
        )
    x = uniforms.to("cpu", torch.float64)
    if scheme == "systematic":
        x = (x + torch.arange(n, dtype=torch.float64) / n) % 1
    equal = (log_weights == log_weights[:, :1]).all(dim=1, keepdim=True).cpu()
    return torch.where(equal, torch.arange(n), draw(log_w, x))


def draw(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Returns the particles at points of the cumulative weights, with shape (P, K); one of weight 0 never.

    Arguments:
        log_weights: Log-weights up to a constant per row, with shape (P, N).
        uniforms: The points in [0, 1), with shape (P, K).
    """
    cumulative = normalise(log_weights).exp().cumsum(dim=1)
    # the last entries are 1 exactly, so that no point lies beyond the last particle that has weight
    cumulative = cumulative / cumulative[:, -1:]
    points = uniforms.to("cpu", torch.float64).contiguous()
    return torch.searchsorted(cumulative, points, right=True)


def uniforms_needed(scheme: str, n: int) -> int:
    """Returns how many uniforms a row of n particles takes.

    Raises:
        ValueError: If the scheme is unknown.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"resampling = {scheme!r}: expected one of {', '.join(SCHEMES)}.")
    return 1 if scheme == "systematic" else n
