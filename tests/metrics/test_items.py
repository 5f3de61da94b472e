"""The mean over items: repeated items count once, errors are clear."""

from __future__ import annotations

import pytest
import torch

from stitchvm.metrics.items import ItemMean


def test_repeated_items_count_once_and_the_error_is_the_usual_one() -> None:
    metric = ItemMean()
    metric.update(torch.tensor([1.0, 3.0]), torch.tensor([4, 2]))
    metric.update(torch.tensor([3.0, 8.0]), torch.tensor([2, 9]))
    estimate = metric.compute()
    values = torch.tensor([1.0, 3.0, 8.0]).double()
    assert estimate.value == pytest.approx(4.0) and estimate.n == 3
    assert float(estimate.stderr) == pytest.approx(float(values.std() / 3**0.5))
    assert metric.items()[0].tolist() == [2, 4, 9]


def test_errors() -> None:
    with pytest.raises(ValueError, match="one length"):
        ItemMean().update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"items \[7\] are not finite"):
        ItemMean().update(torch.tensor([0.0, torch.nan]), torch.tensor([3, 7]))
