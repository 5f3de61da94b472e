"""Agreement with human rankings of the images of one prompt, by three protocols from the same scores.

    hpdv2:        per prompt 1 − D/(n(n−1)/2), D the pairs ordered against the label; mean over prompts.
                  A pair tied in the label is never discordant.
    imagereward:  per prompt correct/pairs over the pairs not tied in the label; mean over prompts
                  (prompts whose labels are all tied have no pair and do not count).
    pooled:       the same pairs, correct/pairs over all prompts together.

Ties in the score. HPSv2 ranks by `argsort`, which breaks a tie by accident: here such a pair counts as half
discordant, the expectation of that. In the other two a tied score is wrong, as in the published code.

Standard errors: over prompts (s/√G), and clustered by prompt for the pooled share. Sources: `evaluate_rank`
of HPSv2, `calc_ImageReward` of HPSv2, `acc` of ImageReward's test.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from stitchvm.metrics.estimate import Estimate, first_by_index, mean, ratio

PROTOCOLS = ("hpdv2", "imagereward", "pooled")


def count_pairs(score: Tensor, rank: Tensor) -> tuple[float, int, int]:
    """Returns (discordant, correct, labelled) counts of one prompt's pairs.

    Arguments:
        score: The images' scores, higher is better, with shape (n,).
        rank: The images' human ranks, lower is better, with shape (n,).
    """
    i, j = torch.triu_indices(len(score), len(score), offset=1, device=score.device)
    label = torch.sign(rank[j] - rank[i])
    agree = torch.sign(score[i] - score[j]) * label
    labelled = label != 0
    wrong = int((agree < 0).sum())
    tied = int((labelled & (agree == 0)).sum())
    return wrong + 0.5 * tied, int((agree > 0).sum()), int(labelled.sum())


class PreferenceAccuracy(Metric):
    """The three accuracies of `PROTOCOLS`, exact under several devices and repeated samples.

    `compute` returns `{"hpdv2": Estimate, "imagereward": Estimate, "pooled": Estimate}`, as shares.
    """

    score: list[Tensor]
    rank_label: list[Tensor]
    group: list[Tensor]
    index: list[Tensor]

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        for name in ("score", "rank_label", "group", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, score: Tensor, rank: Tensor, group: Tensor, index: Tensor) -> None:
        """Adds images.

        Arguments:
            score: The scores, higher is better, with shape (B,).
            rank: The human ranks within the group, lower is better, with shape (B,).
            group: Which prompt each image belongs to, with shape (B,).
            index: The images' indices in the data set, with shape (B,).

        Raises:
            ValueError: If shapes disagree or a score is not finite.
        """
        if not (score.shape == rank.shape == group.shape == index.shape and score.dim() == 1):
            raise ValueError(
                f"got score {tuple(score.shape)}, rank {tuple(rank.shape)}, group {tuple(group.shape)} "
                f"and index {tuple(index.shape)}: expected four vectors of one length."
            )
        if not bool(torch.isfinite(score).all()):
            raise ValueError("a score is not finite: it cannot be compared with a human ranking.")
        self.score.append(score.double())
        self.rank_label.append(rank.double())
        self.group.append(group.long())
        self.index.append(index.long())

    def compute(self) -> dict[str, Estimate]:
        """Returns the accuracies over all that was added, each image counted once.

        Raises:
            ValueError: If no two images share a prompt.
        """
        keep = first_by_index(dim_zero_cat(self.index))
        score, rank = dim_zero_cat(self.score)[keep], dim_zero_cat(self.rank_label)[keep]
        group = dim_zero_cat(self.group)[keep]
        discordant, right, pairs, labelled = [], [], [], []
        for one in group.unique():
            mine = group == one
            n = int(mine.sum())
            if n < 2:
                continue
            wrong, correct, counted = count_pairs(score[mine], rank[mine])
            discordant.append(wrong)
            right.append(correct)
            labelled.append(counted)
            pairs.append(n * (n - 1) // 2)
        if not pairs:
            raise ValueError(
                "no two images share a prompt (`group`): there is no pair to compare."
            )
        hits, counts = torch.tensor(right).double(), torch.tensor(labelled).double()
        shares = 1 - torch.tensor(discordant).double() / torch.tensor(pairs)
        answer = {"hpdv2": mean(shares)}
        if bool((counts > 0).any()):
            answer["imagereward"] = mean((hits / counts)[counts > 0])
            answer["pooled"] = ratio(hits[counts > 0], counts[counts > 0])
        return answer
