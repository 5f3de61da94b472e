"""The contract of a value: how good will a noisy latent become?

    Ṽ_t(z_t) = E[r(z_0) | z_t]        Eq. (46), (49)

Every alignment algorithm takes any value, bound to prompts: `v = value.bind(prompts)`, `v(z_t, t) -> (B,)`,
differentiable in z_t where the estimator is. What stands behind it is an image embedding of the noisy
latent, `embed(z_t, t) -> (B, E)`, scored by the reward against the prompts' text embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stitchvm.backbones.base import PrefixState
from stitchvm.backbones.prompts import listed
from stitchvm.deferral import require
from stitchvm.rewards.average import score_of_average
from stitchvm.rewards.base import Reward

Prefixes = Mapping[int, PrefixState]
Generators = torch.Generator | Sequence[torch.Generator] | None
Part = Literal["whole", "null", "prompt"]


class VelocityModel(Protocol):
    """What a value asks of a generator: a VAE, prompts' conditions and the velocity u_t(z_t).

    Attributes:
        vae: The VAE.
        null: The condition of the empty prompt, for all samples of a batch.
    """

    vae: Any

    @property
    def null(self) -> Any:
        """The condition of the empty prompt."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        """Returns the condition that belongs to the prompts."""

    def velocity(
        self, z_t: Tensor, t: Tensor, cond: Any, guidance_scale: float | None = None
    ) -> Tensor:
        """Returns the velocity u_t(z_t), with the shape of z_t."""


class BoundValue(ABC):
    """A value bound to prompts: v(z_t, t) -> (B,).

    Attributes:
        name: What to call it in messages.
    """

    name: str

    @abstractmethod
    def __call__(self, z_t: Tensor, t: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        """Returns the values with shape (B,), differentiable in z_t where the estimator is.

        Arguments:
            z_t: The noisy latents, with shape (B, C, H, W).
            t: The noise levels, with shape (B,) or (1,).
            prefixes: States of the generator's null-text branch at (z_t, t), by depth, if somebody has run it
                to the `depths` asked for; they spare the value its own run.
        """

    @abstractmethod
    def select(self, index: Tensor) -> BoundValue:
        """Returns the value of the samples `index`, a tensor of positions with repetitions."""

    def depths(self, network: Any, null: Any) -> tuple[int, ...]:
        """Returns the depths at which it reads the null-text branch of a transformer; none by default.

        Arguments:
            network: The diffusers transformer.
            null: The condition of the null text that its branch runs under.
        """
        return ()

    def velocity_part(
        self, generator: Any, prompts: Sequence[str], guidance_scale: float | None = None
    ) -> Part | None:
        """Returns what it runs, on its way, of the velocity that a sampler takes; nothing by default.

        Arguments:
            generator: The sampler's generator.
            prompts: The prompts it samples, in the order in which the value was bound to them.
            guidance_scale: Its g; the generator's own by default.

        Returns:
            "whole", or "null" or "prompt" for one branch of classifier-free guidance, or None.
        """
        return None

    def with_velocity(
        self, z_t: Tensor, t: Tensor, cond: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the values (B,), the part of the velocity it ran, and u(prompt) − u(∅) where it ran both branches.

        Arguments:
            z_t: The noisy latents, with shape (B, C, H, W).
            t: The noise levels, with shape (B,).
            cond: The generator's conditions of their prompts.
        """
        raise NotImplementedError(f"{self.name} runs no velocity that a sampler could take")


class Bindable(Protocol):
    """What samplers and fine-tuning ask of a value, single or a sum."""

    def bind(
        self, prompts: Sequence[str] | None = None, *, generator: Generators = None
    ) -> BoundValue:
        """Returns the value of latents for their prompts."""


class Value(nn.Module, ABC):
    """An estimator of the value at a noisy latent.

    Attributes:
        reward: The clean-image reward r whose value it estimates.
        averages: Whether `embed` is an average of unit embeddings, whose length (below 1) matters.
    """

    averages: bool = False

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward

    @abstractmethod
    def embed(
        self,
        z_t: Tensor,
        t: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Returns image embeddings with shape (B, E).

        Arguments:
            z_t: The noisy latents, with shape (B, C, H, W).
            t: The noise levels σ_t = t in [0, 1], with shape (B,), float32.
            prompts: What the generator is told of each sample, if the estimator asks a generator and
                was made to use prompts; ignored otherwise.
            generator: The randomness, one for all or one per sample, of estimators that need it.
        """

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns values with shape (B,) from what `embed` returned and text embeddings (B, E)."""
        if self.averages:
            return score_of_average(self.reward, image, text)
        return self.reward.score(image, text)

    def encode_text(self, prompts: Sequence[str] | None) -> Tensor | None:
        """Returns the prompts' text embeddings (B, E), or None for a reward that reads no text.

        Every distinct prompt is encoded once.

        Raises:
            ValueError: If the reward needs prompts and there are none.
        """
        if not self.reward.uses_text:
            return None
        if not prompts:
            raise ValueError(
                f"the reward {self.reward.id} compares images with text, but no prompts came: expected "
                "one prompt per latent."
            )
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        with torch.no_grad():
            text = self.reward.encode_text(distinct)
        return text[[place[prompt] for prompt in prompts]]

    def bind(
        self, prompts: Sequence[str] | None = None, *, generator: Generators = None
    ) -> BoundValue:
        """Returns v with v(z_t, t) -> (B,), the value of each latent for its prompt.

        Arguments:
            prompts: One prompt per latent, or a single one for all; None if the reward reads no text.
            generator: The randomness of estimators that need it.

        Raises:
            ValueError: If prompts are missing; from v, if their number is not that of the latents.
        """
        prompts = listed(prompts)
        return self._bound(prompts, self.encode_text(prompts), generator)

    def _bound(
        self, prompts: list[str] | None, text: Tensor | None, generator: Generators
    ) -> BoundValue:
        return BoundEstimator(self, prompts, text, generator)

    def _value(
        self,
        z_t: Tensor,
        t: Tensor,
        prompts: Sequence[str] | None,
        text: Tensor | None,
        generator: Generators,
    ) -> Tensor:
        return self.score(self.embed(z_t, t, prompts=prompts, generator=generator), text)


class BoundEstimator(BoundValue):
    """A single estimator bound to prompts.

    Arguments:
        value: The estimator.
        prompts: One prompt per latent, or a single one for all, or None.
        text: Their embeddings, or None.
        generator: The randomness of estimators that need it.
    """

    def __init__(
        self,
        value: Value,
        prompts: list[str] | None,
        text: Tensor | None,
        generator: Generators = None,
    ) -> None:
        self.value, self.prompts, self.text, self.generator = value, prompts, text, generator
        self.name = f"{type(value).__name__} of {value.reward.id}"

    def __call__(self, z_t: Tensor, t: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        """Returns the values with shape (B,)."""
        prompts, text = match(self.prompts, self.text, len(z_t))
        return self.value._value(z_t, t, prompts, text, self.generator)

    def select(self, index: Tensor) -> BoundEstimator:
        """Returns the value of the samples `index`."""
        places = index.tolist()
        prompts, text, generator = self.prompts, self.text, self.generator
        if prompts is not None and len(prompts) > 1:
            prompts = [prompts[i] for i in places]
            text = None if text is None else text[index.to(text.device)]
        if isinstance(generator, Sequence):  # a single one is repeated, too: one for each latent
            generator = [generator[i if len(generator) > 1 else 0] for i in places]
        return type(self)(self.value, prompts, text, generator)


def match(
    prompts: list[str] | None, text: Tensor | None, batch: int
) -> tuple[list[str] | None, Tensor | None]:
    """Returns the prompts and text embeddings of a batch: as they are, or a single one repeated.

    Raises:
        ValueError: If there are several prompts and not one per latent.
    """
    if prompts is None or len(prompts) == batch:
        return prompts, text
    if len(prompts) != 1:
        raise ValueError(
            f"the value is bound to {len(prompts)} prompts but was asked about {batch} latents: bind it "
            "to one prompt per latent, or to a single prompt."
        )
    return prompts * batch, None if text is None else text.expand(batch, -1)


def same_level(t: Tensor, z_t: Tensor) -> Tensor:
    """Returns t as float32 with shape (B,), on the latents' device.

    Raises:
        ValueError: If t has neither one entry nor one per latent, or lies outside [0, 1].
    """
    t = torch.as_tensor(t, device=z_t.device).float().reshape(-1)
    if len(t) not in (1, len(z_t)):
        raise ValueError(f"got {len(t)} noise levels for {len(z_t)} latents: expected one each.")
    inside = (t >= 0) & (t <= 1)
    require(
        inside,
        lambda: ValueError(f"noise levels lie in [0, 1]; got {t.min():.4g} to {t.max():.4g}."),
    )
    return t.expand(len(z_t))
