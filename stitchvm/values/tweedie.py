"""The Tweedie estimate r(decode(D_t(z_t))), D_t(z_t) = E[z_0 | z_t] = z_t − t·u_t(z_t), Eq. (22).

One pass of the generator, the VAE's decoder and the reward. It exchanges reward and expectation, which is
exact for a reward that is affine in z_0 and else leaves the Jensen gap r(E[z_0 | z_t]) − E[r(z_0) | z_t]: small
at low noise, and at high noise the reward of a blurred image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stitchvm.backbones.base import Backbone
from stitchvm.path import FlowPath
from stitchvm.rewards.base import Reward
from stitchvm.values.base import Generators, Value, VelocityModel, same_level
from stitchvm.values.parts import Parts, ValueFactory


class BackboneVelocity:
    """A whole backbone as a generator under null text: no text encoders in memory.

    Arguments:
        backbone: A backbone with all its blocks loaded.
        vae: The VAE that belongs to it.
    """

    def __init__(self, backbone: Backbone, vae: Any) -> None:
        self.backbone, self.vae, self.null = backbone, vae, None

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Returns None: the backbone's own null text is the only condition.

        Raises:
            ValueError: If a prompt is not empty.
        """
        if any(prompts):
            raise ValueError(
                f"a backbone alone knows the null text only, but a prompt came ({max(prompts)!r}): load "
                "the generator, which has text encoders."
            )

    def velocity(
        self, z_t: Tensor, t: Tensor, cond: None = None, guidance_scale: float | None = None
    ) -> Tensor:
        """Returns u_t(z_t) with the shape of z_t; `guidance_scale` has nothing to guide."""
        return self.backbone.suffix(self.backbone.prefix(z_t, t, 1))


class TweedieValue(Value):
    """The reward of the denoised and decoded latent, differentiable in z_t.

    Arguments:
        generator: The generator: velocity, prompts and VAE.
        reward: The reward.
        use_prompts: Whether the generator is told the prompts; under null text otherwise.
        checkpointing: Whether denoiser and decoder + reward are run again in the backward pass instead
            of keeping their activations.
    """

    def __init__(
        self,
        generator: VelocityModel,
        reward: Reward,
        *,
        use_prompts: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(reward)
        self.generator = generator
        self.use_prompts, self.checkpointing = use_prompts, checkpointing

    def embed(
        self,
        z_t: Tensor,
        t: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Returns the image embeddings of decode(D_t(z_t)), with shape (B, E)."""
        t = same_level(t, z_t)
        cond = condition(self.generator, prompts if self.use_prompts else None)
        clean = self._run(lambda z: denoised(self.generator, z, t, cond), z_t)
        return self._run(lambda z: self.reward.embed(self.generator.vae.decode(z)).image, clean)

    def _run(self, part: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(part, z, use_reentrant=False)
        return part(z)


def condition(generator: VelocityModel, prompts: Sequence[str] | None) -> Any:
    """Returns the generator's condition: the prompts', or null text where there are none."""
    return generator.null if prompts is None else generator.encode_prompts(list(prompts))


def denoised(generator: VelocityModel, z_t: Tensor, t: Tensor, cond: Any) -> Tensor:
    """Returns D_t(z_t), Eq. (22), without guidance: guided velocities have another expectation."""
    u = generator.velocity(z_t, t, cond, guidance_scale=1.0)
    return FlowPath.denoise(z_t, u, t)


class TweedieFactory(ValueFactory):
    """The Tweedie value of the run's generator and reward.

    Arguments:
        use_prompts: Whether the generator is told the prompts.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    def __init__(self, use_prompts: bool = False, checkpointing: bool = False) -> None:
        self.use_prompts, self.checkpointing = use_prompts, checkpointing

    def __call__(self, parts: Parts) -> TweedieValue:
        """Returns the value."""
        return TweedieValue(
            parts.generator,
            parts.reward,
            use_prompts=self.use_prompts,
            checkpointing=self.checkpointing,
        )
