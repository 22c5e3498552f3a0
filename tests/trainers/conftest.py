"""Trainers on few rows, ready in a second, and runs that are interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.trainers.base import Trainer
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer


@pytest.fixture
def prfl_builder(
    tmp_path: Path, write_latents: Callable[..., Path], tiny_vae: str
) -> Callable[..., Callable[..., PRFLTrainer]]:
    """
    Function `prfl_builder(pipeline_dir, subfolder)` that writes 8 rows and an untrained reward model made of this
    transformer, and returns a function that builds a trainer of the pipeline, with options on top of quick ones.
    """

    def prepare(pipeline_dir: Path, subfolder: str = "transformer") -> Callable[..., PRFLTrainer]:
        write_latents(tmp_path / "train", 8)
        transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder=subfolder)
        torch.manual_seed(0)
        model = WanRewardModel.from_transformer(transformer, num_layers=2, vae_fingerprint=tiny_vae)
        model.save_pretrained(tmp_path / "reward")

        def build(**options: Any) -> PRFLTrainer:
            defaults: dict[str, Any] = {
                "output_dir": str(tmp_path / "out"),
                "pretrained_model_name_or_path": str(pipeline_dir),
                "reward_model": str(tmp_path / "reward"),
                "train_dataset": str(tmp_path / "train"),
                "train_batch_size": 2,
                "max_train_steps": 2,
                "num_inference_steps": 4,
                "learning_rate": 1e-3,
                "report_to": ["none"],
                "write_report": False,
            }
            return PRFLTrainer.from_config(PRFLTrainingConfig(**(defaults | options)))

        return build

    return prepare


@pytest.fixture
def reward_builder(tmp_path: Path, pipeline_dir: Path) -> Callable[..., RewardTrainer]:
    """Function that builds a trainer of a reward model on `train`, with options on top of quick ones."""

    def build(**options: Any) -> RewardTrainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "pretrained_model_name_or_path": str(pipeline_dir),
            "train_dataset": str(tmp_path / "train"),
            "num_layers": 2,
            "train_batch_size": 4,
            "max_train_steps": 2,
            "learning_rate": 1e-3,
            "head_learning_rate": 1e-3,
            "report_to": ["none"],
            "write_report": False,
        }
        return RewardTrainer.from_config(RewardTrainingConfig(**(defaults | options)))

    return build


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trainer, int], None]:
    """Function `interrupt_after(trainer, step)` that interrupts a trainer, as Ctrl-C does, once it has done this step."""

    def prepare(trainer: Trainer, step: int) -> None:
        original = trainer.train_step

        def train_step() -> dict[str, torch.Tensor]:
            if trainer.global_step == step:
                raise KeyboardInterrupt
            return original()

        monkeypatch.setattr(trainer, "train_step", train_step)

    return prepare
