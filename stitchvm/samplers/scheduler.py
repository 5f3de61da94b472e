"""The sampling SDE as a diffusers scheduler, for pipelines that keep their own step loop."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stitchvm.randomness import keyed_generator
from stitchvm.samplers.sde import Kernel, check_levels

__all__ = ["is_random", "sde_scheduler"]


def is_random(scheduler: Any) -> bool:
    """Returns whether a scheduler's steps draw noise."""
    kernel = getattr(scheduler, "kernel", None)
    if kernel is not None:
        return not kernel.deterministic
    return bool(scheduler.config.stochastic_sampling)


def sde_scheduler(
    scheduler: Any, nu: str = "linear_sde", scale: float = 1.0, seed: int | None = None
) -> Any:
    """Returns a scheduler with which a stock pipeline takes steps of the sampling SDE, Eq. (26).

    Its levels are those of the given one. With `nu="ode"` so are its steps.

    Arguments:
        scheduler: The pipeline's `FlowMatchEulerDiscreteScheduler`.
        nu: The noise ν_t, a name of `stitchvm.samplers.sde`.
        scale: What it is multiplied by.
        seed: Seeds the noise, the same in every run; torch's global generator if None.

    Raises:
        ValueError: If nu or scale is not one of `Kernel`'s.
    """
    kernel = Kernel(nu, scale)
    copied: Any = deepcopy(scheduler)
    copied.__class__ = _scheduler_class()
    copied.kernel, copied.seed = kernel, seed
    return copied


@cache
def _scheduler_class() -> type:
    from diffusers import FlowMatchEulerDiscreteScheduler

    class SDEScheduler(FlowMatchEulerDiscreteScheduler):
        """`FlowMatchEulerDiscreteScheduler` whose step is `stitchvm.samplers.sde.Kernel`'s."""

        kernel: Kernel
        seed: int | None
        levels: tuple[Tensor, Tensor] | None = None

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            """Returns the sample after one step; keywords as in diffusers."""
            if self.kernel.deterministic and not self.config.stochastic_sampling:
                # in bfloat16 diffusers rounds dt·u, too: another last digit
                return super().step(model_output, timestep, sample, **kwargs)
            if self.step_index is None:
                self._init_step_index(timestep)
            if self.levels is None or self.levels[0] is not self.sigmas:
                # once a run, since a GPU is waited for
                self.levels = self.sigmas, check_levels(self.sigmas)
            k, sigmas = self._step_index, self.levels[1]
            z = self.kernel.mean(sample.float(), model_output, k, sigmas)
            std, own = self.kernel.std(k, sigmas), kwargs.get("generator")
            if std:
                source = own
                if own is None and self.seed is not None:
                    source = keyed_generator("scheduler", self.seed, k)
                device = z.device if source is None else source.device
                noise = torch.randn(z.shape, generator=source, device=device, dtype=z.dtype)
                z = z + std * noise.to(z.device)
            self._step_index += 1
            z = z.to(model_output.dtype)
            if not kwargs.get("return_dict", True):
                return (z,)
            from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
                FlowMatchEulerDiscreteSchedulerOutput,
            )

            return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=z)

    return SDEScheduler
