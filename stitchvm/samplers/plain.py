"""Plain sampling: the flow's ODE, or its SDE, without a value."""

from __future__ import annotations

from typing import Any

from stitchvm.samplers.base import Record, Run, Sampler


class PlainSampler(Sampler):
    """Euler's method on Eq. (26): the pipelines' own samples, latent for latent, for ν = 0 in float32.

    Latents stay float32 where networks are bfloat16; pipelines round them to that after every step.

    Arguments:
        nu: The noise; none by default.
        kwargs: As for `Sampler`.
    """

    wants_value = False

    def __init__(self, nu: str = "ode", **kwargs: Any) -> None:
        super().__init__(nu=nu, **kwargs)

    def advance(self, run: Run, k: int) -> Record:
        """Takes one step."""
        u, _ = run.velocity(k)
        run.z = run.propose(self.kernel, k, u)[:, 0]
        return Record(k + 1, float(run.sigmas[k + 1]))
