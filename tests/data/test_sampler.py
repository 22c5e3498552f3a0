from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest

from hy_prfl.data.sampler import BucketBatchSampler, shard_batches


BUCKETS = ["small"] * 7 + ["large"] * 4


def take(count: int, **options: Any) -> list[list[int]]:
    options = {"batch_size": 2, "seed": 0} | options
    return list(islice(BucketBatchSampler(BUCKETS, **options), count))


def test_batches_hold_rows_of_one_shape_and_epochs_hold_every_row() -> None:
    epoch = BucketBatchSampler(BUCKETS, batch_size=2, seed=0).batches_per_epoch
    assert epoch == 4 + 2
    for batch in take(3 * epoch):
        assert len({BUCKETS[index] for index in batch}) == 1
    for start in range(3):
        seen = Counter(index for batch in take(epoch, start=start * epoch) for index in batch)
        assert set(seen) == set(range(11))
        assert sum(seen.values()) == 12  # one row fills up the last batch of the seven


def test_order_changes_with_epoch_and_seed_and_with_nothing_else() -> None:
    assert take(6) == take(6)
    assert take(6) != take(6, start=6)
    assert take(6) != take(6, seed=1)


@pytest.mark.parametrize("start", [1, 5, 6, 17])
def test_starting_in_the_middle_continues_the_same_stream(start: int) -> None:
    assert take(20, start=start) == take(20 + start)[start:]


def test_replicas_share_a_global_batch_and_its_shape() -> None:
    replicas = [take(12, num_replicas=2, replica=replica) for replica in range(2)]
    together = take(12, batch_size=4)
    for first, second, whole in zip(*replicas, together, strict=True):
        assert first + second == whole
        assert {BUCKETS[index] for index in first} == {BUCKETS[index] for index in second}


def test_a_bucket_smaller_than_a_batch_is_filled_from_itself() -> None:
    sampler = BucketBatchSampler(["a", "b", "b"], batch_size=4, seed=0)
    batches = list(islice(sampler, 2))
    assert sorted(map(sorted, batches)) in ([[0, 0, 0, 0], [1, 1, 2, 2]],)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        BucketBatchSampler([], batch_size=1, seed=0)


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_shares_cover_every_row_with_the_same_forwards_on_every_replica(num_replicas: int, batch_size: int) -> None:
    shares = [
        shard_batches(BUCKETS, batch_size=batch_size, num_replicas=num_replicas, replica=replica)
        for replica in range(num_replicas)
    ]
    assert {index for share in shares for batch in share for index in batch} == set(range(11))
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1
    for together in zip(*shares, strict=True):
        assert len({BUCKETS[index] for batch in together for index in batch}) == 1
    if num_replicas == 1 and batch_size == 1:
        assert shares == [[[index] for index in range(11)]]


def unweighted_epoch(seed: int, epoch: int, global_batch_size: int) -> list[list[int]]:
    """The order without weights, written out: a shuffle of each bucket, then one of all batches."""
    rng = np.random.default_rng([seed, epoch])
    batches = []
    for name in ("small", "large"):
        order = rng.permutation([index for index, bucket in enumerate(BUCKETS) if bucket == name]).tolist()
        order = (2 * order)[: -(-len(order) // global_batch_size) * global_batch_size]
        batches += [order[start : start + global_batch_size] for start in range(0, len(order), global_batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


@pytest.mark.parametrize("options", [{}, {"weights": [1.0]}, {"datasets": [0] * 4 + [1] * 7, "weights": [1.0, 1.0]}])
def test_weights_of_one_change_nothing(options: dict[str, Any]) -> None:
    expected = unweighted_epoch(3, 0, 4) + unweighted_epoch(3, 1, 4)
    assert take(len(expected), batch_size=4, seed=3, **options) == expected


DATASETS = [0] * 6 + [1] * 5


@pytest.mark.parametrize(("weights", "draws"), [([1.0, 3.0], [6, 15]), ([0.5, 2.0], [3, 10]), ([0.01, 1.0], [1, 5])])
def test_a_weight_is_how_often_a_row_is_drawn_in_an_epoch(weights: list[float], draws: list[int]) -> None:
    sampler = BucketBatchSampler(["a"] * 11, batch_size=1, seed=0, datasets=DATASETS, weights=weights)
    assert sampler.batches_per_epoch == sum(draws)
    stream = iter(sampler)
    seen: Counter[int] = Counter()
    for _ in range(40):
        epoch = Counter(row for (row,) in islice(stream, sampler.batches_per_epoch))
        assert [sum(epoch[row] for row in range(11) if DATASETS[row] == each) for each in (0, 1)] == draws
        for row, number in epoch.items():
            assert int(weights[DATASETS[row]]) <= number <= int(weights[DATASETS[row]]) + 1
        seen += epoch
    # Over many epochs no row is left out, also with a weight below 1.
    assert set(seen) == set(range(11))


def test_a_weight_that_is_no_whole_number_draws_some_rows_once_more() -> None:
    sampler = BucketBatchSampler(["a"] * 4, batch_size=1, seed=0, weights=[1.5])
    epochs = [Counter(row for (row,) in islice(sampler, start, start + 6)) for start in range(0, 60, 6)]
    assert all(sorted(epoch.values()) == [1, 1, 2, 2] for epoch in epochs)
    assert len({tuple(sorted(row for row in epoch if epoch[row] == 2)) for epoch in epochs}) > 1


@pytest.mark.parametrize("start", [1, 7, 30])
def test_a_weighted_stream_resumes_and_is_shared_by_replicas(start: int) -> None:
    options: dict[str, Any] = {"datasets": DATASETS, "weights": [0.5, 2.5]}
    assert take(20, start=start, **options) == take(20 + start, **options)[start:]
    replicas = [take(12, num_replicas=2, replica=replica, **options) for replica in range(2)]
    assert [first + second for first, second in zip(*replicas, strict=True)] == take(12, batch_size=4, **options)


def test_every_bucket_keeps_a_row_of_each_dataset() -> None:
    sampler = BucketBatchSampler(["a", "a", "b"], batch_size=1, seed=0, datasets=[0, 0, 0], weights=[0.1])
    assert sorted(islice(sampler, 2)) in ([[0], [2]], [[1], [2]])
