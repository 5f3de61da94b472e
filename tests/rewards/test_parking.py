"""Rewards that wait in CPU memory, or let go of their vision tower: what is moved when, and what stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stitchvm.rewards import open_clip_reward
from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.parking import CPU, present
from stitchvm.rewards.weighted import WeightedReward
from tests.rewards.tiny import head_file

GPU = torch.device("cuda")
PROMPTS = ["a red circle", "a blue square"]


class Moved(nn.Module):
    """Writes down where it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, device: Any) -> Any:
        self.places.append(torch.device(device).type)
        return self


def test_a_parked_module_is_away_but_for_its_calls() -> None:
    module = Moved()
    with present(module, GPU, parked=True):
        assert module.places == ["cuda"]
    assert module.places == ["cuda", "cpu"]
    with pytest.raises(RuntimeError, match="failed"), present(module, GPU, parked=True):
        raise RuntimeError("it failed")
    assert module.places == ["cuda", "cpu"] * 2
    for device, parked in ((GPU, False), (CPU, True)):
        with present(module, device, parked):
            pass
    assert len(module.places) == 4, "nothing to move"


def test_towers_are_fetched_when_they_are_called(
    tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = CLIPReward(model=f"local-dir:{tiny_clip}")
    pixels = torch.rand(2, 3, 16, 16)
    image = reward.embed(pixels).image
    fetched: list[nn.Module] = []

    def spy(module: nn.Module, device: torch.device, parked: bool) -> Any:
        fetched.extend([module] if parked else [])
        return present(module, device, parked)

    monkeypatch.setattr(open_clip_reward, "present", spy)
    reward.embed(pixels)
    assert fetched == [], "it is not parked"
    reward.park()
    assert reward.parked
    text = reward.encode_text(PROMPTS)
    assert fetched == [reward.text]
    reward.encode_text(PROMPTS)
    reward.score(image, text)
    assert fetched == [reward.text], "known prompts and scores need no tower"
    assert torch.equal(reward.embed(pixels).image, image)
    reward.prefix(pixels, 2), reward.class_tokens(pixels, [1]), reward.probe(pixels, [1])
    reward.tail(2)
    assert fetched == [reward.text, *[reward.visual] * 5]


def test_without_its_tower_it_encodes_and_scores_as_before(
    tiny_clip: Path, tmp_path: Path
) -> None:
    head = str(head_file(tmp_path / "head.pth"))
    rewards = [
        CLIPReward(model=f"local-dir:{tiny_clip}"),
        AestheticReward(model=f"local-dir:{tiny_clip}", head=head),
    ]
    both = WeightedReward({"clip": lambda: rewards[0], "looks": lambda: rewards[1]})
    pixels = torch.rand(2, 3, 16, 16)
    image, r = both.embed(pixels).image, both(pixels, both.encode_text(PROMPTS))
    sizes = [sum(p.numel() for p in reward.parameters()) for reward in rewards]
    towers = [sum(p.numel() for p in reward.visual.parameters()) for reward in rewards]
    both.drop_tower()
    for reward, size, tower in zip(rewards, sizes, towers, strict=True):
        assert sum(p.numel() for p in reward.parameters()) == size - tower < size
        for looks, arguments in ((reward.embed, [pixels]), (reward.tail, [1]), (reward.flops, [])):
            with pytest.raises(ValueError, match="has dropped its vision tower"):
                looks(*arguments)
    assert torch.equal(both.score(image, both.encode_text([*PROMPTS, "new"])[:2]), r)
    both.park()
    assert all(reward.parked for reward in (both, *rewards))
    assert torch.equal(both.score(image, both.encode_text(["newer", *PROMPTS])[1:]), r)
