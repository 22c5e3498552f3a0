"""Batches of rows for training and evaluation, and their order, which depends only on seed and epoch."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class BucketBatchSampler(Sampler[list[int]]):
    """
    Endless stream of batches that can start at any batch. All rows of a batch have one shape.

    In an epoch the rows of each bucket are shuffled and cut into global batches of `batch_size * num_replicas` rows. The
    last one is filled up with rows from the bucket's start. Then the global batches of all buckets are shuffled. So every
    row is used in every epoch, and all replicas get the same shape at the same time, which collectives inside the model
    require. The order depends only on `(seed, epoch)`, so a resumed run needs only its position.

    With weights, an epoch has `round(w * n)` draws, at least one, from the `n` rows that a dataset of weight `w` has in a
    bucket. Each row is drawn `floor(w)` times. The remaining draws are different rows, chosen at random in each epoch.

    Args:
        buckets (`Sequence[Hashable]`):
            For each row its shape, or another key that is equal for rows that may share a batch.
        batch_size (`int`):
            Rows in a batch of one replica.
        seed (`int`):
            Seed of the order.
        num_replicas, replica (`int`, defaults to 1 and 0):
            Number of data-parallel replicas, and the index of the one that gets these batches.
        start (`int`, defaults to 0):
            Number of batches of the stream to skip.
        datasets (`Sequence[int]`, *optional*):
            Number of the dataset that each row is from, all from the first if left out.
        weights (`Sequence[float]`, *optional*):
            Weight of each dataset, greater than 0; 1 if left out.

    Raises:
        ValueError: If there are no rows.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        *,
        batch_size: int,
        seed: int,
        num_replicas: int = 1,
        replica: int = 0,
        start: int = 0,
        datasets: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not buckets:
            raise ValueError("There are no rows to sample from.")
        datasets = [0] * len(buckets) if datasets is None else datasets
        members: dict[Hashable, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, (bucket, dataset) in enumerate(zip(buckets, datasets, strict=True)):
            members[bucket][dataset].append(index)
        # Of each bucket, rows of each dataset and how many of them are drawn in an epoch.
        self.groups = [
            [
                (rows, len(rows) if weights is None else max(1, round(weights[dataset] * len(rows))))
                for dataset, rows in by_dataset.items()
            ]
            for by_dataset in members.values()
        ]
        self.buckets = [[row for rows, _ in groups for row in rows] for groups in self.groups]
        self.batch_size = batch_size
        self.global_batch_size = batch_size * num_replicas
        self.seed = seed
        self.replica = replica
        self.start = start

    @property
    def batches_per_epoch(self) -> int:
        """Batches that one replica gets in one epoch."""
        drawn = [sum(number for _, number in groups) for groups in self.groups]
        return sum(-(-number // self.global_batch_size) for number in drawn)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.batches_per_epoch)
        own = slice(self.replica * self.batch_size, (self.replica + 1) * self.batch_size)
        while True:
            for global_batch in self._epoch_order(epoch)[position:]:
                yield global_batch[own].tolist()
            epoch, position = epoch + 1, 0

    def _epoch_order(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        global_batches: list[np.ndarray] = []
        for groups in self.groups:
            order = rng.permutation([row for rows, number in groups for row in _draw(rows, number, rng)])
            num_batches = -(-len(order) // self.global_batch_size)
            filled = np.resize(order, num_batches * self.global_batch_size)
            global_batches.extend(filled.reshape(num_batches, self.global_batch_size))
        return [global_batches[index] for index in rng.permutation(len(global_batches))]


def _draw(rows: Sequence[int], number: int, rng: np.random.Generator) -> list[int]:
    """Draw `number` rows. Two rows differ by at most one in how often they are drawn."""
    times, rest = divmod(number, len(rows))
    # Draw random numbers only for a remainder: without weights, the order of an epoch must not change.
    chosen = rng.choice(rows, rest, replace=False).tolist() if rest else []
    return [*rows] * times + chosen


def shard_batches(buckets: Sequence[Hashable], *, batch_size: int, num_replicas: int, replica: int) -> list[list[int]]:
    """
    One replica's batches in a single ordered pass over all rows. All rows of a batch are of one bucket.

    Every replica gets the same number of batches of the same sizes, which forward passes under ZeRO-3 require. Batches
    are filled up with other rows of the bucket, so a row may appear more than once.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, bucket in enumerate(buckets):
        members[bucket].append(index)
    batches: list[list[int]] = []
    for rows in members.values():
        own_size = min(batch_size, -(-len(rows) // num_replicas))
        num_batches = -(-len(rows) // (own_size * num_replicas))
        filled = np.resize(rows, (num_batches, num_replicas, own_size))
        batches.extend(filled[:, replica].tolist())
    return batches
