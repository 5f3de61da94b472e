"""The terminal reward r(decode(z_0)): exact at t = 0, where a roll-out has ended; it says nothing before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stitchvm.deferral import require
from stitchvm.rewards.base import Reward
from stitchvm.values.base import Generators, Value, same_level
from stitchvm.values.parts import Parts, ValueFactory


class TerminalValue(Value):
    """The clean reward of the decoded latent, differentiable in z_0.

    Arguments:
        vae: The VAE; its `decode` is used.
        reward: The reward.
    """

    def __init__(self, vae: Any, reward: Reward) -> None:
        super().__init__(reward)
        self.vae = vae

    def embed(
        self,
        z_t: Tensor,
        t: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Returns the image embeddings of decoded clean latents, with shape (B, E).

        Raises:
            ValueError: If a noise level is not 0.
        """
        t = same_level(t, z_t)
        require(
            t <= 0,
            lambda: ValueError(
                f"the terminal reward is defined at t = 0 only, but t = {t.max():.4g} came: roll out to "
                "t = 0 first, or take a stitched, Tweedie or Monte Carlo value."
            ),
        )
        return self.reward.embed(self.vae.decode(z_t)).image


class TerminalFactory(ValueFactory):
    """The terminal reward of the run's VAE and reward."""

    def __call__(self, parts: Parts) -> TerminalValue:
        """Returns the value."""
        return TerminalValue(parts.vae, parts.reward)
