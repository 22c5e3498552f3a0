"""The datasets of PRFL, and the order in which each kind of update walks them."""

from collections.abc import Iterator
from functools import partial

from datasets import Dataset

from ..configs.prfl import PRFLTrainingConfig
from ..data.collators import LatentBatch, collate_latents
from ..data.dataset import (
    RowDataset,
    as_latent_dataset,
    check_shared_memory,
    latent_shapes,
    require_latents,
    stream_batches,
)
from ..data.sampler import BucketBatchSampler


class PRFLDatasets:
    """
    Clips for the flow-matching updates, prompts for the reward updates, and held-out prompts to sample, if there are any.

    Args:
        config (`PRFLTrainingConfig`):
            Options of the run.
        clips (`Dataset`):
            A latent dataset.
        prompts, validation (`Dataset`, *optional*):
            Latent datasets of prompts, and of held-out prompts. Without `prompts` the clips' prompts are used.
        num_replicas, replica (`int`):
            Number of data-parallel replicas, and the one that this process belongs to.

    Raises:
        ValueError: If one is not a latent dataset, or has no latents where flow matching needs them.
    """

    def __init__(
        self,
        config: PRFLTrainingConfig,
        *,
        clips: Dataset,
        prompts: Dataset | None,
        validation: Dataset | None,
        num_replicas: int,
        replica: int,
    ) -> None:
        self.config = config
        self.clips = as_latent_dataset(clips, config.train_dataset)
        if config.update_schedule != "reward":
            require_latents(self.clips, config.train_dataset)
        self.prompts = self.clips if prompts is None else as_latent_dataset(prompts, str(config.prompt_dataset))
        self.validation = None
        if validation is not None:
            self.validation = as_latent_dataset(validation, str(config.validation_dataset))
        sampler = partial(
            BucketBatchSampler, batch_size=config.train_batch_size, num_replicas=num_replicas, replica=replica
        )
        # The two kinds of update must not walk the same rows in the same order.
        self.clip_sampler = partial(sampler, latent_shapes(self.clips), seed=2 * config.seed)
        self.prompt_sampler = partial(sampler, latent_shapes(self.prompts), seed=2 * config.seed + 1)
        for dataset, stream in ((self.clips, self.clip_sampler()), (self.prompts, self.prompt_sampler())):
            rows = RowDataset(dataset, range(len(dataset)))
            check_shared_memory(rows, collate_latents, stream, num_workers=config.dataloader_num_workers)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch on one replica, of prompts if there is no flow matching."""
        sampler = self.prompt_sampler if self.config.update_schedule == "reward" else self.clip_sampler
        return sampler().batches_per_epoch

    def by_source(self) -> dict[str, Dataset]:
        """Every dataset once, by the path it was opened from."""
        datasets = {self.config.train_dataset: self.clips}
        if self.config.prompt_dataset is not None:
            datasets[self.config.prompt_dataset] = self.prompts
        if self.config.validation_dataset is not None and self.validation is not None:
            datasets[self.config.validation_dataset] = self.validation
        return datasets

    def clip_batches(self, start: int) -> Iterator[LatentBatch]:
        """Endless batches of clips, from batch `start` on."""
        return self._stream(self.clips, self.clip_sampler(start=start))

    def prompt_batches(self, start: int) -> Iterator[LatentBatch]:
        """Endless batches of prompts, from batch `start` on."""
        return self._stream(self.prompts, self.prompt_sampler(start=start))

    def _stream(self, dataset: Dataset, sampler: BucketBatchSampler) -> Iterator[LatentBatch]:
        rows = RowDataset(dataset, range(len(dataset)))
        return stream_batches(rows, collate_latents, sampler, num_workers=self.config.dataloader_num_workers)
