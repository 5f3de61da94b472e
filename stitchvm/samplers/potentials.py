r"""The potentials G of Feynman–Kac steering, and the weights they add up to.

Values V_1, V_2, … are taken at some levels of a run, and r(z_0) at its end. Each level multiplies a particle's weight
by a potential; whatever the potentials before, the last one is chosen so that all of them together are exp(λ r(z_0)).
In the limit of many particles the weighted particles are then the sampler's own distribution tilted by that:

    | name   | log G_j                              |                                                          |
    |--------|--------------------------------------|----------------------------------------------------------|
    | `diff` | λ_j V_j − λ_{j−1} V_{j−1}            | Eq. (9): the weight so far is exp(λ_j V_j)               |
    | `max`  | λ_j · max(V_1, …, V_j)               | favours what was good once                               |
    | `add`  | λ_j · (V_1 + … + V_j)                | favours what was good all along                          |
    | `rt`   | λ_j V_j                              | each level for itself                                    |
    | last   | λ r(z_0) − Σ_i log G_i               | the correction, for all of them                          |

`diff` takes the difference to the level before at which particles were weighed, not to the step before (whether or not
proposals had values there), so that it telescopes; at the first level V_0 = 0, a constant that weights do not see.

**λ.** `per="value"`: λ_j = λ, in units of 1/reward; the target is p·exp(λ r)/Z. `per="spread"`: λ_j = λ/s_j, where s_j²
is the average, over the levels so far, of the (unbiased) variance of V over the N particles of the prompt: one λ then
fits rewards of any scale and offset (PickScore lies around 22, HPSv2 around .28), and the target is p·exp(λ r/s)/Z.
It is a prompt's own spread, never that of the prompts sampled beside it; where it is 0, all values are equal, and
λ_j is 0.

When particles are not resampled at a level, because their effective sample size is still large, their weights are
*carried* to the next. Dropping them, as the published code does, loses the steering.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POTENTIALS = ("diff", "max", "add", "rt")


@dataclass
class Weights:
    """The weights of P × N particles on their way; values and weights are float64 on the CPU.

    Attributes:
        potential: "diff", "max", "add" or "rt".
        lam: λ ≥ 0.
        per: "value" or "spread".
        carried: The log-weights since the last resampling, with shape (P, N).
        product: Σ log G of each particle's whole ancestry, with shape (P, N).
        running: The maximum or sum of the values of each particle's ancestry, with shape (P, N).
        variance: The sum over levels of the values' variance, with shape (P,).
        levels: How many levels values were taken at.
    """

    potential: str
    lam: float
    per: str
    carried: Tensor
    product: Tensor
    running: Tensor
    variance: Tensor
    levels: int = 0

    @classmethod
    def even(cls, potential: str, lam: float, per: str, prompts: int, particles: int) -> Weights:
        """Returns equal weights.

        Raises:
            ValueError: If λ is negative or not finite, or a name is unknown.
        """
        if potential not in POTENTIALS:
            raise ValueError(
                f"potential = {potential!r}: expected one of {', '.join(POTENTIALS)}."
            )
        if per not in ("value", "spread"):
            raise ValueError(f'lam_per = {per!r}: expected "value" or "spread".')
        if not (0 <= lam < math.inf):
            raise ValueError(
                f"lam = {lam}: expected a finite number ≥ 0; at 0 nothing is resampled. To lower a reward, negate it."
            )
        zeros = torch.zeros(prompts, particles, dtype=torch.float64)
        start = torch.full_like(zeros, -math.inf) if potential == "max" else zeros.clone()
        variance = torch.zeros(prompts, dtype=torch.float64)
        return cls(potential, lam, per, zeros, zeros.clone(), start, variance)

    def multiply(self, values: Tensor) -> Tensor:
        """Multiplies the weights by the potential of a level, and returns its λ_j with shape (P,).

        Arguments:
            values: The particles' values there, with shape (P, N).
        """
        v = values.detach().to("cpu", torch.float64)
        self.variance, self.levels = self._pooled(v), self.levels + 1
        lam = self._lam(self.variance, self.levels)
        if self.potential == "max":
            self.running = torch.maximum(self.running, v)
        elif self.potential == "add":
            self.running = self.running + v
        else:
            self.running = v
        log_g = lam[:, None] * self.running
        if self.potential == "diff":
            log_g = log_g - self.product
        self.carried = self.carried + log_g
        self.product = self.product + log_g
        return lam

    def last(self, values: Tensor) -> Tensor:
        """Returns the final log-weights with shape (P, N), in which all potentials together are exp(λ r(z_0)).

        Arguments:
            values: The rewards r(z_0), in the same unit as the values before, with shape (P, N).
        """
        r = values.detach().to("cpu", torch.float64)
        lam = self._lam(self._pooled(r), self.levels + 1)
        return self.carried + lam[:, None] * r - self.product

    def resample(self, ancestors: Tensor, drawn: Tensor) -> None:
        """Gives the slots their ancestors' past; where slots were drawn by weight, their weights are equal again.

        Arguments:
            ancestors: Which particle each slot continues, with shape (P, N).
            drawn: Whether the prompt's particles were resampled, with shape (P,).
        """
        self.carried = torch.where(drawn[:, None], 0.0, self.carried)
        self.product = self.product.gather(1, ancestors)
        self.running = self.running.gather(1, ancestors)

    def _pooled(self, values: Tensor) -> Tensor:
        if values.shape[1] == 1:
            return self.variance
        return self.variance + values.var(dim=1)

    def _lam(self, variance: Tensor, levels: int) -> Tensor:
        if self.per == "value":
            return torch.full_like(variance, self.lam)
        spread = (variance / levels).sqrt()
        return torch.where(spread > 0, self.lam / spread.clamp_min(1e-300), 0.0)
