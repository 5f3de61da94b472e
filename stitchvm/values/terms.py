"""A bound value and, where it is a weighted sum, its terms from the same pass: for logs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from stitchvm.rewards.weighted import WeightedReward
from stitchvm.values.base import BoundEstimator, BoundValue, match
from stitchvm.values.monte_carlo import MonteCarloValue
from stitchvm.values.weighted import WeightedBound

__all__ = ["Scored", "value_and_terms"]


@dataclass(frozen=True)
class Scored:
    """Values of latents.

    Attributes:
        value: The values, with shape (B,), as the bound value itself returns them.
        terms: The terms of a weighted sum by name, as they are, each (B,); empty where there is no sum.
        normalised: What they contribute, w_k (V_k − mean_k)/std_k; empty where w = 1, mean = 0, std = 1 for all.
    """

    value: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    normalised: dict[str, Tensor] = field(default_factory=dict)


def value_and_terms(bound: BoundValue, z_t: Tensor, t: Tensor) -> Scored:
    """Returns the value of latents and its terms; a sum of values and a value of a sum of rewards both have some.

    Arguments:
        bound: The value, bound to the latents' prompts.
        z_t: The latents, with shape (B, C, H, W).
        t: Their noise levels, with shape (B,).
    """
    if isinstance(bound, WeightedBound):
        terms = bound.parts(z_t, t)
        return _scored(bound.value.total(terms), terms, bound.value.reward)
    if isinstance(bound, BoundEstimator) and isinstance(bound.value.reward, WeightedReward):
        value, reward = bound.value, bound.value.reward
        prompts, text = match(bound.prompts, bound.text, len(z_t))
        if isinstance(value, MonteCarloValue):  # each roll-out is scored, as the bound value does
            each = value.embeddings(z_t, t, prompts=prompts, generator=bound.generator)
            lines = None if text is None else text.repeat(len(each), 1)
            scores = reward.part_scores(each.detach().flatten(0, 1), lines)
            terms = {name: value.reduced(score) for name, score in scores.items()}
            return _scored(value.score_each(each, text), terms, reward)
        image = value.embed(z_t, t, prompts=prompts, generator=bound.generator)
        terms = reward.part_scores(image.detach(), text)
        return _scored(value.score(image, text), terms, reward)
    return Scored(bound(z_t, t))


def _scored(value: Tensor, terms: dict[str, Tensor], reward: WeightedReward) -> Scored:
    terms = {name: term.detach() for name, term in terms.items()}
    constants = [(reward.weights[n], reward.means[n], reward.stds[n]) for n in terms]
    if all(each == (1.0, 0.0, 1.0) for each in constants):
        return Scored(value, terms)
    normalised = {
        name: weight * (term - mean) / std
        for (name, term), (weight, mean, std) in zip(terms.items(), constants, strict=True)
    }
    return Scored(value, terms, normalised)
