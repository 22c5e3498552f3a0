"""The datasets that train the reward model: rows with a label, or pairs, and the order of their batches."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset

from ..configs.base import names_in
from ..configs.reward import RewardTrainingConfig
from ..data.collators import LabeledBatch, PreferenceBatch, collate_labeled, collate_preferences
from ..data.dataset import (
    RowDataset,
    as_latent_dataset,
    check_shared_memory,
    latent_shapes,
    pool_datasets,
    preference_pairs,
    require_latents,
    rows_with_label,
    short_names,
    stream_batches,
)
from ..data.sampler import BucketBatchSampler


logger = logging.getLogger(__name__)


class Items(NamedTuple):
    """
    The items of one or several datasets that are trained or evaluated on.

    Args:
        dataset (`Dataset`):
            The rows of all datasets.
        items (`list`):
            Rows with a label, or pairs of rows of one dataset.
        labels (`list[int]`, *optional*):
            Labels of the rows; None for pairs.
        datasets (`list[int]`):
            Number of the dataset of each item.
    """

    dataset: Dataset
    items: list[Any]
    labels: list[int] | None
    datasets: list[int]


class RewardDatasets:
    """
    Clips to train on, and held-out clips, if there are any.

    Args:
        config (`RewardTrainingConfig`):
            Options of the run.
        train, validation (`Sequence[Dataset]`):
            Latent datasets, in the order of the options. Without validation the second is empty.
        num_replicas, replica (`int`):
            Number of data-parallel replicas, and the one that this process belongs to.

    Raises:
        ValueError: If one has no latents, or no labels or pairs for the task, if several do not fit together (see
            [`~hy_prfl.data.dataset.pool_datasets`]), or if batches do not fit into shared memory.
    """

    def __init__(
        self,
        config: RewardTrainingConfig,
        train: Sequence[Dataset],
        validation: Sequence[Dataset],
        *,
        num_replicas: int,
        replica: int,
    ) -> None:
        self.config = config
        self.sources: dict[str, Dataset] = {}
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
            datasets=self.train.datasets,
            weights=config.train_dataset_weights,
        )
        self._log_shares()
        check_shared_memory(self.rows, self.collate, self.sampler(), num_workers=config.dataloader_num_workers)
        self.validation: Items | None = None
        if validation:
            sources = names_in(config.validation_dataset)
            self.validation = self._select(validation, sources)
            self._warn_of_shared_rows(sources)
            labels = self.validation.labels
            if labels is not None and len(set(labels)) < 2 and config.metric_for_best_model == "auc":
                raise ValueError(
                    f"`metric_for_best_model` is 'auc', but all labels of {', '.join(sources)} for '{config.task}' are "
                    f"{labels[0]}."
                )

    def _warn_of_shared_rows(self, sources: Sequence[str]) -> None:
        assert self.validation is not None
        trained, held_out = (set(each.dataset.unique("id")) for each in (self.train, self.validation))
        shared = sorted(trained & held_out)
        if shared:
            logger.warning(
                "%d rows of %s, such as '%s', have the id of a row that is trained on. If they are the same clips, the "
                "validation does not measure new ones.",
                len(shared),
                ", ".join(sources),
                shared[0],
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch on one replica."""
        return self.sampler().batches_per_epoch

    def by_source(self) -> dict[str, Dataset]:
        """Every dataset once, by the path it was opened from."""
        return self.sources

    def validation_parts(self) -> dict[str, list[int]]:
        """Items of each validation dataset, by a short name; none if there is only one."""
        sources = names_in(self.config.validation_dataset)
        if self.validation is None or len(sources) == 1:
            return {}
        return {
            name: [item for item, found in enumerate(self.validation.datasets) if found == number]
            for number, name in enumerate(short_names(sources))
        }

    def batches(self, start: int) -> Iterator[LabeledBatch | PreferenceBatch]:
        """Endless batches, from batch `start` on."""
        sampler = self.sampler(start=start)
        return stream_batches(self.rows, self.collate, sampler, num_workers=self.config.dataloader_num_workers)

    def _select(self, datasets: Sequence[Dataset], sources: Sequence[str]) -> Items:
        config = self.config
        opened = [as_latent_dataset(dataset, source) for dataset, source in zip(datasets, sources, strict=True)]
        self.sources |= dict(zip(sources, opened, strict=True))
        items, labels, numbers, first_row = [], [], [], 0
        for number, (dataset, source) in enumerate(zip(opened, sources, strict=True)):
            require_latents(dataset, source)
            found: list[Any]
            if config.loss == "bt":
                pairs = preference_pairs(
                    dataset, config.task, source, allow_unpaired=config.allow_unpaired, seed=config.seed
                )
                found = [(chosen + first_row, rejected + first_row) for chosen, rejected in pairs]
            else:
                rows, known = rows_with_label(dataset, config.task, source)
                found = [row + first_row for row in rows]
                labels += known
            items += found
            numbers += [number] * len(found)
            first_row += len(dataset)
        pooled = pool_datasets(opened, sources)
        return Items(pooled, items, None if config.loss == "bt" else labels, numbers)

    def _log_shares(self) -> None:
        """Log how many draws of an epoch come from each dataset, if there are several."""
        sources, sampler = self.config.train_dataset, self.sampler()
        if len(sources) == 1:
            return
        drawn = dict.fromkeys(range(len(sources)), 0)
        for groups in sampler.groups:
            for rows, number in groups:
                drawn[self.train.datasets[rows[0]]] += number
        total = sum(drawn.values())
        for number, source in enumerate(sources):
            logger.info("%s: %d of the %d draws of an epoch.", source, drawn[number], total)
