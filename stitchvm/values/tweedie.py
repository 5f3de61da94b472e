"""The Tweedie estimate r(decode(D_t(z_t))), D_t(z_t) = E[z_0 | z_t] = z_t − t·u_t(z_t), Eq. (22).

One pass of the generator, the VAE's decoder and the reward. It exchanges reward and expectation, which is
exact for a reward that is affine in z_0 and else leaves the Jensen gap r(E[z_0 | z_t]) − E[r(z_0) | z_t]: small
at low noise, and at high noise the reward of a blurred image.

**Which velocity.** "null" and "prompt" are marginal velocities, under null text and under the prompts. "cfg" is the
sampler's own u(∅) + g·(u(prompt) − u(∅)), of which D is no expectation but a sharper image: what the literature
differentiates through (SVDD, DAS, FreeDoM). A sampler on the same generator takes what was run here as it is and runs
only what is missing. Network calls of a guided step of a CFG sampler, forward + backward, beside decoder and reward:

| velocity         | sharing | not sharing |
|------------------|---------|-------------|
| "null", "prompt" | 2 + 1   | 3 + 1       |
| "cfg"            | 2 + 2   | 4 + 2       |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stitchvm.backbones.base import Backbone
from stitchvm.path import FlowPath
from stitchvm.rewards.base import Reward
from stitchvm.values.base import (
    BoundEstimator,
    BoundValue,
    Generators,
    Part,
    Value,
    VelocityModel,
    match,
    same_level,
)
from stitchvm.values.parts import Parts, ValueFactory

VELOCITIES = ("null", "prompt", "cfg")


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
        velocity: The u of Eq. (22): "null", "prompt" or "cfg" (see above).
        guidance_scale: g of "cfg"; the generator's own by default.
        checkpointing: Whether the denoiser, as a whole, and the decoder's blocks are run again in the backward pass
            instead of keeping their activations; the VAE stays as it was. A generator made with
            `gradient_checkpointing` repeats its blocks one by one in any case, and then not as a whole.

    Raises:
        ValueError: If `velocity` is unknown, or a scale is given for one without guidance.
    """

    def __init__(
        self,
        generator: VelocityModel,
        reward: Reward,
        *,
        velocity: str = "null",
        guidance_scale: float | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(reward)
        if velocity not in VELOCITIES:
            raise ValueError(f"velocity {velocity!r}: expected one of {', '.join(VELOCITIES)}.")
        if guidance_scale is not None and velocity != "cfg":
            raise ValueError(
                f"guidance_scale = {guidance_scale} beside velocity {velocity!r}, which has no guidance: leave it "
                'out, or choose velocity "cfg".'
            )
        self.generator, self.velocity = generator, velocity
        self.guidance_scale, self.checkpointing = guidance_scale, checkpointing

    def embed(
        self,
        z_t: Tensor,
        t: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Returns the image embeddings of decode(D_t(z_t)), with shape (B, E).

        Raises:
            ValueError: If the velocity is one under prompts, and there are none.
        """
        cond = None
        if self.velocity != "null":
            if prompts is None:
                raise ValueError(
                    f"the Tweedie value takes the velocity {self.velocity!r}, but no prompts came: bind it to one "
                    'prompt per latent, or choose velocity "null".'
                )
            cond = self.generator.encode_prompts(list(prompts))
        return self.look(z_t, t, cond)[0]

    def look(self, z_t: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns image embeddings (B, E), the velocity behind them, and u(prompt) − u(∅) if it is guided.

        Arguments:
            z_t: The noisy latents, with shape (B, C, H, W).
            t: Their noise levels, with shape (B,) or (1,).
            cond: The conditions of their prompts; not used under null text.
        """
        t = same_level(t, z_t)
        cond = self.generator.null if self.velocity == "null" else cond

        def run(z: Tensor) -> tuple[Tensor, Tensor | None]:
            return self._velocity(z, t, cond)

        by_blocks = getattr(
            getattr(self.generator, "transformer", None), "gradient_checkpointing", False
        )
        if self.checkpointing and not by_blocks and torch.is_grad_enabled():
            u, direction = checkpoint(run, z_t, use_reentrant=False)
        else:
            u, direction = run(z_t)
        clean = FlowPath.denoise(z_t, u, t)
        # the decoder is last: to repeat it as a whole would keep all the same
        with checkpointed(self.generator.vae) if self.checkpointing else nullcontext():
            pixels = self.generator.vae.decode(clean)
        return self.reward.embed(pixels).image, u, direction

    def _velocity(self, z_t: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor | None]:
        if self.velocity != "cfg":
            return self.generator.velocity(z_t, t, cond, guidance_scale=1.0), None
        parts = getattr(self.generator, "velocity_parts", None)
        if parts is not None:
            return parts(z_t, t, cond, self.guidance_scale)
        return self.generator.velocity(z_t, t, cond, guidance_scale=self.guidance_scale), None

    def _bound(
        self, prompts: list[str] | None, text: Tensor | None, generator: Generators
    ) -> BoundValue:
        return BoundTweedie(self, prompts, text, generator)


class BoundTweedie(BoundEstimator):
    """A Tweedie value bound to prompts; a sampler on the same generator takes the velocity that it ran."""

    value: TweedieValue

    def velocity_part(
        self, generator: Any, prompts: Sequence[str], guidance_scale: float | None = None
    ) -> Part | None:
        """Returns which part of a sampler's velocity it runs; None for another generator, scale or other prompts."""
        value, own = self.value, getattr(generator, "guidance_scale", None)
        if value.generator is not generator:
            return None
        runs = getattr(generator, "runs_null_branch", None)
        two_branches = runs is not None and runs(guidance_scale)
        if value.velocity == "null":
            return "null" if two_branches else None
        if self.prompts != list(prompts):
            return None
        if value.velocity == "prompt" and two_branches:
            return "prompt"
        scale = own if guidance_scale is None else guidance_scale
        mine = own if value.guidance_scale is None else value.guidance_scale
        return "whole" if scale == (1.0 if value.velocity == "prompt" else mine) else None

    def with_velocity(
        self, z_t: Tensor, t: Tensor, cond: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the values (B,), the velocity they come from, and u(prompt) − u(∅) if it is guided."""
        _, text = match(self.prompts, self.text, len(z_t))
        image, u, direction = self.value.look(z_t, t, cond)
        return self.value.score(image, text), u, direction


@contextmanager
def checkpointed(vae: Any) -> Iterator[None]:
    """Lets a VAE's decoder run its blocks again in the backward pass of what it decodes here, and nowhere else.

    The decoder alone is told: were its middle block told, too, as diffusers does, the repetition, which comes after the
    context has ended, would keep other tensors than the first run, and fail.
    """
    decoder: Any = getattr(getattr(vae, "network", None), "decoder", None)
    if getattr(
        decoder, "gradient_checkpointing", True
    ):  # it has no such blocks, or does so anyway
        yield
        return
    decoder.gradient_checkpointing = True
    decoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        decoder.gradient_checkpointing = False
        del (
            decoder._gradient_checkpointing_func
        )  # diffusers sets one whenever it switches the flag on


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
        velocity: "null", "prompt" or "cfg".
        guidance_scale: g of "cfg"; the generator's own by default.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    def __init__(
        self,
        velocity: str = "null",
        guidance_scale: float | None = None,
        checkpointing: bool = False,
    ) -> None:
        self.velocity, self.guidance_scale = velocity, guidance_scale
        self.checkpointing = checkpointing

    def __call__(self, parts: Parts) -> TweedieValue:
        """Returns the value."""
        return TweedieValue(
            parts.generator,
            parts.reward,
            velocity=self.velocity,
            guidance_scale=self.guidance_scale,
            checkpointing=self.checkpointing,
        )
