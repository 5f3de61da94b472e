r"""A weighted sum of rewards as one reward, so that parts which look at the same image share its decoding:

    r(x) = Σ_k w_k (r_k(x) − mean_k) / std_k                  Eq. (80): w = 1, mean = 0, std = 1

Any value over it is the sum of the values, at the price of one roll-out, one denoiser pass and one VAE decode.

Its image embedding is [ẽ_1, …, ẽ_K, 1]: unit embeddings side by side in homogeneous coordinates. Whoever brings it to
unit length loses nothing (`score` divides by the last coordinate), and where every part is affine in ẽ_k the
whole is, so that an average embedding has the average score. Its text embedding is the parts' text embeddings side by
side, with a 1 for the same reason. Two towers have no common block to cut at: value models are distilled for each part,
and `WeightedValue` adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stitchvm.rewards.average import score_of_average
from stitchvm.rewards.base import Embedding, Probe, Reward, RewardTail

__all__ = ["WeightedReward"]


class WeightedReward(Reward):
    """r = Σ_k w_k (r_k − mean_k)/std_k over named rewards; one object under several names is run once.

    Arguments:
        rewards: The rewards by name, or what builds them (in a YAML file: `class_path`s, or paths of such files).
        weights: The weights w_k by name; 1 where none is given. A negative one asks for less.
        means: The constants mean_k by name; 0 where none is given.
        stds: The constants std_k by name; 1 where none is given.

    Raises:
        ValueError: If there are no rewards, or a constant is not finite, not positive (std) or of an unknown name.
    """

    def __init__(
        self,
        rewards: Mapping[str, Callable[[], Reward]],
        weights: dict[str, float] | None = None,
        means: dict[str, float] | None = None,
        stds: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not rewards:
            raise ValueError("a weighted reward has no parts: give at least one reward by name.")
        self.names = list(rewards)
        self.weights = constants("weights", self.names, weights, 1.0)
        self.means = constants("means", self.names, means, 0.0)
        self.stds = constants("stds", self.names, stds, 1.0, positive=True)
        # a list, because names may hold dots
        self.parts = nn.ModuleList(r if isinstance(r, Reward) else r() for r in rewards.values())
        distinct = self._distinct()
        self.id = " + ".join(
            f"{self.weights[name]:g}·{reward.id}" for name, reward in self.items()
        )
        self.init_args = {}
        self.num_blocks, self.grid = 0, (1, 1)
        self.width = self.embed_dim = 1 + sum(reward.embed_dim for reward in distinct)
        self.uses_text = any(reward.uses_text for reward in distinct)
        self.affine = all(reward.affine for reward in distinct)
        self._text_widths: list[int] | None = None

    def items(self) -> list[tuple[str, Reward]]:
        """Returns the parts with their names."""
        return list(zip(self.names, self.parts, strict=True))  # type: ignore[arg-type]

    def park(self) -> None:
        """Parks every part."""
        self.parked = True
        for reward in self._distinct():
            reward.park()

    def drop_tower(self) -> None:
        """Frees what looks at images in every part."""
        for reward in self._distinct():
            reward.drop_tower()

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Returns the pixels as they are: every part has its own resize and normalisation."""
        return pixels

    def embed(self, pixels: Tensor) -> Embedding:
        """Returns [ẽ_1, …, ẽ_K, 1] with shape (B, E), also as the only token (B, 1, E)."""
        image = joined([reward.embed(pixels).image for reward in self._distinct()])
        return Embedding(image[:, None], image)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Returns the text embeddings of the parts that read text, side by side with a 1, with shape (B, E).

        Raises:
            ValueError: If no part reads text.
        """
        readers = [reward for reward in self._distinct() if reward.uses_text]
        if not readers:
            raise ValueError(
                f"{self.id} reads no text: bind it without prompts, or add a part that does."
            )
        texts = [reward.encode_text(prompts) for reward in readers]
        self._text_widths = [text.shape[-1] for text in texts]
        return torch.cat([*texts, texts[0].new_ones(len(texts[0]), 1)], dim=-1)

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns r with shape (B,) from what `embed` and `encode_text` returned, or from averages of the former.

        Raises:
            NotFiniteError: If the score of a part is not finite.
            ValueError: If the embeddings have another width, or text is missing.
        """
        scores = self.part_scores(image, text)
        return sum_of(scores, self.weights, self.means, self.stds)

    def part_scores(self, image: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the score r_k of every part by name, each (B,), neither weighted nor normalised."""
        if image.ndim != 2 or image.shape[1] != self.embed_dim:
            raise ValueError(
                f"{self.id} scores image embeddings (B, {self.embed_dim}), got {tuple(image.shape)}: pass what its "
                "embed returns."
            )
        distinct, texts = self._distinct(), self.split_text(text)
        images = (image[:, :-1] / image[:, -1:]).split([r.embed_dim for r in distinct], dim=1)
        found = {
            id(reward): score_of_average(reward, e, texts[id(reward)])
            if reward.affine
            else reward.score(e, texts[id(reward)])
            for reward, e in zip(distinct, images, strict=True)
        }
        return {name: found[id(reward)] for name, reward in self.items()}

    def split_text(self, text: Tensor | None) -> dict[int, Tensor | None]:
        """Returns each part's text embeddings by the part's `id()`, from what `encode_text` returned; None for a
        part that reads no text.

        Raises:
            ValueError: If the text is missing or has another width.
        """
        distinct = self._distinct()
        if not self.uses_text:
            return {id(reward): None for reward in distinct}
        if text is None:
            raise ValueError(
                f"{self.id} compares images with text: pass what encode_text(prompts) returns."
            )
        if self._text_widths is None:
            self.encode_text([""])
        assert self._text_widths is not None
        width = sum(self._text_widths) + 1
        if text.ndim != 2 or text.shape[1] != width:
            raise ValueError(
                f"{self.id} got text embeddings {tuple(text.shape)}, expected (B, {width}): pass what its encode_text "
                "returns."
            )
        pieces = iter((text[:, :-1] / text[:, -1:]).split(self._text_widths, dim=1))
        return {id(reward): next(pieces) if reward.uses_text else None for reward in distinct}

    def flops(self) -> int:
        """Returns the multiply-add FLOPs (2 per multiply-add) of `embed` for one image."""
        return sum(reward.flops() for reward in self._distinct())

    def prefixes(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        """Raises ValueError: it is not stitched."""
        self._cannot_be_cut()

    def class_tokens(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        """Raises ValueError: it is not stitched."""
        self._cannot_be_cut()

    def probe(self, pixels: Tensor, js: Sequence[int]) -> Probe:
        """Raises ValueError: it is not stitched."""
        self._cannot_be_cut()

    def tail(self, j: int) -> RewardTail:
        """Raises ValueError: it is not stitched."""
        self._cannot_be_cut()

    def _distinct(self) -> list[Reward]:
        return list({id(part): part for part in self.parts}.values())  # type: ignore[arg-type]

    def _cannot_be_cut(self) -> NoReturn:
        raise ValueError(
            f"{self.id} is a sum of rewards and cannot be cut and stitched: distil a value model for every part, and "
            "add them up with stitchvm.values.weighted.WeightedValue."
        )


def joined(images: Sequence[Tensor], averages: Sequence[bool] | None = None) -> Tensor:
    """Returns [e_1, …, e_K, 1] with shape (B, E) in float32 or better; each e_k is brought to unit length first.

    Arguments:
        images: Embeddings, each with shape (B, E_k).
        averages: Which of them are averages, whose length is kept; none by default.
    """
    kept = averages or [False] * len(images)
    parts = []
    for image, average in zip(images, kept, strict=True):
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        parts.append(image if average else normalize(image, dim=-1))
    return torch.cat([*parts, parts[0].new_ones(len(parts[0]), 1)], dim=-1)


def sum_of(
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    means: Mapping[str, float],
    stds: Mapping[str, float],
) -> Tensor:
    """Returns Σ_k w_k (V_k − mean_k)/std_k with shape (B,), in float32 or better."""
    total: Tensor | None = None
    for name, value in values.items():
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        term = weights[name] * (value - means[name]) / stds[name]
        total = term if total is None else total + term
    assert total is not None
    return total


def constants(
    what: str,
    names: Sequence[str],
    given: Mapping[str, float] | None,
    default: float,
    positive: bool = False,
) -> dict[str, float]:
    """Returns one constant per name: the given one, or the default.

    Raises:
        ValueError: If a name is unknown, or a constant is not finite, or not positive where it must be.
    """
    given = dict(given or {})
    if unknown := sorted(given.keys() - set(names)):
        raise ValueError(
            f"{what} are given for {unknown}, but the parts are {list(names)}: use the parts' names."
        )
    found = {name: float(given.get(name, default)) for name in names}
    for name, x in found.items():
        if x != x or abs(x) == float("inf") or (positive and x <= 0):
            wanted = "a positive number" if positive else "a finite number"
            raise ValueError(f"{what} of {name!r} = {x}: expected {wanted}.")
    return found
