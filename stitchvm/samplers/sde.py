r"""One step of the sampling SDE, Eq. (26), over explicit levels:

    z_s = z_t + [u − (ν_t²/2)·∇ log p_t(z_t)]·(s − t) + ν_t·sqrt(t − s)·ξ,   s < t,   ξ ~ N(0, I)

Any ν keeps the marginals p_t as the steps become small; ν = 0 is Euler's method on the ODE, and equals diffusers'
`FlowMatchEulerDiscreteScheduler.step` in float32. Choices of ν_t, each times `scale`:

| name         | ν_t                 |                                                                           |
|--------------|---------------------|---------------------------------------------------------------------------|
| `ode`        | 0                   |                                                                           |
| `linear_sde` | 3t²                 | the released configurations of Kim et al. (arXiv 2503.19385), "LinearSDE" |
| `linear`     | t                   |                                                                           |
| `flow_grpo`  | 0.7·sqrt(t/(1 − t)) | Flow-GRPO (arXiv 2505.05470)                                              |
| `paper`      | sqrt(4t/(1 − t))    | the paper's Appendix A                                                    |

The last two are infinite at t = 1: there they are taken at the second level of the grid, as Flow-GRPO does. The score
is infinite at t = 0, where no step begins. **The last step**, to s = 0, is Euler's whatever ν: its noise would stay in
the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stitchvm.path import FlowPath, working_dtype
from stitchvm.schedule import begin_at_one

NU: dict[str, Callable[[float], float]] = {
    "ode": lambda t: 0.0,
    "linear_sde": lambda t: 3 * t**2,
    "linear": lambda t: t,
    "flow_grpo": lambda t: 0.7 * math.sqrt(t / (1 - t)),
    "paper": lambda t: math.sqrt(4 * t / (1 - t)),
}


class Kernel:
    """The transition kernel p(z_{k+1} | z_k) of a grid of levels.

    Arguments:
        nu: The name of ν_t.
        scale: What ν_t is multiplied by.
        noise_last: Whether the step to 0 is noisy, too.

    Raises:
        ValueError: If the name is unknown or the scale negative.
    """

    def __init__(
        self, nu: str = "linear_sde", scale: float = 1.0, noise_last: bool = False
    ) -> None:
        if nu not in NU:
            raise ValueError(f"nu = {nu!r}: expected one of {', '.join(NU)}.")
        if not (0 <= scale < math.inf):
            raise ValueError(f"scale = {scale}: expected a finite number ≥ 0; 0 is the ODE.")
        self.nu, self.scale, self.noise_last = nu, scale, noise_last

    @property
    def deterministic(self) -> bool:
        """Whether there is no noise at any step."""
        return self.nu == "ode" or self.scale == 0

    def level(self, k: int, sigmas: Tensor) -> float:
        """Returns the level at which coefficients of step k are taken: t_k, or t_1 where t_k = 1."""
        t = float(sigmas[k])
        return float(sigmas[k + 1]) if t == 1 and len(sigmas) > 2 else t

    def nu_at(self, k: int, sigmas: Tensor) -> float:
        """Returns ν of step k, 0 ≤ k < N, of the levels σ_0 > … > σ_N = 0."""
        last = k == len(sigmas) - 2
        if self.deterministic or (last and not self.noise_last):
            return 0.0
        t = float(sigmas[k])
        level = self.level(k, sigmas) if self.nu in ("flow_grpo", "paper") else t
        if level == 1 and self.nu in ("flow_grpo", "paper"):
            raise ValueError(
                f"nu = {self.nu!r} is infinite at t = 1, and a grid of one step has no other level: take more "
                "steps, or another nu."
            )
        return self.scale * NU[self.nu](level)

    def mean(
        self, z: Tensor, u: Tensor, k: int, sigmas: Tensor, drift: Tensor | None = None
    ) -> Tensor:
        """Returns the mean of z_{k+1}, with the shape (B, ...) of z, in float32 or better.

        Arguments:
            z: The latents at σ_k.
            u: The velocity there.
            k: The step.
            sigmas: The levels, with shape (N + 1,).
            drift: What is added to the drift, e.g. guidance, with the shape of z.
        """
        nu = self.nu_at(k, sigmas)
        dtype = working_dtype(z, u)
        z, u = z.to(dtype), u.to(dtype)
        dt = sigmas[k + 1] - sigmas[k]  # one number, which stays on the CPU: a copy would wait
        if nu:
            u = u - 0.5 * nu**2 * FlowPath.score(z, u, sigmas[k])
        if drift is not None:
            u = u + drift
        return z + dt * u

    def std(self, k: int, sigmas: Tensor) -> float:
        """Returns the standard deviation ν·sqrt(t − s) of z_{k+1}."""
        return self.nu_at(k, sigmas) * math.sqrt(float(sigmas[k] - sigmas[k + 1]))


def check_levels(sigmas: Tensor) -> Tensor:
    """Returns levels as float32 on the CPU; the first is 1 where rounding alone made it another number.

    Raises:
        ValueError: If they do not fall from at most 1 to 0.
    """
    sigmas = begin_at_one(torch.as_tensor(sigmas).detach().to("cpu", torch.float32))
    falls = sigmas.ndim == 1 and len(sigmas) > 1 and bool((sigmas[1:] < sigmas[:-1]).all())
    if not falls or float(sigmas[0]) > 1 or float(sigmas[-1]) != 0:
        shown = [round(float(s), 4) for s in sigmas.flatten()[:6]]
        raise ValueError(
            f"levels {shown}… are no grid: expected σ_0 ≤ 1 > … > σ_N = 0, strictly falling, as `sigma_grid` makes."
        )
    return sigmas
