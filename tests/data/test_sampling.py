"""Who gets which sample: orders, ranks, tails."""

from __future__ import annotations

import pytest

from stitchvm.data.sampling import EpochSampler, EvaluationSampler, epoch_order


def test_epochs_and_seeds_have_their_own_permutations() -> None:
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 4
    assert tuple(epoch_order(50, 1, 1).tolist()) == orders[3]


def test_global_batches_do_not_depend_on_the_number_of_devices() -> None:
    def global_batches(world_size: int) -> list[list[int]]:
        per_rank = []
        for rank in range(world_size):
            sampler = EpochSampler(26, 12 // world_size, 3, rank, world_size)
            sampler.seek(2)
            per_rank.append(list(sampler))
        return [sorted(i for part in parts for i in part) for parts in zip(*per_rank, strict=True)]

    assert global_batches(1) == global_batches(2) == global_batches(3)
    assert [len(batch) for batch in global_batches(1)] == [12, 12]  # the tail of 2 is dropped


def test_seek_leaves_the_rest_of_the_epoch_and_its_length() -> None:
    sampler = EpochSampler(20, 4, seed=1)
    whole = list(sampler)
    sampler.seek(0, 3)
    assert list(sampler) == whole[3:] and len(sampler) == 5
    sampler.seek(0, 5)
    assert list(sampler) == []


def test_too_few_samples_for_a_global_batch() -> None:
    with pytest.raises(
        ValueError, match=r"7 samples, fewer than one global batch of 8 .*lower batch_size"
    ):
        EpochSampler(7, 4, world_size=2)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("num_samples", [3, 5, 16, 17, 25, 40])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_all_once_in_equally_many_steps(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    ranks = [
        list(EvaluationSampler(num_samples, batch_size, rank, world_size))
        for rank in range(world_size)
    ]
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(
        range(num_samples)
    )
    assert len({len(batches) for batches in ranks}) == 1
    assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)


def test_evaluation_repeats_only_where_a_device_would_stand_still() -> None:
    ranks = [list(EvaluationSampler(2, 4, rank, 3)) for rank in range(3)]
    assert ranks == [[[0]], [[1]], [[0]]]
    ranks = [list(EvaluationSampler(3, 1, rank, 2)) for rank in range(2)]
    assert ranks == [[[0], [2]], [[1], [1]]]
