from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.data.collators import LatentBatch
from hy_prfl.trainers.prfl_datasets import PRFLDatasets
from hy_prfl.trainers.prfl_inputs import open_datasets as open_rows


@pytest.fixture
def open_datasets(tmp_path: Path, write_latents: Callable[..., Path]) -> Callable[..., PRFLDatasets]:
    """Function that opens 8 clips as the first of two replicas does, or as `replica` says, with options on top."""
    write_latents(tmp_path / "train", 8)

    def opener(replica: int = 0, **options: Any) -> PRFLDatasets:
        defaults: dict[str, Any] = {
            "output_dir": "-",
            "pretrained_model_name_or_path": "-",
            "reward_model": "-",
            "train_dataset": str(tmp_path / "train"),
            "train_batch_size": 2,
        }
        config = PRFLTrainingConfig(**(defaults | options))
        given = {option.removesuffix("_dataset"): rows for option, rows in open_rows(config).items()}
        clips = given.pop("train")
        parts = {"prompts": given.get("prompt"), "validation": given.get("validation")}
        return PRFLDatasets(config, clips=clips, **parts, num_replicas=2, replica=replica)

    return opener


def ids(batches: Iterator[LatentBatch], count: int) -> list[str]:
    return [row_id for batch in islice(batches, count) for row_id in batch.ids]


def test_the_two_kinds_of_update_walk_the_rows_each_in_an_order_of_its_own(
    open_datasets: Callable[..., PRFLDatasets],
) -> None:
    replicas = [open_datasets(replica) for replica in (0, 1)]
    assert replicas[0].batches_per_epoch == 2
    clips, prompts = (
        [ids(batches(each, 0), 2) for each in replicas]
        for batches in (PRFLDatasets.clip_batches, PRFLDatasets.prompt_batches)
    )
    for epoch in (clips, prompts):
        assert sorted(epoch[0] + epoch[1]) == [f"clip-{index}" for index in range(8)]
    assert clips != prompts


def test_a_stream_goes_on_from_any_batch(open_datasets: Callable[..., PRFLDatasets]) -> None:
    datasets = open_datasets()
    for batches in (datasets.clip_batches, datasets.prompt_batches):
        assert ids(batches(3), 4) == ids(batches(0), 7)[6:]


def test_prompts_and_held_out_prompts_of_their_own(
    open_datasets: Callable[..., PRFLDatasets], tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    write_latents(tmp_path / "prompts", 12, prompts_only=True)
    write_latents(tmp_path / "held_out", 4, prompts_only=True)
    train, prompts, held_out = (str(tmp_path / name) for name in ("train", "prompts", "held_out"))
    assert list(open_datasets().by_source()) == [train]
    datasets = open_datasets(prompt_dataset=prompts, validation_dataset=held_out)
    assert {source: len(dataset) for source, dataset in datasets.by_source().items()} == {
        train: 8,
        prompts: 12,
        held_out: 4,
    }
    assert datasets.validation is not None
    assert datasets.batches_per_epoch == 2
    only_rewards = open_datasets(prompt_dataset=prompts, update_schedule="reward")
    assert only_rewards.batches_per_epoch == 3
    assert len(set(ids(only_rewards.prompt_batches(0), 3))) == 6


def test_flow_matching_needs_latents(
    open_datasets: Callable[..., PRFLDatasets], tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    path = str(write_latents(tmp_path / "prompts", 4, prompts_only=True))
    assert len(open_datasets(train_dataset=path, update_schedule="reward").clips) == 4
    with pytest.raises(ValueError, match="4 of 4 rows have no latents"):
        open_datasets(train_dataset=path)
