r"""A weighted sum of values over one or several rewards and estimators, each normalised by constants:

    V(z_t) = Σ_k w_k (V_k(z_t) − mean_k) / std_k

Rewards differ in scale (HPSv2 spreads by hundredths, PickScore by units), so that a sum without constants is a sum of
one. `measured_constants` takes them from latents. The sum is linear in the values: where V_k is E[r_k | z_t], V is
E[r | z_t] of the weighted reward r, and ∇V is the weighted sum of the gradients.

Several stitched values on one network read one run of its null-text branch, each at its own depth. Terminal, Tweedie
and Monte Carlo values over several rewards are best taken over a `WeightedReward`: it decodes each latent once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.backbones.prompts import listed
from stitchvm.rewards.base import Reward
from stitchvm.rewards.weighted import WeightedReward, joined, sum_of
from stitchvm.values.base import (
    BoundValue,
    Generators,
    Part,
    Prefixes,
    Value,
    same_level,
)
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.shared_runs import shared_runs

__all__ = ["Term", "WeightedBound", "WeightedFactory", "WeightedValue", "measured_constants"]


class WeightedValue(Value):
    """V = Σ_k w_k (V_k − mean_k)/std_k over named values.

    Its `reward` is the weighted reward of the parts' rewards with the same constants: the clean reward of the sum.

    Arguments:
        values: The values V_k by name.
        weights: The weights w_k by name; 1 where none is given.
        means: The constants mean_k by name; 0 where none is given.
        stds: The constants std_k by name; 1 where none is given.

    Raises:
        ValueError: If there are no values, or a constant is not finite, not positive (std) or of an unknown name.
    """

    reward: WeightedReward

    def __init__(
        self,
        values: Mapping[str, Value],
        weights: dict[str, float] | None = None,
        means: dict[str, float] | None = None,
        stds: dict[str, float] | None = None,
    ) -> None:
        if not values:
            raise ValueError("a weighted value has no parts: give at least one value by name.")
        rewards = {name: value.reward for name, value in values.items()}
        super().__init__(WeightedReward(rewards, weights, means, stds))
        self.values = dict(values)
        self.registered = nn.ModuleList(values.values())

    @property
    def embed_dim(self) -> int:
        """The width E of what `embed` returns."""
        return 1 + sum(map(width, self.values.values()))

    def embed(
        self,
        z_t: Tensor,
        t: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Returns the parts' embeddings side by side with a 1, with shape (B, E)."""
        images = [
            value.embed(z_t, t, prompts=prompts, generator=generator)
            for value in self.values.values()
        ]
        return joined(images, [value.averages for value in self.values.values()])

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns values with shape (B,) from what `embed` and the reward's `encode_text` returned."""
        texts = self.reward.split_text(text)
        images = (image[:, :-1] / image[:, -1:]).split(
            [width(v) for v in self.values.values()], dim=1
        )
        scores = {
            name: value.score(e, texts[id(value.reward)])
            for (name, value), e in zip(self.values.items(), images, strict=True)
        }
        return self.total(scores)

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns Σ_k w_k (V_k − mean_k)/std_k from the parts' values, each with shape (B,)."""
        return sum_of(values, self.reward.weights, self.reward.means, self.reward.stds)

    def with_constants(self, constants: Mapping[str, tuple[float, float]]) -> WeightedValue:
        """Returns the same sum with other constants (mean_k, std_k), as `measured_constants` returns them."""
        means = {name: mean for name, (mean, _) in constants.items()}
        stds = {name: std for name, (_, std) in constants.items()}
        return WeightedValue(self.values, self.reward.weights, means, stds)

    def bind(
        self, prompts: Sequence[str] | None = None, *, generator: Generators = None
    ) -> WeightedBound:
        """Returns v with v(z_t, t) -> (B,); arguments as for `Value.bind`. Each distinct reward encodes text once."""
        prompts = listed(prompts)
        text = self.encode_text(prompts)
        return self._bound(prompts, text, generator)

    def _bound(
        self, prompts: list[str] | None, text: Tensor | None, generator: Generators
    ) -> WeightedBound:
        texts = self.reward.split_text(text)
        terms = {
            name: value._bound(prompts, texts[id(value.reward)], generator)
            for name, value in self.values.items()
        }
        return WeightedBound(self, terms)


class WeightedBound(BoundValue):
    """A weighted sum of values bound to prompts.

    Arguments:
        value: The sum.
        terms: Its parts, bound.
        readers: The parts that go on from a prefix of the generator's null-text branch, as `depths` found them.
        source: The part whose velocity a sampler takes, as `velocity_part` found it.
    """

    def __init__(
        self,
        value: WeightedValue,
        terms: Mapping[str, BoundValue],
        readers: frozenset[str] = frozenset(),
        source: str | None = None,
    ) -> None:
        self.value, self.terms = value, dict(terms)
        self.readers, self.source = readers, source
        weights = value.reward.weights
        self.name = " + ".join(f"{weights[name]:g}·{v.name}" for name, v in self.terms.items())

    def __call__(self, z_t: Tensor, t: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        """Returns the values with shape (B,)."""
        return self.value.total(self.parts(z_t, t, prefixes))

    def parts(self, z_t: Tensor, t: Tensor, prefixes: Prefixes | None = None) -> dict[str, Tensor]:
        """Returns each part's own value V_k by name, each (B,), neither weighted nor normalised: for reports."""
        return self._parts(self.terms, z_t, t, prefixes)

    def select(self, index: Tensor) -> WeightedBound:
        """Returns the value of the samples `index`."""
        terms = {name: term.select(index) for name, term in self.terms.items()}
        return WeightedBound(self.value, terms, self.readers, self.source)

    def depths(self, network: Any, null: Any) -> tuple[int, ...]:
        """Returns the union of the parts' depths; those parts will go on from the prefixes, the others will not."""
        found = {name: term.depths(network, null) for name, term in self.terms.items()}
        self.readers = frozenset(name for name, depths in found.items() if depths)
        return tuple(sorted({depth for depths in found.values() for depth in depths}))

    def velocity_part(
        self, generator: Any, prompts: Sequence[str], guidance_scale: float | None = None
    ) -> Part | None:
        """Returns what the first part that runs some of the sampler's velocity runs of it."""
        for name, term in self.terms.items():
            part = term.velocity_part(generator, prompts, guidance_scale)
            if part is not None:
                self.source = name
                return part
        self.source = None
        return None

    def with_velocity(
        self, z_t: Tensor, t: Tensor, cond: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the values (B,), the velocity that a part ran, and u(prompt) − u(∅) if it is guided."""
        if self.source is None:
            return super().with_velocity(z_t, t, cond)
        v, u, direction = self.terms[self.source].with_velocity(z_t, t, cond)
        others = {name: term for name, term in self.terms.items() if name != self.source}
        values = {self.source: v} | self._parts(others, z_t, t)
        # added up in one order, whatever was asked for
        return self.value.total({name: values[name] for name in self.terms}), u, direction

    def _parts(
        self,
        terms: Mapping[str, BoundValue],
        z_t: Tensor,
        t: Tensor,
        prefixes: Prefixes | None = None,
    ) -> dict[str, Tensor]:
        """Returns the values of some parts; those on one network share one run of it."""
        states: dict[str, Prefixes | None] = dict.fromkeys(terms)
        if prefixes is not None:
            states |= dict.fromkeys(self.readers & terms.keys(), prefixes)
        left = {name: term for name, term in terms.items() if states[name] is None}
        for names, run in shared_runs(left):
            states |= dict.fromkeys(names, run(z_t, t))
        return {name: term(z_t, t, states[name]) for name, term in terms.items()}


def width(value: Value) -> int:
    """Returns the width of a value's embeddings."""
    return value.embed_dim if isinstance(value, WeightedValue) else value.reward.embed_dim


@torch.no_grad()
def measured_constants(
    value: WeightedValue,
    z_t: Tensor,
    t: Tensor,
    prompts: Sequence[str] | None = None,
    *,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, tuple[float, float]]:
    """Returns the mean and the standard deviation of each part's values on latents, by name.

    Give latents at the noise levels the sum will be used at: a value spreads less the more noise there is.

    Arguments:
        value: The sum.
        z_t: Latents, with shape (B, C, H, W), at least two.
        t: Their noise levels, with shape (B,) or (1,).
        prompts: One prompt per latent, or a single one for all; None if no part reads text.
        batch_size: The latents at a time; all of them by default.
        generator: The randomness of parts that roll out.

    Raises:
        ValueError: If there are fewer than two latents, or a part has the same value everywhere.
    """
    if len(z_t) < 2:
        raise ValueError(f"{len(z_t)} latents have no spread: give at least 2, better a hundred.")
    bound, levels = value.bind(prompts, generator=generator), same_level(t, z_t)
    each: dict[str, list[Tensor]] = {name: [] for name in value.values}
    rows = torch.arange(len(z_t))
    for part in rows.split(batch_size or len(rows)):
        of = part.to(z_t.device)
        for name, v in bound.select(part).parts(z_t[of], levels[of]).items():
            each[name].append(v.double().cpu())
    found = {}
    for name, pieces in each.items():
        v = torch.cat(pieces)
        found[name] = (float(v.mean()), float(v.std()))
        if not found[name][1] > 0:
            raise ValueError(
                f"the part {name!r} is {found[name][0]:.6g} for all {len(v)} latents (spread {found[name][1]}): it "
                "cannot be normalised; leave it out, or measure on other latents."
            )
    return found


@dataclass
class Term:
    """One part of a weighted value, as it stands in a YAML file.

    Attributes:
        value: Builds the value V_k.
        weight: The weight w_k.
        mean: The constant mean_k.
        std: The constant std_k, above 0.
        reward: Builds its reward; by default a stitched value brings its own, and others take the run's.
    """

    value: ValueFactory
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    reward: Callable[[], Reward] | None = None


class WeightedFactory(ValueFactory):
    """A weighted sum of values; generator and VAE are the run's, and one reward is loaded once.

    Arguments:
        terms: The parts by name, or a list of them (then they are called "1", "2", …).
    """

    def __init__(self, terms: dict[str, Term] | list[Term]) -> None:
        if not isinstance(terms, dict):
            terms = {str(number): term for number, term in enumerate(terms, 1)}
        self.terms = terms

    def __call__(self, parts: Parts) -> WeightedValue:
        """Returns the value; its weighted reward becomes the run's if none is configured."""
        # those that name a reward first, so that a value model finds its own in memory
        order = sorted(self.terms, key=lambda name: self.terms[name].reward is None)
        built = {
            name: self.terms[name].value(parts.of_term(self.terms[name].reward)) for name in order
        }
        value = WeightedValue(
            {name: built[name] for name in self.terms},
            {name: term.weight for name, term in self.terms.items()},
            {name: term.mean for name, term in self.terms.items()},
            {name: term.std for name, term in self.terms.items()},
        )
        value.eval().requires_grad_(False)
        parts.offer_reward(value.reward)
        return value

    def sources(self) -> dict[str, str]:
        """Returns what the parts load beyond the run's, under the parts' names."""
        return {
            f"{name}.{what}": path
            for name, term in self.terms.items()
            for what, path in term.value.sources().items()
        }
