"""Trainers of models and datasets that are given to them, as in a notebook."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from diffusers import WanTransformer3DModel

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer


@pytest.fixture
def rows(tmp_path: Path, write_latents: Callable[..., Path]) -> Dataset:
    return load_from_disk(write_latents(tmp_path / "rows", 8))


@pytest.fixture
def transformer(pipeline_dir: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")


@pytest.fixture
def reward_model(transformer: WanTransformer3DModel, tiny_vae: str) -> WanRewardModel:
    torch.manual_seed(3)
    return WanRewardModel.from_transformer(transformer, num_layers=2, vae_fingerprint=tiny_vae)


def options(tmp_path: Path, pipeline_dir: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / name), "pretrained_model_name_or_path": str(pipeline_dir), "max_train_steps": 2,
        "train_dataset": "rows of mine", "train_batch_size": 2, "learning_rate": 1e-3, "report_to": ["none"], **more,
    }  # fmt: skip


def test_prfl_is_the_run_of_the_same_files(
    tmp_path: Path, pipeline_dir: Path, rows: Dataset, transformer: WanTransformer3DModel, reward_model: WanRewardModel
) -> None:
    reward_model.save_pretrained(tmp_path / "reward")
    more = {"num_inference_steps": 4, "reward_model": str(tmp_path / "reward")}
    config = PRFLTrainingConfig(**options(tmp_path, pipeline_dir, "given", **more))
    given = PRFLTrainer(config, transformer=transformer, reward_model=reward_model, train_dataset=rows)
    assert given.unwrapped is transformer
    given.train()
    more["train_dataset"] = str(tmp_path / "rows")
    read = PRFLTrainer.from_config(PRFLTrainingConfig(**options(tmp_path, pipeline_dir, "read", **more)))
    read.train()
    for name, value in read.unwrapped.named_parameters():
        torch.testing.assert_close(value, transformer.get_parameter(name), rtol=0, atol=1e-5, msg=name)
    assert (tmp_path / "given" / "transformer").is_dir()


def test_a_reward_model_learns_from_rows_in_memory(
    tmp_path: Path, pipeline_dir: Path, rows: Dataset, reward_model: WanRewardModel
) -> None:
    parts = rows.train_test_split(0.25, seed=0)
    config = RewardTrainingConfig(**options(tmp_path, pipeline_dir, "out", validation_dataset="held out"))
    before = {name: value.clone() for name, value in reward_model.named_parameters()}
    trainer = RewardTrainer(
        config, reward_model=reward_model, train_dataset=parts["train"], validation_dataset=parts["test"]
    )
    trainer.train()
    moved = {
        name.partition(".")[0] for name, value in reward_model.named_parameters() if (value != before[name]).any()
    }
    assert moved == {"blocks", "pooler", "head"}
    assert len(trainer.datasets.rows) == 6
    assert (tmp_path / "out" / "best" / "metrics.json").is_file()


def test_a_trainer_is_complete_after_its_constructor(
    tmp_path: Path, pipeline_dir: Path, rows: Dataset, transformer: WanTransformer3DModel, reward_model: WanRewardModel
) -> None:
    config = RewardTrainingConfig(**options(tmp_path, pipeline_dir, "a"))
    trainers: list[Any] = [RewardTrainer(config, reward_model=reward_model, train_dataset=rows)]
    config_2 = PRFLTrainingConfig(**options(tmp_path, pipeline_dir, "b", num_inference_steps=4, reward_model="mine"))
    judge = WanRewardModel.from_transformer(transformer, num_layers=1)
    trainers.append(PRFLTrainer(config_2, transformer=transformer, reward_model=judge, train_dataset=rows))
    for trainer in trainers:
        names = set(vars(trainer))
        trainer.train()
        assert set(vars(trainer)) == names


def test_objects_that_do_not_fit_are_refused(
    tmp_path: Path, pipeline_dir: Path, rows: Dataset, transformer: WanTransformer3DModel, reward_model: WanRewardModel
) -> None:
    def build(**change: Any) -> PRFLTrainer:
        given: dict[str, Any] = {"transformer": transformer, "reward_model": reward_model, "train_dataset": rows}
        config = PRFLTrainingConfig(**options(tmp_path, pipeline_dir, "out", reward_model="mine"))
        return PRFLTrainer(config, **(given | change))

    with pytest.raises(ValueError, match="`prompt_dataset` must be a name for the dataset, got None"):
        build(prompt_dataset=rows)
    with pytest.raises(ValueError, match="`frozen_expert` must be left out, no chain needs it"):
        build(frozen_expert=transformer)
    with pytest.raises(ValueError, match=r"`transformer` must be one for each of \['high_noise'\]"):
        build(transformer={"low_noise": transformer})
    with pytest.raises(ValueError, match="rows of mine: the dataset has no rows"):
        build(train_dataset=rows.select([]))
    with pytest.raises(ValueError, match="rows of mine: .*lacks|rows of mine.*column"):
        build(train_dataset=rows.remove_columns("latents"))
    other = WanRewardModel.from_transformer(transformer, num_layers=1, vae_fingerprint="another")
    with pytest.raises(ValueError, match="rows of mine: of another VAE than"):
        build(reward_model=other)
    with pytest.raises(ValueError, match="`model` must be in torch.float32 where it is trained, got .*bfloat16 of"):
        build(transformer=transformer.to(torch.bfloat16))
