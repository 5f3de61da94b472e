"""Stage 1: the streamed normal equations against torch.linalg.lstsq, and the choice of a planted cell."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stitchvm.rewards.base import Embedding
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.search import NormalEquations, SearchResult, search
from tests.values.fakes import FakeReward


def lstsq(x, y):
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    return torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution


@pytest.mark.parametrize("offset, spread", [(0.0, 1.0), (100.0, 1e-2), (1.0, 1e3)])
def test_streamed_solution_equals_lstsq(offset, spread):
    torch.manual_seed(0)
    mixing = torch.randn(12, 12, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -2.5, 12).double()
    )
    x = torch.randn(3000, 12, dtype=torch.float64) @ mixing * spread + offset
    y = torch.cat([x @ torch.randn(12, 5).double(), torch.randn(3000, 3).double()], 1)
    y = y + 0.1 * torch.randn_like(y)
    equations = NormalEquations(x[:100].mean(0), y[:100].mean(0))
    for start in range(0, 3000, 700):
        equations.update(x[start : start + 700], y[start : start + 700])
    W, b = equations.solve()
    truth = lstsq(x, y)
    assert torch.linalg.norm(W.T - truth[:-1]) <= 1e-6 * torch.linalg.norm(truth[:-1])
    assert torch.linalg.norm(b - truth[-1]) <= 1e-6 * max(1.0, torch.linalg.norm(truth[-1]))
    error = (x @ W.T + b - y).square().sum()
    assert equations.squared_error(W, b) == pytest.approx(float(error), rel=1e-6)
    assert equations.variance() == pytest.approx(float((y - y.mean(0)).square().sum()), rel=1e-9)


def test_columns_are_separate_problems():
    torch.manual_seed(1)
    x, y = torch.randn(500, 4), torch.randn(500, 6)
    equations = NormalEquations(torch.zeros(4), torch.zeros(6))
    equations.update(x, y)
    W, b = equations.solve()
    part, c = equations.solve(slice(2, 5))
    assert torch.allclose(W[2:5], part, atol=1e-12) and torch.allclose(b[2:5], c, atol=1e-12)


def test_constant_and_repeated_features_do_not_break_the_solution():
    torch.manual_seed(2)
    x = torch.randn(400, 3, dtype=torch.float64)
    x = torch.cat([x, x[:, :1], torch.full((400, 1), 2.5).double()], 1)
    y = x[:, :3] @ torch.randn(3, 2).double() + 1
    equations = NormalEquations(x.mean(0), y.mean(0))
    equations.update(x, y)
    W, b = equations.solve()
    assert torch.isfinite(W).all()
    assert torch.allclose(x @ W.T + b, y, atol=1e-6)


class PlantedBackbone(nn.Module):
    """Features at depth 2 are a linear image of the latent; the others lose information."""

    id, num_blocks, loaded_blocks, latent_channels = "planted", 3, 3, 4

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.maps = [torch.randn(6, 4, generator=generator) for _ in range(4)]

    def features(self, z_t, t, depths):
        def feature(i):
            z = z_t if i == 2 else z_t * torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 4, 1, 1)
            return torch.einsum("dc,bchw->bdhw", self.maps[i], z)

        return {i: feature(i) for i in depths}


class PlantedReward(nn.Module):
    """Block 1 takes a linear image of the pixels that a perfect stitch can restore, block 2 a square of it."""

    id, num_blocks, grid, width, embed_dim = "planted", 2, (4, 4), 5, 5

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))

    def probe(self, pixels, js):
        h = torch.einsum("dc,bchw->bdhw", self.weight, pixels)
        patches = {j: h if j == 1 else h**2 for j in js}
        cls = {j: patches[j].mean((2, 3)) for j in js}
        return SimpleNamespace(patches=patches, class_token=cls, image=(h**2).mean((2, 3)))

    def tail(self, j):
        def run(h):
            h = h if j == 2 else h**2
            return Embedding(h.flatten(2).transpose(1, 2), h.mean((2, 3)))

        run.init_class_token = lambda mean: None
        return run


def planted(**kwargs):
    torch.manual_seed(3)
    images = torch.rand(60, 4, 4, 4)
    # encode = identity; at t = 0 the latents are clean, so that the planted cell is exact
    settings = {"js": (1, 2), "num_probes": 40, "num_held_out": 20, "num_end_probes": 8} | kwargs
    return search(images.split(16), lambda x: x, PlantedBackbone(), PlantedReward(), **settings)


def test_planted_cell_is_chosen_by_both_criteria(monkeypatch):
    monkeypatch.setattr(
        "stitchvm.search.keyed_uniform", lambda keys, n, device: torch.zeros(len(keys), n)
    )
    result = planted()
    assert [(r["i"], r["j"]) for r in result.records] == [
        (i, j) for i in (1, 2, 3) for j in (1, 2)
    ]
    assert result.best("feature") == result.best("embedding") == (2, 1)
    best = next(r for r in result.records if (r["i"], r["j"]) == (2, 1))
    assert (
        best["feature_loss"] < 1e-10
        and best["embedding_error"] < 1e-8
        and best["unexplained"] < 1e-9
    )
    W, _ = result.closed_form(2, 1)
    backbone, reward = PlantedBackbone(), PlantedReward()
    assert torch.allclose(W.float() @ backbone.maps[2], reward.weight, atol=1e-4)
    assert result.class_tokens[1].shape == (5,)


def test_the_depths_with_the_lowest_loss_go_through_the_tails():
    every, some = planted(num_end_depths=None), planted(num_end_depths=2)
    by_loss = sorted(every.records, key=lambda r: r["fit_loss"])
    lowest = [r for j in (1, 2) for r in [r for r in by_loss if r["j"] == j][:2]]
    for whole, part in zip(every.records, some.records, strict=True):
        end = whole["embedding_error"] if whole in lowest else None
        assert part == whole | {"embedding_error": end}
    assert some.best("embedding") in [(r["i"], r["j"]) for r in lowest]
    with pytest.raises(ValueError, match="num_end_depths"):
        planted(num_end_depths=0)


def test_batch_size_does_not_change_the_result():
    torch.manual_seed(3)
    images = torch.rand(60, 4, 4, 4)
    settings = {"js": (1,), "num_probes": 40, "num_held_out": 20, "num_end_probes": 8}
    settings["num_end_depths"] = None
    results = [
        search(images.split(size), lambda x: x, PlantedBackbone(), PlantedReward(), **settings)
        for size in (60, 7)
    ]
    for one, two in zip(*(r.records for r in results), strict=True):
        assert one == pytest.approx(two, rel=1e-6)


def test_a_sum_of_rewards_says_that_it_cannot_be_cut():
    reward = WeightedReward({"a": FakeReward(), "b": FakeReward()})
    with pytest.raises(ValueError, match=r"is a sum of rewards and cannot be cut and stitched"):
        search([], lambda x: x, PlantedBackbone(), reward)


def test_too_few_images_and_wrong_cells_are_errors():
    with pytest.raises(ValueError, match=r"needs 80 probe images .* gave 60"):
        planted(num_probes=60)
    with pytest.raises(ValueError, match=r"js \[3\]"):
        planted(js=(1, 3))
    with pytest.raises(ValueError, match="depths"):
        planted(depths=[4])
    with pytest.raises(ValueError, match="num_end_probes"):
        planted(num_end_probes=0).best("embedding")
    with pytest.raises(ValueError, match="criterion"):
        SearchResult([], {}, {}, {}, {}).best("loss")
