r"""Noise levels: the explicit grids that samplers walk and the laws that training draws from.

A grid is a float32 tensor σ_0 = 1 > σ_1 > … > σ_N = 0 for N steps. The *shift* s moves levels
towards noise,

    shift_s(σ) = s·σ / (1 + (s − 1)·σ),

and diffusers applies it in two ways, which differ most at the end of a run (s = 3, N = 40, the
last levels before 0):

- "single": σ_i = shift_s(1 − i/N)                                       … .1957 .1364 .0714 0
- "double": σ_i = shift_s(x_i), x_i linear from 1 to shift_s(1/1000)     … .1465 .0811 .0089 0

"double" is what `FlowMatchEulerDiscreteScheduler.set_timesteps(N)` makes, so also what an SD 3.5
pipeline and training code built on it use: its smallest level is shifted, then shifted again.
"single" is the same scheduler given σ = 1 − i/N, as a FLUX pipeline does. FLUX's shift depends on
the resolution, s = e^μ with μ linear in the number of image tokens:
`sigma_grid(28, shift=math.exp(resolution_mu(4096)), kind="flux")`, where "flux" is "single" in the
rounding of diffusers' own formula (they differ by 2e-7 at most).

σ_0 is 1 exactly. diffusers' is 1.0000001 for the shift 1.32 and .99999994 for 1.43: no noise
level the one, t/(1 − t) = 1.7e7 the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

EVAL_SIGMAS: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The noise levels of the paper's evaluations (Figure 2, Table 5)."""


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Returns shift·σ/(1 + (shift − 1)·σ), in the dtype of `sigmas`; the identity for shift 1."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_mu(
    num_tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Returns FLUX's μ, linear in the number of image tokens; the shift is s = e^μ.

    The defaults are FLUX.1-dev's: μ(4096) = 1.15 at 1024², μ(1024) = 0.63 at 512².

    Arguments:
        num_tokens: The image tokens, (H/16)·(W/16) for pixels of height H and width W.
        base_tokens: Where μ = `base_shift`.
        max_tokens: Where μ = `max_shift`; beyond it the line goes on.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return num_tokens * slope + (base_shift - slope * base_tokens)


def sigma_grid(num_steps: int, shift: float = 3.0, kind: str = "single") -> Tensor:
    """Returns the levels σ_0 = 1 > … > σ_N = 0 of an N-step run, float32, (num_steps + 1,).

    Bit for bit those of diffusers' scheduler, but for σ_0 (see the module's description).

    Arguments:
        num_steps: The number of steps N ≥ 1.
        shift: The shift s > 0; SD 3.5 has 3, FLUX e^μ of `resolution_mu`. Unused for "linear".
        kind: "linear" (σ_i = 1 − i/N), "single" (shifted once), "flux" (the same, rounded as a
            FLUX pipeline does) or "double" (diffusers' default, SD 3.5).

    Raises:
        ValueError: If an argument is out of its range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: expected at least 1 step.")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(
            f"shift = {shift}: expected a positive number (1 shifts nothing, SD 3.5 has 3)."
        )
    if kind == "linear":
        sigmas = _linspace(1.0, 1 / num_steps, num_steps).float()
    elif kind == "single":
        # rounded to float32 before the shift, as diffusers does
        sigmas = shift_sigmas(_linspace(1.0, 1 / num_steps, num_steps).float(), shift)
    elif kind == "flux":
        # tensors, since torch turns number/tensor into number·(1/tensor), which rounds twice
        numerator = torch.tensor(shift, dtype=torch.float32)
        odds = torch.ones(()) / _linspace(1.0, 1 / num_steps, num_steps).float() - 1
        sigmas = numerator / (numerator + odds)
    elif kind == "double":
        # the smallest of the scheduler's 1000 training levels, shifted in float32; the way over
        # timesteps 1000·σ and back is diffusers' too, and costs the last bit if left out
        one = torch.ones((), dtype=torch.float32)
        smallest = shift_sigmas(one / 1000, shift).item()
        sigmas = shift_sigmas(_linspace(1000.0, smallest * 1000, num_steps) / 1000, shift).float()
    else:
        raise ValueError(f'kind = "{kind}": expected "linear", "single", "flux" or "double".')
    return begin_at_one(torch.cat([sigmas, torch.zeros(1)]))


def begin_at_one(sigmas: Tensor) -> Tensor:
    """Returns levels whose first is 1 where it is 1 up to rounding, else as it is."""
    if sigmas.ndim == 1 and len(sigmas) and abs(float(sigmas[0]) - 1) < 1e-6:
        sigmas = sigmas.clone()
        sigmas[0] = 1
    return sigmas


def _linspace(start: float, stop: float, num: int) -> Tensor:
    # NumPy's rounding (torch.linspace counts from both ends, which differs in the last bit)
    points = torch.arange(num, dtype=torch.float64) * ((stop - start) / max(num - 1, 1)) + start
    if num > 1:
        points[-1] = stop
    return points


def scheduler_sigmas(scheduler: Any, num_steps: int, num_tokens: int, linear: bool) -> Tensor:
    """Returns the levels that a pipeline's own scheduler gives, float32, with shape (num_steps + 1,).

    Arguments:
        scheduler: A diffusers `FlowMatchEulerDiscreteScheduler`; its timesteps are set.
        num_steps: The number of steps N.
        num_tokens: The number of image tokens, by which schedulers with dynamic shifting shift.
        linear: Whether the pipeline hands it σ = 1 − i/N, as FLUX's does, and not N alone.
    """
    config = scheduler.config
    options: dict[str, Any] = {}
    if config.use_dynamic_shifting:
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        options["mu"] = num_tokens * slope + config.base_shift - slope * config.base_image_seq_len
    if linear:
        options["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    else:
        options["num_inference_steps"] = num_steps
    scheduler.set_timesteps(**options)
    return scheduler.sigmas.float()


class NoiseLevelLaw(ABC):
    """A law of the noise level σ_t = t in [0, 1], given by its quantile function.

    With `stratified`, a batch of n takes one level from each of n equally probable strata, in
    random order: each level alone has the same law, the batch covers [0, 1] evenly, and a batch
    mean of the loss has less variance.

    Arguments:
        stratified: Whether to stratify over the batch.
    """

    def __init__(self, stratified: bool = False) -> None:
        self.stratified = stratified

    @abstractmethod
    def quantile(self, q: Tensor) -> Tensor:
        """Returns the levels with probabilities `q` in [0, 1], float64, elementwise."""

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Returns n noise levels, float32 with shape (n,), on `device`.

        They are drawn on the generator's device (the CPU without one), so that a CPU generator
        gives the same levels whatever `device` is.
        """
        source = generator.device if generator is not None else torch.device("cpu")
        q = torch.rand(n, dtype=torch.float64, generator=generator, device=source)
        if self.stratified:
            q = (torch.randperm(n, generator=generator, device=source) + q) / n
        return self.quantile(q).float().to(device if device is not None else source)


class Uniform(NoiseLevelLaw):
    """The uniform law on [low, high] within [0, 1]; stage 1 uses Unif[0, 1]."""

    def __init__(self, low: float = 0.0, high: float = 1.0, stratified: bool = False) -> None:
        super().__init__(stratified)
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"low = {low}, high = {high}: expected 0 ≤ low ≤ high ≤ 1.")
        self.low, self.high = low, high

    def quantile(self, q: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * q


class CenterBiased(NoiseLevelLaw):
    r"""The Beta(a, a) law, symmetric about 1/2: the "centre-biased" law of stage 2.

    The paper says no more than that word and that both end points carry little learning signal.
    The default a = 1.5 (the semicircle law) has a density that vanishes at both ends, yet is
    mild: 5 % of the draws fall below 0.1, as many above 0.9, where the evaluation still looks
    (Beta(2, 2): 2.8 %; the logit-normal law: 1.4 %; uniform: 10 %).

    Arguments:
        a: The concentration a ≥ 0.5; 1 is uniform, larger is narrower.
        stratified: Whether to stratify over the batch.
    """

    def __init__(self, a: float = 1.5, stratified: bool = False) -> None:
        super().__init__(stratified)
        if not (0.5 <= a < math.inf):
            raise ValueError(f"a = {a}: expected at least 0.5 (1 is uniform, 1.5 mildly centred).")
        self.a = a
        # The inverse CDF by a table over the angle φ, t = sin²φ. There the density is ∝ (sin φ
        # cos φ)^(2a − 1), without the end points' singularities, and midpoint cells accumulate it
        # to about 1e-7.
        cells = 8192
        self._phi = torch.linspace(0, math.pi / 2, cells + 1, dtype=torch.float64)
        middle = (self._phi[1:] + self._phi[:-1]) / 2
        mass = (2 * middle).sin() ** (2 * a - 1)
        self._cdf = torch.cat([torch.zeros(1, dtype=torch.float64), (mass / mass.sum()).cumsum(0)])

    def quantile(self, q: Tensor) -> Tensor:
        cdf, phi = self._cdf.to(q.device), self._phi.to(q.device)
        right = torch.searchsorted(cdf, q).clamp(1, len(cdf) - 1)
        low, high = cdf[right - 1], cdf[right]
        # a cell of zero mass (a narrow law's far tail in float64) would divide 0 by 0
        part = ((q - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        return (phi[right - 1] + part * (phi[right] - phi[right - 1])).sin() ** 2


class LogitNormal(NoiseLevelLaw):
    """The law of sigmoid(mean + std·N(0, 1)), with which SD 3 was pretrained (mean 0, std 1)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, stratified: bool = False) -> None:
        super().__init__(stratified)
        if std < 0:
            raise ValueError(f"std = {std}: expected a standard deviation ≥ 0.")
        self.mean, self.std = mean, std

    def quantile(self, q: Tensor) -> Tensor:
        # the clamp keeps −∞·0 out when std = 0 and q = 0
        q = q.clamp(1e-300, 1 - 1e-16)
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(q))


class Fixed(NoiseLevelLaw):
    """One of the given levels, all equally probable; the default is those of the evaluations."""

    def __init__(self, sigmas: list[float] | None = None, stratified: bool = False) -> None:
        super().__init__(stratified)
        sigmas = list(EVAL_SIGMAS) if sigmas is None else list(sigmas)
        if not sigmas or not all(0.0 <= sigma <= 1.0 for sigma in sigmas):
            raise ValueError(f"sigmas = {sigmas}: expected at least one level, all in [0, 1].")
        self.sigmas = sigmas

    def quantile(self, q: Tensor) -> Tensor:
        levels = torch.tensor(self.sigmas, dtype=torch.float64, device=q.device)
        return levels[(q * len(self.sigmas)).long().clamp_max(len(self.sigmas) - 1)]
