"""The stitched value V_ω(z_t) = r_φ^{≥j}(s_ψ(u_θ^{≤i}(z_t))), Eq. (6): i of L blocks and the reward's tail."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.backbones.base import Backbone
from stitchvm.backbones.loading import parse_dtype
from stitchvm.cuda_graphs import Graphed
from stitchvm.rewards.base import Reward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.vae import scaling_of
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import (
    BoundEstimator,
    BoundValue,
    Generators,
    Prefixes,
    Value,
    match,
    same_level,
)
from stitchvm.values.parts import Parts, ValueFactory, described, frozen


class StitchedValue(Value):
    """A distilled value model as a value: a deterministic function of z_t and t, differentiable in z_t.

    The backbone's condition is its own null text, whatever the prompts.

    Arguments:
        value_model: The stitched value model.
        cuda_graph: Whether stitch and tail are launched as CUDA graphs; no effect on a CPU.
    """

    def __init__(self, value_model: StitchedValueModel, cuda_graph: bool = False) -> None:
        super().__init__(value_model.reward)
        self.value_model = value_model
        self._graphed: Graphed | None = None
        if cuda_graph:
            self._graphed = Graphed(
                partial(_read_out, value_model), partial(_networks, value_model)
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        generator: Any = None,
        reward: Reward | None = None,
        backbone: Backbone | None = None,
        dtype: str | None = None,
        cuda_graph: bool = False,
    ) -> StitchedValue:
        """Loads a value model, frozen; on a generator of the same backbone it shares its transformer.

        A value model of another backbone on the same latent space brings its own blocks along.

        Arguments:
            path: A folder, `world:NAME` or a hub id.
            generator: The generator whose latents are valued; its weights are used if they are those the value
                model was distilled on.
            reward: An already loaded reward to share.
            backbone: An already loaded backbone to share, where the generator lends none.
            dtype: What stitch and tail are cast to: "float32", "bfloat16" or "float16"; as they were saved by default.
            cuda_graph: Whether stitch and tail are launched as CUDA graphs.

        Raises:
            FileNotFoundError: If there is no value model at `path`.
            ValueError: If the value model does not fit the given reward or backbone, or the generator's latent space.
        """
        lent = None if generator is None else generator.lend(StitchedValueModel.read(path))
        backbone = backbone if lent is None else lent
        model = StitchedValueModel.from_pretrained(path, backbone=backbone, reward=reward)
        if generator is not None:
            channels = model.backbone.latent_channels
            if channels != generator.latent_channels:
                raise ValueError(
                    f"the value model {path} reads latents of {channels} channels ({model.backbone.id}), but "
                    f"{generator.id} has {generator.latent_channels}: distil a value model on a backbone with "
                    "the generator's VAE."
                )
            scaling, own = (
                scaling_of(model.backbone),
                (generator.vae.scale, generator.vae.shift),
            )
            if lent is None and scaling not in (None, own):
                raise ValueError(
                    f"the value model {path} reads latents of scale, shift {scaling} ({model.backbone.id}), but those "
                    f"of {generator.id} have {own}: another VAE, whose latents mean something else. Distil a value "
                    "model on a backbone with the generator's VAE."
                )
            model.to(generator.device)
        if dtype is not None:
            for part in (model.stitch, model.tail):
                part.to(parse_dtype(dtype))
        return cls(frozen(model), cuda_graph)

    def _bound(
        self, prompts: list[str] | None, text: Tensor | None, generator: Generators
    ) -> BoundValue:
        return BoundStitched(self, prompts, text, generator)

    def embed(
        self,
        z_t: Tensor,
        t: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Returns the image embeddings with shape (B, E); prompts and generator are not used."""
        model = self.value_model
        return self.from_features(model.backbone(z_t, same_level(t, z_t), model.i))

    def from_features(self, h: Tensor) -> Tensor:
        """Returns the image embeddings (B, E) of the backbone's features u^{≤i}(z_t), with shape (B, D, h, w)."""
        again = getattr(self.value_model.tail, "gradient_checkpointing", False)
        if self._graphed is None or again:
            return _read_out(self.value_model, h)
        return self._graphed(h)


def _read_out(model: StitchedValueModel, h: Tensor) -> Tensor:
    return model.from_features(h).image


def _networks(model: StitchedValueModel) -> tuple[nn.Module, ...]:
    return model.stitch, model.tail


class BoundStitched(BoundEstimator):
    """A stitched value bound to prompts; it goes on from a prefix of the generator's null-text branch."""

    value: StitchedValue

    def __call__(self, z_t: Tensor, t: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        """Returns the values with shape (B,), from the prefix at its depth if there is one."""
        model = self.value.value_model
        if prefixes is None or model.i not in prefixes:
            return super().__call__(z_t, t)
        _, text = match(self.prompts, self.text, len(z_t))
        image = self.value.from_features(prefixes[model.i].features())
        return self.value.score(image, text)

    def depths(self, network: Any, null: Any) -> tuple[int, ...]:
        """Returns (i,) if the value model runs on that transformer, under that null text."""
        backbone = self.value.value_model.backbone
        if getattr(backbone, "network", None) is not network or not same_null(backbone, null):
            return ()
        return (self.value.value_model.i,)


def same_null(backbone: Any, null: Any) -> bool:
    """Returns whether a backbone's null text is a given condition."""
    pairs = ((backbone.null_context, null.tokens), (backbone.null_pooled, null.pooled))
    return all(a is b or (a.shape == b.shape and torch.equal(a.to(b), b)) for a, b in pairs)


class StitchedFactory(ValueFactory):
    """Loads a value model that `stitchvm fit` wrote, sharing the run's reward and, if asked, its generator.

    Arguments:
        path: A folder, `world:NAME` or a hub id.
        share_generator: Whether to run on the generator's transformer where its weights are those the value model
            was distilled on (one copy in memory, and the null-text branch is computed once).
        dtype: What stitch and tail are cast to, as they were saved by default. On a GPU, float32 products take many
            times as long as "bfloat16" ones, which guidance can do with; values that differ little are told apart
            better in float32.
        cuda_graph: Whether stitch and tail are launched as CUDA graphs: on a GPU, as much faster as there are few
            samples; the values are the same. No effect on a CPU.
    """

    def __init__(
        self,
        path: str,
        share_generator: bool = False,
        dtype: str | None = None,
        cuda_graph: bool = False,
    ) -> None:
        if dtype is not None:
            parse_dtype(dtype)  # raises for an unknown one
        self.path, self.share_generator, self.dtype = path, share_generator, dtype
        self.cuda_graph = cuda_graph

    def __call__(self, parts: Parts) -> StitchedValue:
        """Returns the value; its reward becomes the run's if none is configured."""
        config = StitchedValueModel.read(self.path)
        reward: Reward | None = parts.reward if parts.has("reward") else None
        if isinstance(reward, WeightedReward):  # of a sum of rewards, the part that was stitched
            reward = next((r for _, r in reward.items() if described(config["reward"], r)), None)
        if reward is None:
            reward = parts.known_reward(config["reward"])
        generator = parts.generator if self.share_generator else None
        backbone = parts.known_backbone(config)
        value = StitchedValue.from_pretrained(
            self.path, generator, reward, backbone, self.dtype, self.cuda_graph
        )
        parts.offer_reward(value.reward)
        parts.offer_backbone(value.value_model.backbone)
        return value

    def sources(self) -> dict[str, str]:
        """Returns the value model's path."""
        return {"value_model": self.path}
