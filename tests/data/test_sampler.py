from collections import Counter
from itertools import islice

import pytest

from hy_prfl.data.sampler import BucketBatchSampler, shard_batches


BUCKETS = ["small"] * 7 + ["large"] * 4


def take(count: int, **options: int) -> list[list[int]]:
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
