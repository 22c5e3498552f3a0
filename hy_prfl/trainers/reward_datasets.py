"""The datasets of the reward model's training: rows with a label, or pairs, and the order in which they are walked."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset

from ..configs.reward import RewardTrainingConfig
from ..data.collators import LabeledBatch, PreferenceBatch, collate_labeled, collate_preferences
from ..data.dataset import (
    RowDataset,
    as_latent_dataset,
    check_shared_memory,
    latent_shapes,
    preference_pairs,
    require_latents,
    rows_with_label,
    stream_batches,
)
from ..data.sampler import BucketBatchSampler


class Items(NamedTuple):
    """
    What of a dataset is trained or evaluated on.

    Args:
        dataset (`Dataset`):
            The rows.
        items (`list`):
            Rows with a label, or pairs of rows.
        labels (`list[int]`, *optional*):
            Labels of the rows; None for pairs.
    """

    dataset: Dataset
    items: list[Any]
    labels: list[int] | None


class RewardDatasets:
    """
    Clips to train on, and held-out clips, if there are any.

    Args:
        config (`RewardTrainingConfig`):
            Options of the run.
        train, validation (`Dataset`):
            Latent datasets.
        num_replicas, replica (`int`):
            Number of data-parallel replicas, and the one that this process belongs to.

    Raises:
        ValueError: If one has no latents, or no labels or pairs for the task, or its batches do not fit into shared
            memory.
    """

    def __init__(
        self,
        config: RewardTrainingConfig,
        train: Dataset,
        validation: Dataset | None,
        *,
        num_replicas: int,
        replica: int,
    ) -> None:
        self.config = config
        self.train = self._select(train, config.train_dataset)
        self.rows = RowDataset(self.train.dataset, self.train.items)
        self.collate: Callable[[list[Any]], LabeledBatch | PreferenceBatch] = collate_preferences
        if config.loss == "bce":
            self.collate = partial(collate_labeled, task=config.task)
        shapes = latent_shapes(self.train.dataset)
        self.sampler = partial(
            BucketBatchSampler,
            [shapes[item[0] if isinstance(item, tuple) else item] for item in self.train.items],
            batch_size=config.train_batch_size,
            seed=config.seed,
            num_replicas=num_replicas,
            replica=replica,
        )
        check_shared_memory(self.rows, self.collate, self.sampler(), num_workers=config.dataloader_num_workers)
        self.validation: Items | None = None
        if validation is not None:
            self.validation = self._select(validation, str(config.validation_dataset))
            labels = self.validation.labels
            if labels is not None and len(set(labels)) < 2 and config.metric_for_best_model == "auc":
                raise ValueError(
                    f"`metric_for_best_model` is 'auc', but all labels of {config.validation_dataset} for "
                    f"'{config.task}' are {labels[0]}."
                )

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch on one replica."""
        return self.sampler().batches_per_epoch

    def by_source(self) -> dict[str, Dataset]:
        """Every dataset once, by the path it was opened from."""
        datasets = {self.config.train_dataset: self.train.dataset}
        if self.validation is not None:
            datasets[str(self.config.validation_dataset)] = self.validation.dataset
        return datasets

    def batches(self, start: int) -> Iterator[LabeledBatch | PreferenceBatch]:
        """Endless batches, from batch `start` on."""
        sampler = self.sampler(start=start)
        return stream_batches(self.rows, self.collate, sampler, num_workers=self.config.dataloader_num_workers)

    def _select(self, dataset: Dataset, source: str) -> Items:
        config = self.config
        dataset = as_latent_dataset(dataset, source)
        require_latents(dataset, source)
        if config.loss == "bt":
            pairs = preference_pairs(
                dataset, config.task, source, allow_unpaired=config.allow_unpaired, seed=config.seed
            )
            return Items(dataset, pairs, None)
        return Items(dataset, *rows_with_label(dataset, config.task, source))
