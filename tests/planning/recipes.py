"""Recipes for the planner. Options that it does not use are filled in."""

from typing import Any

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig


def prfl_recipe(model: str = "Wan-AI/Wan2.1-T2V-14B-Diffusers", **options: Any) -> PRFLTrainingConfig:
    """A recipe of `train_prfl`."""
    rewards = {} if "reward_models" in options else {"reward_model": "-"}
    return PRFLTrainingConfig(
        output_dir="-", pretrained_model_name_or_path=model, train_dataset="-", **rewards, **options
    )


def reward_recipe(model: str = "Wan-AI/Wan2.1-T2V-14B-Diffusers", **options: Any) -> RewardTrainingConfig:
    """A recipe of `train_reward`."""
    return RewardTrainingConfig(output_dir="-", pretrained_model_name_or_path=model, train_dataset="-", **options)
