"""The images of an update: groups on one device, and random numbers that belong to prompts."""

from __future__ import annotations

import torch

from stitchvm.modules.rows import Rows

CPU = torch.device("cpu")


def test_rows_are_groups_on_one_device_with_random_numbers_of_their_own():
    batch = {"index": torch.tensor([7, 3]), "prompt": ["a", "b"]}
    rows = Rows.of(batch, 3, seed=1, update=4, device=CPU)
    assert rows.index == (7, 7, 7, 3, 3, 3) and rows.number == (0, 1, 2) * 2
    assert rows.prompts == ("a",) * 3 + ("b",) * 3
    z = rows.normal("z_1", (2, 2))
    assert z.shape == (6, 2, 2) and len({float(x[0, 0]) for x in z}) == 6
    parts = list(rows.split(4))
    assert [part.positions.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(torch.cat([part.normal("z_1", (2, 2)) for part in parts]), z)
    alone = Rows.of({"index": torch.tensor([3]), "prompt": ["b"]}, 3, 1, 4, CPU)  # another device
    assert torch.equal(alone.normal("z_1", (2, 2)), z[3:])
    others = [
        rows.normal("eps", (2, 2)),
        rows.normal("z_1", (2, 2), 1),
        Rows.of(batch, 3, 1, 5, CPU).normal("z_1", (2, 2)),
        Rows.of(batch, 3, 2, 4, CPU).normal("z_1", (2, 2)),
    ]
    assert not any(torch.equal(z, other) for other in others)
    assert torch.equal(rows.groups, torch.tensor([7, 7, 7, 3, 3, 3]))
