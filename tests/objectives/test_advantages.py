"""Advantages against numbers worked out by hand and NumPy, and their invariances."""

import hashlib
import math

import numpy as np
import pytest
import torch

from stitchvm.objectives.advantages import combine_rewards, group_advantages, group_keys

REWARDS = torch.tensor([1.0, 3.0, 10.0, 14.0, 7.0])
GROUPS = torch.tensor([4, 4, 9, 9, 1])


def test_by_hand():
    # means 2, 12, 7; deviations −1, 1, −2, 2, 0; all: mean 7, squares 36 + 16 + 9 + 49 + 0 = 110
    found = group_advantages(REWARDS, GROUPS, std="global", eps=1e-4)
    scale = math.sqrt(22) + 1e-4
    assert found.values.tolist() == pytest.approx([x / scale for x in (-1, 1, -2, 2, 0)])
    found = group_advantages(REWARDS, GROUPS, std="group", eps=1e-4)
    assert found.values.tolist() == pytest.approx(
        [-1 / 1.0001, 1 / 1.0001, -2 / 2.0001, 2 / 2.0001, 0]
    )
    found = group_advantages(REWARDS, GROUPS, std="group", eps=0.0, ddof=1)
    assert found.values.tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)] * 2 + [0])
    assert found.stats["group_std"] == pytest.approx((math.sqrt(2) + math.sqrt(8) + 0) / 3)


def test_statistics():
    rewards = torch.tensor([1.0, 3.0, 0.1, 0.1, 0.1, 5.0])
    stats = group_advantages(rewards, torch.tensor([0, 0, 1, 1, 1, 2]), std="group", eps=0.0).stats
    assert stats["reward_mean"] == pytest.approx(9.3 / 6)
    assert stats["reward_std"] == pytest.approx(float(np.std(rewards.double().numpy())))
    assert stats["group_std"] == pytest.approx(1 / 3)
    assert stats["zero_spread"] == pytest.approx(2 / 3)
    assert (stats["groups"], stats["group_size_min"], stats["group_size_max"]) == (3, 1, 3)
    assert stats["advantage_std"] == pytest.approx(math.sqrt(2 / 6))


@pytest.mark.parametrize("std", ["global", "group"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_against_numpy(std, ddof):
    rewards, groups = torch.randn(96), torch.arange(96) % 4
    values = group_advantages(rewards, groups, std=std, ddof=ddof).values
    r, g = rewards.double().numpy(), groups.numpy()
    for group in range(4):
        mine = r[g == group]
        scale = np.std(r if std == "global" else mine, ddof=ddof) + 1e-4
        expected = (mine - mine.mean()) / scale
        assert values[groups == group].numpy() == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert abs(values[groups == group].double().sum().item()) < 1e-5


def test_order_and_sharding_do_not_change_a_bit():
    rewards, groups = torch.randn(120) * 3, torch.randint(0, 7, (120,))
    for std in ("global", "group"):
        whole = group_advantages(rewards, groups, std=std)
        for _ in range(5):
            order = torch.randperm(120)
            shuffled = group_advantages(rewards[order], groups[order], std=std)
            assert torch.equal(shuffled.values, whole.values[order])
            assert shuffled.stats == whole.stats
        # the ranks' shares, gathered in the order of the ranks
        shares = [torch.arange(rank, 120, 4) for rank in range(4)]
        gathered = torch.cat(shares)
        found = group_advantages(rewards[gathered], groups[gathered], std=std).values
        assert torch.equal(found[:30], whole.values[shares[0]])


def test_scale_and_offset_of_the_reward_do_not_matter():
    rewards, groups = torch.randn(48, dtype=torch.float64), torch.arange(48) // 8
    for std in ("global", "group"):
        plain = group_advantages(rewards, groups, std=std).values
        moved = group_advantages(7 * rewards + 3, groups, std=std).values
        # ε = 1e-4 is the only thing that has a scale
        assert torch.allclose(moved, plain, rtol=2e-4, atol=1e-6)
        exact = [
            group_advantages(x, groups, std=std, eps=0.0).values
            for x in (rewards, 7 * rewards + 3)
        ]
        assert torch.allclose(*exact, rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-3])
def test_equal_rewards_have_no_advantage(value):
    # the mean of 24 equal numbers is not that number in floating point
    rewards = torch.full((24,), value, dtype=torch.float64)
    assert rewards.cumsum(0)[-1] / 24 != value
    for std in ("global", "group"):
        for eps in (0.0, 1e-4):
            found = group_advantages(rewards, torch.zeros(24, dtype=torch.int64), std=std, eps=eps)
            assert found.values.tolist() == [0.0] * 24
            assert found.stats["zero_spread"] == 1.0


def test_global_spread_contains_the_prompts():
    # prompts three times as far apart as their images: advantages shrink to 1/sqrt(10)
    rewards = torch.tensor([-1.0, 1.0] * 2) + torch.tensor([-3.0, -3.0, 3.0, 3.0])
    found = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), std="global", eps=0.0)
    assert found.values.tolist() == pytest.approx([-1 / math.sqrt(10), 1 / math.sqrt(10)] * 2)


def test_weighted_sum_is_pinned_and_z_scores_forget_the_scale():
    rewards = {"a": torch.tensor([1.0, 2.0, 3.0, 6.0]), "b": torch.tensor([0.5, 0.0, 1.0, 0.5])}
    weights = {"a": 1.0, "b": 2.0}
    assert combine_rewards(rewards, weights).tolist() == [2.0, 2.0, 5.0, 7.0]
    # a: mean 3, variance (4 + 1 + 0 + 9)/4 = 3.5; b: mean .5, variance (0 + .25 + .25 + 0)/4 = .125
    total = combine_rewards(rewards, weights, normalise="global")
    a = [x / math.sqrt(3.5) for x in (-2, -1, 0, 3)]
    b = [x / math.sqrt(0.125) for x in (0, -0.5, 0.5, 0)]
    assert total.tolist() == pytest.approx([x + 2 * y for x, y in zip(a, b, strict=True)])
    groups = torch.tensor([0, 0, 1, 1])
    total = combine_rewards(rewards, weights, normalise="group", groups=groups)
    assert total.tolist() == pytest.approx([-1 + 2, 1 - 2, -1 + 2, 1 - 2])

    larger = rewards | {"a": 1000 * rewards["a"] - 5}
    for normalise, same in (("none", False), ("global", True), ("group", True)):
        pair = [
            group_advantages(
                combine_rewards(x, weights, normalise=normalise, groups=groups), groups
            ).values
            for x in (rewards, larger)
        ]
        assert torch.allclose(*pair, atol=1e-6) == same


def test_a_constant_reward_adds_nothing_to_z_scores():
    rewards = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.3, 0.3])}
    total = combine_rewards(rewards, {"a": 1.0, "b": 9.0}, normalise="global")
    assert total.tolist() == pytest.approx([-1, 1])


def test_keys_of_prompts():
    keys = group_keys(["a red circle", "a blue square", "a red circle", "A red circle"])
    assert keys.dtype == torch.int64 and keys[0] == keys[2]
    assert len(set(keys.tolist())) == 3 and (keys >= 0).all()
    # a hash that does not change from process to process
    digest = hashlib.blake2b(b"", digest_size=8).digest()
    assert group_keys([""]).item() == int.from_bytes(digest, "little") // 2
    assert group_keys([]).dtype == torch.int64


def test_bad_input():
    with pytest.raises(ValueError, match="not finite for 1 of 2 samples"):
        group_advantages(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="expected one integer per reward"):
        group_advantages(torch.ones(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected one integer per reward"):
        group_advantages(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"expected \(N,\)"):
        group_advantages(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match='expected "global" or "group"'):
        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.int64), std="batch")
    with pytest.raises(ValueError, match="ddof 0 or 1"):
        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.int64), ddof=2)
    with pytest.raises(ValueError, match="give every reward a weight"):
        combine_rewards({"a": torch.ones(2)}, {"b": 1.0})
    with pytest.raises(ValueError, match="the last with `groups`"):
        combine_rewards({"a": torch.ones(2)}, {"a": 1.0}, normalise="group")
    with pytest.raises(ValueError, match="expected one shape"):
        combine_rewards({"a": torch.ones(2), "b": torch.ones(3)}, {"a": 1.0, "b": 1.0})
