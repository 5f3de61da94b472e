"""StitchVM: value models for noisy diffusion latents, stitched from clean-image rewards.

Axis legend of every docstring: B batch, C latent channels, H W latent height and width, h w token
grid, N tokens (N = h w, or more with special tokens), D width, E embedding width, K noise levels.
Time: t = 0 is clean data, t = 1 is Gaussian noise, σ_t = t.

The names below are loaded when they are first used: `import stitchvm` alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stitchvm._version import __version__

if TYPE_CHECKING:
    from stitchvm.api import load_pipeline, load_value, sample
    from stitchvm.diffusers_native import FKCallback, GuidanceCallback
    from stitchvm.generator import Generator
    from stitchvm.rewards.weighted import WeightedReward
    from stitchvm.samplers.scheduler import sde_scheduler
    from stitchvm.values.monte_carlo import MonteCarloValue
    from stitchvm.values.stitched import StitchedValue
    from stitchvm.values.terminal import TerminalValue
    from stitchvm.values.tweedie import TweedieValue
    from stitchvm.values.weighted import WeightedValue, measured_constants

__all__ = [
    "FKCallback",
    "Generator",
    "GuidanceCallback",
    "MonteCarloValue",
    "StitchedValue",
    "TerminalValue",
    "TweedieValue",
    "WeightedReward",
    "WeightedValue",
    "__version__",
    "load_pipeline",
    "load_value",
    "measured_constants",
    "sample",
    "sde_scheduler",
]

_HOMES = {
    "FKCallback": "diffusers_native",
    "Generator": "generator",
    "GuidanceCallback": "diffusers_native",
    "MonteCarloValue": "values.monte_carlo",
    "StitchedValue": "values.stitched",
    "TerminalValue": "values.terminal",
    "TweedieValue": "values.tweedie",
    "WeightedReward": "rewards.weighted",
    "WeightedValue": "values.weighted",
    "load_pipeline": "api",
    "load_value": "api",
    "measured_constants": "values.weighted",
    "sample": "api",
    "sde_scheduler": "samplers.scheduler",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stitchvm' has no attribute {name!r}")
    value = getattr(import_module(f"stitchvm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names, and those of the module itself."""
    return sorted({*globals(), *__all__})
