"""The networks of a sampling run, built once, and whether they go together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from stitchvm import api
from stitchvm.modules.judges import Judges
from stitchvm.rewards.base import Reward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.vae import scaling_of
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import Value
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.terminal import TerminalFactory
from stitchvm.values.weighted import WeightedFactory, WeightedValue

if TYPE_CHECKING:
    from stitchvm.modules.sampling import Sampling


@dataclass
class SamplingParts:
    """What a sampling run is made of, on its device.

    Attributes:
        generator: The generator.
        value: The value that steers, or None.
        final_value: The value that chooses among particles, or None.
        judges: The rewards and the checker that score images.
        latent_size: Height and width of the latents.
    """

    generator: Any
    value: Value | None
    final_value: Value | None
    judges: Judges
    latent_size: tuple[int, int]

    @classmethod
    def build(cls, module: Sampling) -> SamplingParts:
        """Builds the parts of a module.

        Raises:
            ValueError: If they do not go together, or the image size is not the model's.
        """
        parts = Parts(module.reward_factory, module.generator_factory)
        generator: Any = parts.generator
        generator.to(module.device)  # before a value borrows its weights
        size = latent_size(generator, module.size)

        def built(factory: ValueFactory | None) -> Value | None:
            if factory is None:
                return None
            value = factory(parts).to(module.device)
            check_latent_space(value, generator.vae)
            return value

        value, final_value = built(module.value_factory), built(module.final_factory)
        judges = Judges(
            module.reward_factories, parts, module.reward_factory, module.checker, module.device
        )
        judges.check_size(*(side * generator.vae.factor for side in size))
        return cls(generator, value, final_value, judges, size)

    def release(self) -> None:
        """Frees the device from what no step calls (`release`)."""
        release(self.value, self.final_value, self.judges)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width = self.latent_size
        return height * self.generator.vae.factor, width * self.generator.vae.factor


def release(value: Value | None, final_value: Value | None, judges: Judges) -> None:
    """Frees the device from what no step calls: rewards that only encode prompts, choose and judge.

    Those that choose or judge wait in CPU memory between calls. Of those of a stitched value alone, the vision
    tower is freed for good: the value has a tail of its own.

    Arguments:
        value: What is called at every step.
        final_value: What chooses among finished samples.
        judges: What scores them.
    """
    steers = [] if value is None else list(value.modules())
    looked_through = rewards_of(
        v
        for v in steers
        if isinstance(v, Value) and not isinstance(v, (StitchedValue, WeightedValue))
    )
    chooses = [] if final_value is None else list(final_value.modules())
    later = rewards_of(v for v in chooses if isinstance(v, Value))
    later |= parts_of(judges.rewards[name] for name in judges.resident)
    for reward in later - looked_through:
        reward.park()
    for reward in rewards_of(v for v in steers if isinstance(v, StitchedValue)):
        if reward not in later | looked_through:
            reward.drop_tower()


def rewards_of(values: Iterable[Value]) -> set[Reward]:
    """Returns the rewards of values, the parts of sums instead of the sums."""
    return parts_of(value.reward for value in values)


def parts_of(rewards: Iterable[Reward]) -> set[Reward]:
    """Returns rewards, the parts of sums instead of the sums."""
    return {
        part
        for reward in rewards
        for part in (
            [r for _, r in reward.items()] if isinstance(reward, WeightedReward) else [reward]
        )
    }


def terminal_terms(value: ValueFactory | None) -> list[str]:
    """Returns where a value is the terminal reward: its place in the configuration."""
    if isinstance(value, TerminalFactory):
        return ["model.value"]
    terms = value.terms if isinstance(value, WeightedFactory) else {}
    return [f"the term {n!r} of model.value" for n, t in terms.items() if terminal_terms(t.value)]


def latent_size(generator: Any, pixels: tuple[int, int] | None) -> tuple[int, int]:
    """Returns height and width of latents for images of a size, the generator's own by default.

    Raises:
        ValueError: If the size is no multiple of a token's, or too large for the generator.
    """
    return api.latent_size(generator, *(pixels or (None, None))) or generator.default_size


def check_latent_space(value: nn.Module, vae: Any) -> None:
    """Sees to it that the value models in a value read a VAE's latents.

    Raises:
        ValueError: If one was made for latents of another number of channels, or of a VAE with another scale or shift.
    """
    for model in value.modules():
        if not isinstance(model, StitchedValueModel):
            continue
        backbone: Any = model.backbone
        own, read = vae.latent_channels, backbone.latent_channels
        mine, theirs = (vae.scale, vae.shift), scaling_of(backbone)
        wrong = None if own == read else f"{read} channels, not {own}"
        if wrong is None and theirs is not None and theirs != mine:
            wrong = f"scaling and shift {theirs}, not {mine}"
        if wrong is not None:
            raise ValueError(
                f"the value model on {backbone.id} reads another latent space than that of {vae.id} ({wrong}): its "
                "values would mean nothing. Distil one on a backbone with this VAE."
            )
