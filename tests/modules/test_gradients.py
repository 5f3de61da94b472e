"""Gradients of two ranks averaged in one exchange, norms and limits by hand, and what ranks tell each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from stitchvm.modules import gradients, ranks
from stitchvm.modules.gradients import average_gradients, clip_gradients, gradient_norm
from stitchvm.modules.learning_rate import rates


def weights(*each: list[float] | None) -> list[nn.Parameter]:
    found = []
    for gradient in each:
        p = nn.Parameter(torch.zeros(2 if gradient is None else len(gradient)))
        p.grad = None if gradient is None else torch.tensor(gradient)
        found.append(p)
    return found


def test_norm_and_limit():
    found = weights([3.0, 0.0], [4.0])
    norm = gradient_norm(found)
    assert float(norm) == 5.0
    clip_gradients(found, norm, 10.0)
    assert found[0].grad.tolist() == [3.0, 0.0]
    clip_gradients(found, norm, 1.0)
    torch.testing.assert_close(found[0].grad, torch.tensor([0.6, 0.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].grad, torch.tensor([0.8]), rtol=1e-5, atol=0)


def test_warm_up_rises_linearly_and_stays():
    optimizer = torch.optim.SGD(weights([0.0]), lr=2.0)
    schedule = rates(optimizer, 4)
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_one_process_is_left_as_it_is():
    found = weights([1.0], None)
    loss = torch.tensor(2.0)
    assert average_gradients(found, loss) is loss
    assert found[0].grad.tolist() == [1.0] and found[1].grad.tolist() == [0.0, 0.0]
    x = torch.ones(3)
    assert ranks.gather(x) is x and ranks.all_agree(False, x.device) is False
    assert ranks.all_mean({"a": torch.tensor(0.5)}) == {"a": 0.5} and ranks.all_mean({}) == {}
    assert ranks.gather_objects("x") == ["x"] and ranks.world_size() == 1


def test_gradients_of_full_fine_tuning_go_in_portions(monkeypatch: pytest.MonkeyPatch):
    """No more than so many numbers are copied at once; small ones share an exchange, the loss with the first."""
    sent = []

    def add_the_other_rank(flat: torch.Tensor) -> None:
        sent.append(len(flat))
        flat += 1.0

    monkeypatch.setattr(gradients, "AT_ONCE", 4)
    monkeypatch.setattr(gradients, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", add_the_other_rank)
    found, loss = weights([3.0, 5.0], [7.0], [1.0] * 6, [9.0], None, [11.0]), torch.tensor(2.0)
    assert average_gradients(found, loss).item() == 1.5 and loss.item() == 2.0
    assert [p.grad.tolist() for p in found] == [
        [2.0, 3.0], [4.0], [1.0] * 6, [5.0], [0.5, 0.5], [6.0],
    ]  # fmt: skip
    assert sent == [4, 6, 4]


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    found: dict[str, Any] = {}
    mine = weights([1.0, 2.0], [5.0], None) if number == 0 else weights([3.0, 6.0], None, None)
    mine[2].grad = torch.ones(2) if number == 1 else None
    if number == 1:
        mine[1] = nn.Parameter(torch.zeros(1))
    found["loss"] = average_gradients(mine, torch.tensor(1.0 + number)).item()
    found["gradients"] = [p.grad.tolist() for p in mine]
    bad = weights([1.0, float("nan") if number else 1.0])
    loss = average_gradients(bad, torch.tensor(0.0))
    found["bad"] = bool((gradient_norm(bad) + loss).isfinite())
    lost = average_gradients(weights([1.0]), torch.tensor(float("inf") if number == 0 else 1.0))
    found["lost"] = bool(lost.isfinite())
    found["mean"] = ranks.all_mean(
        {"both": torch.tensor(float(number))} | ({"one": torch.tensor(7.0)} if number else {})
    )
    found["gather"] = ranks.gather(torch.tensor([[number, 1]])).tolist()
    found["agree"] = [ranks.all_agree(yes, torch.device("cpu")) for yes in (True, number == 0)]
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_mean_and_know_of_each_others_failures(tmp_path: Path):
    mp.spawn(rank, args=(str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    assert found[0] == found[1]
    assert found[0] == {
        "loss": 1.5,
        "gradients": [[2.0, 4.0], [2.5], [0.5, 0.5]],
        "bad": False,
        "lost": False,
        "mean": {"both": 0.5, "one": 7.0},
        "gather": [[0, 1], [1, 1]],
        "agree": [True, False],
    }
