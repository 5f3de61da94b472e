"""Recall against a plain count, several captions per image, ties, repeats, and two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize

from stitchvm.metrics.correlation import SpearmanCorrelation
from stitchvm.metrics.estimate import Estimate
from stitchvm.metrics.preference import PreferenceAccuracy
from stitchvm.metrics.retrieval import RetrievalRecall
from stitchvm.metrics.truth import TruthError


def world(n: int = 40, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Returns images, texts (2 to 5 per image, in mixed order) and each text's image."""
    image = torch.randn(n, width)
    owner = torch.arange(n).repeat_interleave(torch.arange(n) % 4 + 2)
    owner = owner[torch.randperm(len(owner))]
    return image, image[owner] + 0.8 * torch.randn(len(owner), width), owner


def by_hand(image: Tensor, text: Tensor, owner: Tensor, k: int) -> tuple[float, float]:
    """Returns (image → text, text → image) R@k by sorting every list."""
    scores = (normalize(text, dim=-1) @ normalize(image, dim=-1).T).double()
    to_image = [
        int(owner[m]) in scores[m].argsort(descending=True)[:k].tolist() for m in range(len(text))
    ]
    to_text = [
        any(int(owner[m]) == b for m in scores[:, b].argsort(descending=True)[:k].tolist())
        for b in range(len(image))
    ]
    return sum(to_text) / len(to_text), sum(to_image) / len(to_image)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_recall_is_the_plain_count(chunk: int) -> None:
    image, text, owner = world()
    metric = RetrievalRecall(chunk=chunk)
    for part in torch.arange(len(image)).split(9):
        mine = torch.isin(owner, part)
        metric.update(image[part], part, text[mine], owner[mine])
    answer = metric.compute()
    for k in (1, 5, 10):
        there, back = by_hand(image, text, owner, k)
        assert answer[f"image_to_text_r{k}"].value == pytest.approx(there, abs=1e-12)
        assert answer[f"text_to_image_r{k}"].value == pytest.approx(back, abs=1e-12)
        assert answer[f"mean_r{k}"].value == pytest.approx((there + back) / 2, abs=1e-12)
    assert 0.1 < answer["text_to_image_r1"].value < 0.9
    assert answer["image_to_text_r1"].n == 40 and answer["text_to_image_r1"].n == len(text)


def test_repeated_images_count_once() -> None:
    image, text, owner = world()
    index = torch.arange(len(image))
    once, twice = RetrievalRecall(), RetrievalRecall()
    once.update(image, index, text, owner)
    twice.update(image, index, text, owner)
    mine = owner < 3
    twice.update(image[:3], index[:3], text[mine], owner[mine])
    # a repeat inside one batch, told apart by the captions' numbers
    again = torch.tensor([5, 5])
    number = torch.arange(int((owner == 5).sum()))
    lines = text[owner == 5]
    twice.update(
        image[again], again, lines.repeat(2, 1), torch.full((2 * len(lines),), 5), number.repeat(2)
    )
    assert once.compute() == twice.compute()


def test_ties_go_to_the_lower_index() -> None:
    n = 8
    metric = RetrievalRecall(ks=(1, 5))
    index = torch.arange(n)
    metric.update(torch.ones(n, 3), index, torch.ones(2 * n, 3), index.repeat_interleave(2))
    answer = metric.compute()
    # an image's captions hold places 2b and 2b + 1; image b has place b
    assert answer["image_to_text_r1"].value == pytest.approx(1 / n)
    assert answer["image_to_text_r5"].value == pytest.approx(3 / n)
    assert answer["text_to_image_r1"].value == pytest.approx(1 / n)
    assert answer["text_to_image_r5"].value == pytest.approx(5 / n)


def test_standard_errors_match_resampled_items() -> None:
    image, text, owner = world(200, 4)
    metric = RetrievalRecall(ks=(1,))
    metric.update(image, torch.arange(200), text, owner)
    answer = metric.compute()
    score = normalize(text, dim=-1) @ normalize(image, dim=-1).T
    hit = (score.argmax(dim=1) == owner).double()
    hits = torch.zeros(200).double().index_add_(0, owner, hit)
    counts = torch.bincount(owner, minlength=200).double()
    found = (owner[score.argmax(dim=0)] == torch.arange(200)).double()
    picks = torch.randint(200, (4000, 200))
    back = hits[picks].sum(1) / counts[picks].sum(1)
    there = found[picks].mean(1)
    for name, resampled in (
        ("image_to_text_r1", there),
        ("text_to_image_r1", back),
        ("mean_r1", (there + back) / 2),
    ):
        assert answer[name].stderr == pytest.approx(float(resampled.std()), rel=0.06)


def test_bad_input_is_named() -> None:
    metric = RetrievalRecall()
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="not finite"):
        metric.update(torch.tensor([[torch.nan, 1.0]]), one, torch.ones(1, 2), one)
    with pytest.raises(ValueError, match="expected one index each"):
        metric.update(torch.ones(2, 2), one, torch.ones(1, 2), one)
    metric.update(torch.ones(2, 2), torch.tensor([0, 4]), torch.ones(1, 2), one)
    with pytest.raises(ValueError, match="belongs to item 4"):
        metric.compute()


def two_processes(rank: int, folder: str, data: dict[str, Tensor]) -> None:
    """Gives each process half of 5 samples, one of them twice, as a padding sampler does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = torch.tensor([[4, 2, 0], [1, 3, 0]][rank])
    recall, accuracy, srcc, truth = metrics = every()
    lines = torch.isin(data["owner"], mine)
    recall.update(data["image"][mine], mine, data["text"][lines], data["owner"][lines])
    accuracy.update(data["score"][mine], data["rank"][mine], data["group"][mine], mine)
    srcc.update(data["score"][mine], data["rank"][mine], mine)
    # the second process has none of the samples that truth is known for
    mine = mine[:2] if rank == 0 else mine[:0]
    truth.update(data["score"][mine], data["rank"][mine], data["group"][mine].float(), mine)
    torch.save([metric.compute() for metric in metrics], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def every() -> tuple[RetrievalRecall, PreferenceAccuracy, SpearmanCorrelation, TruthError]:
    return (
        RetrievalRecall(ks=(1, 2)),
        PreferenceAccuracy(),
        SpearmanCorrelation(),
        TruthError(resamples=20),
    )


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    image, text, owner = world(5)
    data = {"image": image, "text": text, "owner": owner, "score": torch.randn(5)}
    data |= {
        "rank": torch.tensor([2.0, 1, 1, 3, 2]),
        "group": torch.tensor([0, 0, 0, 1, 1]),
    }
    # forked: a fresh interpreter would spend seconds on imports
    mp.start_processes(two_processes, args=(str(tmp_path), data), nprocs=2, start_method="fork")
    recall, accuracy, srcc, truth = metrics = every()
    recall.update(image, torch.arange(5), text, owner)
    accuracy.update(data["score"], data["rank"], data["group"], torch.arange(5))
    srcc.update(data["score"], data["rank"], torch.arange(5))
    some = torch.tensor([2, 4])
    truth.update(data["score"][some], data["rank"][some], data["group"][some].float(), some)
    expected = [metric.compute() for metric in metrics]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert flat(found) == pytest.approx(flat(expected), nan_ok=True, abs=0)
    assert expected[0]["image_to_text_r1"].n == 5 and expected[3]["r2"].n == 2


def flat(answers: list[dict[str, Estimate]]) -> list[float]:
    """Returns all numbers of several metrics in a row."""
    return [float(x) for answer in answers for estimate in answer.values() for x in estimate]
