"""Pair accuracies against the published countings, ties, repeats, standard errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from stitchvm.metrics.preference import PreferenceAccuracy


def world(prompts: int = 30, ties: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scores, ranks and groups of prompts with 2 to 6 images."""
    groups, ranks = [], []
    for prompt in range(prompts):
        n = prompt % 5 + 2
        groups += [prompt] * n
        ranks += (torch.randint(1, 4, (n,)) if ties else torch.randperm(n)).tolist()
    rank = torch.tensor(ranks).float()
    return -rank + 1.5 * torch.randn(len(rank)), rank, torch.tensor(groups)


def by_hand(score: Tensor, rank: Tensor, group: Tensor) -> tuple[float, float, float]:
    """Returns the three accuracies by a loop over pairs; the first one from rank lists, as HPSv2 does."""
    hpdv2, per_prompt, all_right, all_pairs = [], [], 0, 0
    for one in group.unique().tolist():
        mine = [i for i in range(len(group)) if int(group[i]) == one]
        order = sorted(mine, key=lambda i: -float(score[i]))
        place = {i: p for p, i in enumerate(order)}
        wrong = right = labelled = 0
        for i, j in itertools.combinations(mine, 2):
            wrong += (place[i] - place[j]) * float(rank[i] - rank[j]) < 0
            if rank[i] != rank[j]:
                labelled += 1
                better, worse = (i, j) if rank[i] < rank[j] else (j, i)
                right += bool(score[better] > score[worse])
        hpdv2.append(1 - wrong / (len(mine) * (len(mine) - 1) / 2))
        if labelled:
            per_prompt.append(right / labelled)
        all_right, all_pairs = all_right + right, all_pairs + labelled
    return sum(hpdv2) / len(hpdv2), sum(per_prompt) / len(per_prompt), all_right / all_pairs


@pytest.mark.parametrize("ties", [False, True])
def test_accuracies_are_the_published_countings(ties: bool) -> None:
    score, rank, group = world(ties=ties)
    metric = PreferenceAccuracy()
    for part in torch.randperm(len(score)).split(11):
        metric.update(score[part], rank[part], group[part], part)
    metric.update(score[:4], rank[:4], group[:4], torch.arange(4))
    answer = metric.compute()
    expected = by_hand(score, rank, group)
    assert [float(answer[p].value) for p in ("hpdv2", "imagereward", "pooled")] == pytest.approx(
        expected
    )
    assert answer["hpdv2"].n == 30
    if ties:
        assert len({round(x, 6) for x in expected}) == 3
    else:
        # without ties in the label a pair is either right or discordant
        assert expected[0] == pytest.approx(expected[1])


def test_a_tied_score_is_half_wrong_or_wrong() -> None:
    metric = PreferenceAccuracy()
    rank = torch.tensor([1.0, 2.0, 3.0])
    metric.update(torch.tensor([1.0, 1.0, 0.0]), rank, torch.zeros(3), torch.arange(3))
    answer = metric.compute()
    assert answer["hpdv2"].value == pytest.approx(1 - 0.5 / 3)
    assert answer["imagereward"].value == pytest.approx(2 / 3)
    assert answer["pooled"].value == pytest.approx(2 / 3)


def test_standard_errors_match_resampled_prompts() -> None:
    score, rank, group = world(prompts=300)
    metric = PreferenceAccuracy()
    metric.update(score, rank, group, torch.arange(len(score)))
    answer = metric.compute()
    right, pairs, shares = torch.zeros(300), torch.zeros(300), torch.zeros(300)
    for one in range(300):
        mine = group == one
        single = PreferenceAccuracy()
        single.update(score[mine], rank[mine], group[mine], torch.arange(int(mine.sum())))
        parts = single.compute()
        shares[one] = parts["hpdv2"].value
        if "pooled" in parts:
            right[one], pairs[one] = parts["pooled"].value * parts["pooled"].n, parts["pooled"].n
    picks = torch.randint(300, (4000, 300))
    pooled = right[picks].sum(1) / pairs[picks].sum(1)
    assert answer["pooled"].stderr == pytest.approx(float(pooled.std()), rel=0.06)
    assert answer["hpdv2"].stderr == pytest.approx(float(shares[picks].mean(1).std()), rel=0.06)


def test_bad_input_is_named() -> None:
    metric = PreferenceAccuracy()
    with pytest.raises(ValueError, match="not finite"):
        metric.update(torch.tensor([torch.inf]), torch.ones(1), torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="four vectors of one length"):
        metric.update(torch.ones(2), torch.ones(1), torch.ones(1), torch.zeros(1))
    metric.update(torch.ones(2), torch.ones(2), torch.arange(2), torch.arange(2))
    with pytest.raises(ValueError, match="no two images share a prompt"):
        metric.compute()
