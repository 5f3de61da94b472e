"""Seconds of the stages of an update."""

from __future__ import annotations

import torch

from stitchvm.modules.stages import Stages


def test_stages_add_up():
    stages = Stages(torch.device("cpu"))
    for _ in range(2):
        with stages("value"):
            torch.randn(1000).sum()
    found = stages.seconds()
    assert set(found) == {"value"} and found["value"] > 0 and stages.seconds() == {}
