"""The metrics of an evaluation, by estimator and noise level, and the records they end in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from stitchvm.metrics.correlation import SpearmanCorrelation
from stitchvm.metrics.truth import TruthError
from stitchvm.modules.tasks import Task, Texts

Key = tuple[str, float | None]


class Board(nn.Module):
    """One metric of the task per estimator and noise level, and two more ways to look at a value.

    - `clean_agreement`: the rank correlation of values with the clean reward's scores of the same images;
    - `truth`: the error against Monte Carlo truth.

    Arguments:
        task: What is measured.
        keys: Estimators and noise levels; ("clean", None) is the clean reward.
        truth: Whether there will be Monte Carlo truth.
        benchmark: The data set's name, for the records.
    """

    def __init__(
        self, task: Task, keys: list[Key], truth: bool = False, benchmark: str | None = None
    ) -> None:
        super().__init__()
        self.benchmark = benchmark
        noisy = [key for key in keys if key[1] is not None]
        self.task = task
        self.main: dict[Key, Metric] = {key: task.metric() for key in keys}
        self.agreement: dict[Key, SpearmanCorrelation] = {}
        if len(noisy) < len(keys):
            self.agreement = {key: SpearmanCorrelation() for key in noisy}
        self.errors: dict[Key, TruthError] = {key: TruthError() for key in noisy} if truth else {}
        # a list registers them, so that they move with the module
        self.registered = nn.ModuleList(
            [*self.main.values(), *self.agreement.values(), *self.errors.values()]
        )

    def add(
        self,
        key: Key,
        image: Tensor,
        score: Tensor | None,
        texts: Texts,
        batch: dict[str, Any],
        reference: Tensor | None = None,
        truth: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Adds a batch.

        Arguments:
            key: Estimator and noise level.
            image: Embeddings with shape (B, E), ready to be multiplied with unit text embeddings.
            score: The values of the images for their own prompts, with shape (B,), if they have any.
            texts: The batch's texts.
            batch: The batch.
            reference: The clean reward's scores, with shape (B,).
            truth: Which of the batch have truth, with shape (K,), and its two halves, each (K,).
        """
        self.task.update(self.main[key], image, score, texts, batch)
        if score is not None and reference is not None:
            self.agreement[key].update(score, reference, batch["index"])
        if score is not None and truth is not None:
            chosen, half_a, half_b = truth
            self.errors[key].update(score[chosen], half_a, half_b, batch["index"][chosen])

    def records(self) -> list[dict[str, Any]]:
        """Returns the records of all that was added on all devices; every process must call it."""
        answer: list[dict[str, Any]] = []
        named = {} if self.benchmark is None else {"benchmark": self.benchmark}
        for prefix, metrics in (
            (self.task.name, self.main),
            ("clean_agreement", self.agreement),
            ("truth", self.errors),
        ):
            for (name, sigma), metric in metrics.items():
                if not metric.update_called:
                    continue
                for what, estimate in metric.compute().items():
                    answer.append(
                        {
                            **named,
                            "metric": f"{prefix}/{what}",
                            "estimator": name,
                            "sigma": sigma,
                            "value": float(estimate.value),
                            "stderr": float(estimate.stderr),
                            "n": int(estimate.n),
                        }
                    )
        return answer
