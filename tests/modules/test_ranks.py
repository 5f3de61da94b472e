"""Leaving the process group; what several processes tell each other is tested where they run."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from stitchvm.modules.ranks import leave, world_size


def test_leave_ends_the_process_group_once(tmp_path: Path) -> None:
    leave()  # there is none
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    leave()
    assert not dist.is_initialized() and world_size() == 1
    leave()
