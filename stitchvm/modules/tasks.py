"""What an evaluation measures for each kind of data: batch + embeddings of one estimator → its metric.

| task       | batch keys used          | metric                     | a sample's own prompt |
|------------|--------------------------|----------------------------|-----------------------|
| retrieval  | index, captions          | Recall@1/5/10, both ways   | its first caption     |
| preference | index, prompt, group, rank | pair accuracy, 3 protocols | its prompt            |
| aesthetic  | index, score             | SRCC                       | its prompt, if it has one |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from stitchvm.metrics.correlation import SpearmanCorrelation
from stitchvm.metrics.preference import PreferenceAccuracy
from stitchvm.metrics.retrieval import RetrievalRecall
from stitchvm.rewards.base import Reward
from stitchvm.rewards.weighted import WeightedReward

Encode = Callable[[list[str]], Tensor]


@dataclass
class Texts:
    """The texts of a batch, encoded once for all estimators and noise levels.

    Attributes:
        prompts: Each sample's own prompt, or None.
        own: Their embeddings, with shape (B, E), or None.
        captions: All captions' embeddings, with shape (M, E), or None.
        image: The index of each caption's image, with shape (M,), or None.
        number: The number of each caption among its image's, with shape (M,), or None.
    """

    prompts: list[str] | None = None
    own: Tensor | None = None
    captions: Tensor | None = None
    image: Tensor | None = None
    number: Tensor | None = None


class Task(ABC):
    """One kind of evaluation."""

    name: str
    keys: tuple[str, ...]
    needs_text = False

    def check(self, batch: dict[str, Any], reward: Reward) -> None:
        """Raises ValueError if the batch lacks a key, or the reward cannot read what the task needs."""
        missing = [key for key in ("index", *self.keys) if key not in batch]
        if missing:
            raise ValueError(
                f"a {self.name} evaluation needs the batch keys {missing}, but the data module gave "
                f"{sorted(batch)}: choose a data module of this task."
            )
        self.check_reward(reward)

    def check_reward(self, reward: Reward) -> None:
        """Raises ValueError if the reward cannot do what the task asks of it, before there are data."""
        if self.needs_text and not reward.uses_text:
            raise ValueError(
                f"a {self.name} evaluation compares images with texts, but the reward {reward.id} reads no "
                "text: choose a CLIP-like reward, or an aesthetic data set."
            )
        if self.needs_text and isinstance(reward, WeightedReward):
            raise ValueError(
                f"a {self.name} evaluation compares every image with every text by the product of their embeddings, "
                f"but {reward.id} is a sum of rewards, which has no such product: evaluate each part by itself "
                f"({', '.join(reward.names)}), or the sum on a preference or aesthetic data set."
            )
        if self.needs_text and not reward.affine:
            raise ValueError(
                f"a {self.name} evaluation compares images with texts by the product of their embeddings, but the "
                f"reward {reward.id} scores them in another way: choose a CLIP-like reward."
            )

    def texts(self, batch: dict[str, Any], reward: Reward, encode: Encode) -> Texts:
        """Returns the batch's texts; `encode` maps prompts to embeddings."""
        prompts = batch.get("prompt") if reward.uses_text else None
        return Texts(prompts, None if prompts is None else encode(prompts))

    @abstractmethod
    def metric(self) -> Metric:
        """Returns a new metric for one estimator at one noise level."""

    @abstractmethod
    def update(
        self, metric: Any, image: Tensor, score: Tensor | None, texts: Texts, batch: dict[str, Any]
    ) -> None:
        """Adds a batch: image embeddings (B, E), ready to be multiplied, and scores (B,)."""


class Retrieval(Task):
    """Zero-shot retrieval among all images and captions of the data set."""

    name, keys, needs_text = "retrieval", ("captions",), True

    def texts(self, batch: dict[str, Any], reward: Reward, encode: Encode) -> Texts:
        """Returns the captions; an image's own prompt is its first."""
        captions: list[list[str]] = batch["captions"]
        if not all(captions):
            place = [bool(lines) for lines in captions].index(False)
            raise ValueError(f"the image with index {int(batch['index'][place])} has no caption.")
        lines = [line for one in captions for line in one]
        embedded = encode(lines)
        device = embedded.device
        counts = torch.tensor([len(one) for one in captions], device=device)
        first = counts.cumsum(0) - counts
        number = torch.arange(len(lines), device=device) - first.repeat_interleave(counts)
        image = batch["index"].to(device).repeat_interleave(counts)
        return Texts([one[0] for one in captions], embedded[first], embedded, image, number)

    def metric(self) -> RetrievalRecall:
        """Returns a recall of embeddings that are already of the right length."""
        return RetrievalRecall(normalize=False)

    def update(
        self, metric: Any, image: Tensor, score: Tensor | None, texts: Texts, batch: dict[str, Any]
    ) -> None:
        """Adds images and captions."""
        metric.update(image, batch["index"], texts.captions, texts.image, texts.number)


class Preference(Task):
    """Agreement with human rankings of the images of one prompt."""

    name, keys = "preference", ("group", "rank")

    def check(self, batch: dict[str, Any], reward: Reward) -> None:
        """Raises ValueError also if a reward that reads text has no prompt."""
        super().check(batch, reward)
        if reward.uses_text and "prompt" not in batch:
            raise ValueError(f"the reward {reward.id} needs the batch key 'prompt'.")

    def metric(self) -> PreferenceAccuracy:
        """Returns a pair accuracy."""
        return PreferenceAccuracy()

    def update(
        self, metric: Any, image: Tensor, score: Tensor | None, texts: Texts, batch: dict[str, Any]
    ) -> None:
        """Adds scores and ranks."""
        metric.update(score, batch["rank"], batch["group"], batch["index"])


class Aesthetic(Task):
    """Rank correlation with human or true scores."""

    name, keys = "aesthetic", ("score",)

    def check(self, batch: dict[str, Any], reward: Reward) -> None:
        """Raises ValueError also if a reward that reads text has no prompt."""
        super().check(batch, reward)
        if reward.uses_text and "prompt" not in batch:
            raise ValueError(
                f"the reward {reward.id} compares images with texts, but this data set has none: choose "
                "an aesthetic reward, or a data set with prompts."
            )

    def metric(self) -> SpearmanCorrelation:
        """Returns a rank correlation."""
        return SpearmanCorrelation()

    def update(
        self, metric: Any, image: Tensor, score: Tensor | None, texts: Texts, batch: dict[str, Any]
    ) -> None:
        """Adds scores and targets."""
        metric.update(score, batch["score"], batch["index"])


TASKS: dict[str, type[Task]] = {task.name: task for task in (Retrieval, Preference, Aesthetic)}
