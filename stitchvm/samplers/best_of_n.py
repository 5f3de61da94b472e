"""Best-of-N: N independent plain samples of every prompt, of which the final value chooses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stitchvm.samplers.base import Samples
from stitchvm.samplers.plain import PlainSampler
from stitchvm.values.base import Bindable


class BestOfN(PlainSampler):
    """The plain sampler N times, with the best sample by `final_value` (or `value`), which is asked at σ = 0 only.

    Particle n is what the plain sampler makes of the stream (seed, n), particle 0 the plain sample of the same
    seed; so the mean over particles is the plain sampler's, from the same run.

    Arguments:
        particles: The number N.
        nu: The noise; none by default.
        kwargs: As for `Sampler`.

    Raises:
        ValueError: If N is below 1.
    """

    def __init__(self, particles: int = 4, nu: str = "ode", **kwargs: Any) -> None:
        super().__init__(nu=nu, **kwargs)
        if particles < 1:
            raise ValueError(f"particles = {particles}: expected at least 1.")
        self.particles = particles

    def __call__(
        self,
        generator: Any,
        prompts: Sequence[str],
        value: Bindable | None = None,
        *,
        final_value: Bindable | None = None,
        **kwargs: Any,
    ) -> Samples:
        """Samples as `Sampler` does; one of `value` and `final_value` is enough, and nothing steers.

        Raises:
            ValueError: As for `Sampler`, and if there is neither.
        """
        final_value = final_value or value
        if final_value is None and self.particles > 1:
            raise ValueError(
                f"best of {self.particles}, but by what? Give `final_value`, the terminal reward."
            )
        return super().__call__(generator, prompts, final_value=final_value, **kwargs)
