"""What a checkpoint holds and requires."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stitchvm.modules.checkpoint import LeanCheckpoint, renumber


class Half(LeanCheckpoint):
    pretrained_prefixes = ("teacher.",)

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = nn.Linear(2, 2), nn.Linear(2, 3)


@pytest.fixture
def saved():
    module = Half()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_nothing_pretrained_is_saved(saved):
    assert set(saved["state_dict"]) == {"student.weight", "student.bias"}
    assert saved["trained"] == {"student.weight": [3, 2], "student.bias": [3]}
    Half().on_load_checkpoint(saved)


def test_a_missing_key_is_named(saved):
    del saved["state_dict"]["student.bias"]
    with pytest.raises(ValueError, match=r"missing \['student.bias'\] \(1\)"):
        Half().on_load_checkpoint(saved)


def test_unknown_keys_and_wrong_shapes_are_named(saved):
    saved["state_dict"]["other"] = torch.zeros(1)
    saved["state_dict"]["student.bias"] = torch.zeros(4)
    with pytest.raises(
        ValueError, match=r"unknown \['other'\].*student\.bias \(4,\) \(expected \(3,\)\)"
    ):
        Half().on_load_checkpoint(saved)


def test_strict_also_where_the_strategy_has_taken_the_weights(saved):
    del saved["state_dict"]
    Half().on_load_checkpoint(saved)
    del saved["trained"]["student.weight"]
    with pytest.raises(ValueError, match=r"missing \['student.weight'\]"):
        Half().on_load_checkpoint(saved)


def test_an_optimiser_is_numbered_by_the_module_and_still_loads_by_position():
    module = Half()
    groups = [{"params": [module.student.bias]}, {"params": [module.student.weight], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups)
    (module.student(torch.ones(1, 2)).sum() * 3).backward()
    optimizer.step()
    state = optimizer.state_dict()
    expected = {p: optimizer.state[p]["exp_avg"].clone() for p in module.student.parameters()}
    renumber(state, [3, 2])  # teacher.weight, teacher.bias, student.weight, student.bias
    assert [group["params"] for group in state["param_groups"]] == [[3], [2]]
    assert torch.equal(state["state"][3]["exp_avg"], expected[module.student.bias])
    again = torch.optim.AdamW(
        [{"params": [module.student.bias]}, {"params": [module.student.weight]}]
    )
    again.load_state_dict(state)
    for parameter, value in expected.items():
        assert torch.equal(again.state[parameter]["exp_avg"], value)
