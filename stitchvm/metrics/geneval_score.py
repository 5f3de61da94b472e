"""GenEval's score from verdicts: the mean of the six tasks' accuracies, each task counting the same.

    overall = 1/6 · Σ_task (correct images of the task / its images)

It is not the share of correct images, since the tasks have 80 to 100 prompts each. Standard errors: images of one
prompt are not independent, so a task's is clustered by prompt; the overall one is √(Σ s.e.²)/6, tasks being
independent. Also given: `images`, the share of correct images, and `prompts`, the share of prompts with at least one
correct image.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from stitchvm.metrics.estimate import Estimate, first_by_index, mean, ratio
from stitchvm.metrics.geneval import TASKS, Verdict
from stitchvm.metrics.geneval_metadata import group_of

__all__ = ["GenEvalScore", "geneval_records", "geneval_score"]


def geneval_score(
    tags: Sequence[str], correct: Sequence[bool], groups: Sequence[Any]
) -> dict[str, Estimate]:
    """Returns "overall", each task, "images" and "prompts"; the overall score is over the tasks that occur.

    Arguments:
        tags: The task of each image.
        correct: Whether it is right.
        groups: What names its prompt.

    Raises:
        ValueError: If there are no images, or the lists differ in length.
    """
    if not (len(tags) == len(correct) == len(groups)) or not tags:
        raise ValueError(
            f"got {len(tags)} tags, {len(correct)} verdicts and {len(groups)} prompts: expected as many of "
            "each, at least one."
        )
    absent = [task for task in TASKS if task not in set(tags)]
    if absent:
        warnings.warn(
            f"The overall GenEval score is over {len(set(tags))} tasks: there is no image of {', '.join(absent)}.",
            stacklevel=2,
        )
    tasks = [task for task in TASKS if task in set(tags)]
    tasks += [tag for tag in dict.fromkeys(tags) if tag not in TASKS]
    hits: dict[tuple[str, Any], list[int]] = {}
    for tag, right, group in zip(tags, correct, groups, strict=True):
        hits.setdefault((tag, group), []).append(int(right))
    each = {task: _clustered([h for (tag, _), h in hits.items() if tag == task]) for task in tasks}
    values = torch.stack([estimate.value for estimate in each.values()])
    spread = torch.stack([estimate.stderr for estimate in each.values()])
    overall = Estimate(values.mean(), spread.norm() / len(tasks), torch.tensor(len(tags)))
    images = _clustered(list(hits.values()))
    prompts = mean(torch.tensor([float(any(h)) for h in hits.values()]))
    return {"overall": overall, **each, "images": images, "prompts": prompts}


def geneval_records(
    estimates: Mapping[str, Estimate], label: str, **more: Any
) -> list[dict[str, Any]]:
    """Returns tidy records with metrics such as "GenEval-HF/overall".

    Arguments:
        estimates: From `geneval_score` or `GenEvalScore.compute`.
        label: The detector's label.
        **more: Further keys of every record; `estimator` is "clean" and `sigma` None unless given.
    """
    return [
        {
            "metric": f"{label}/{name}",
            "estimator": "clean",
            "sigma": None,
            "value": float(estimate.value),
            "stderr": float(estimate.stderr),
            "n": int(estimate.n),
            **more,
        }
        for name, estimate in estimates.items()
    ]


class GenEvalScore(Metric):
    """The scores of `geneval_score`, exact under several devices and repeated samples."""

    task: list[Tensor]
    correct: list[Tensor]
    group: list[Tensor]
    index: list[Tensor]

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        for name in ("task", "correct", "group", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self, verdicts: Sequence[Verdict], metadata: Sequence[Mapping[str, Any]], index: Tensor
    ) -> None:
        """Adds images.

        Arguments:
            verdicts: The verdict on each.
            metadata: The entry of each one's prompt.
            index: The images' indices in the data set, with shape (B,).

        Raises:
            ValueError: If there are not as many of each.
        """
        if not len(verdicts) == len(metadata) == len(index):
            raise ValueError(
                f"got {len(verdicts)} verdicts, {len(metadata)} entries and {len(index)} indices: expected "
                "as many of each."
            )
        tasks = [TASKS.index(entry["tag"]) for entry in metadata]
        rows = {
            "task": tasks,
            "correct": [int(verdict.correct) for verdict in verdicts],
            "group": [group_of(entry) for entry in metadata],
            "index": index.tolist(),
        }
        for name, row in rows.items():
            getattr(self, name).append(torch.tensor(row, dtype=torch.int64, device=self.device))

    def compute(self) -> dict[str, Estimate]:
        """Returns the scores over all that was added, each image counted once.

        Raises:
            ValueError: If there are no images.
        """
        keep = first_by_index(dim_zero_cat(self.index))
        columns = (dim_zero_cat(s)[keep].tolist() for s in (self.task, self.correct, self.group))
        task, correct, group = columns
        return geneval_score([TASKS[i] for i in task], [bool(c) for c in correct], group)


def _clustered(hits: Sequence[Sequence[int]]) -> Estimate:
    """Returns the share of hits with its standard error, from a list of hits for each prompt."""
    counts = torch.tensor([len(h) for h in hits])
    return ratio(torch.tensor([sum(h) for h in hits]), counts)
