from typing import Any

import pytest

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig


BASE: dict[str, Any] = {"output_dir": "o", "pretrained_model_name_or_path": "p", "train_dataset": "d"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("max_train_steps", 0),
        ("learning_rate", 0.0),
        ("adam_beta2", 1.0),
        ("adam_weight_decay", -0.1),
        ("lr_warmup_steps", -1),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", 0),
        ("seed", -1),
        ("num_layers", 0),
        ("head_learning_rate", -1.0),
        ("flow_shift", 0.0),
        ("validation_timesteps", [0]),
        ("validation_timesteps", []),
        ("validation_timesteps", [300, 500, 300]),
        ("metric_for_best_model", "pair_accuracy"),
    ],
)
def test_impossible_reward_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        RewardTrainingConfig(**BASE, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_rank", 0),
        ("lora_dropout", 1.5),
        ("ema_decay", -0.1),
        # There is no `use_ema`.
        ("ema_decay", 0.99),
        ("reward_scale", 0.0),
        ("num_inference_steps", 1),
        ("step_range", [3]),
        ("step_range", [5, 3]),
        ("step_range", [0, 39]),
        ("prompt_dropout", -0.1),
        ("long_prompt_probability", 2.0),
        ("num_validation_samples", 0),
        ("validation_timesteps", [1001]),
        ("validation_timesteps", []),
        ("validation_timesteps", [300, 300]),
        # The sampler would take both for 1.
        ("validation_guidance_scale", 0.5),
        ("validation_guidance_scale", -1.0),
    ],
)
def test_impossible_prfl_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        PRFLTrainingConfig(**BASE, reward_model="r", **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`reward_model` must be given, or else `reward_models`, and not both, got None"),
        ({"reward_model": "a", "reward_models": ["b"]}, "`reward_model` must be given, or else `reward_models`"),
        ({"reward_models": []}, "`reward_models` must be different models, at least one"),
        ({"reward_models": ["a", "a"]}, "`reward_models` must be different models"),
        ({"reward_model": "a", "reward_disagreement": 0.5}, "`reward_disagreement` must be left out without"),
        ({"reward_model": "a", "reward_combination": "min"}, "`reward_combination` must be left out without"),
        (
            {"reward_models": ["a", "b"], "reward_weights": [1.0]},
            "`reward_weights` must be one number above 0 for each",
        ),
        ({"reward_models": ["a"], "reward_weights": [0.0]}, "`reward_weights` must be one number above 0 for each"),
        (
            {"reward_models": ["a"], "reward_weights": [1.0], "reward_combination": "min"},
            "`reward_weights` must be left out with `reward_combination` min",
        ),
        ({"reward_models": ["a"], "reward_disagreement": -1.0}, "`reward_disagreement` must be at least 0"),
        (
            {"reward_models": ["a"], "reward_disagreement": 1.0, "reward_combination": "product"},
            "`reward_disagreement` must be 0 with `reward_combination` product",
        ),
    ],
)
def test_impossible_reward_models_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRFLTrainingConfig(**BASE, **options)


def test_one_or_several_reward_models() -> None:
    assert PRFLTrainingConfig(**BASE, reward_model="a").reward_sources == ["a"]
    assert PRFLTrainingConfig(**BASE, reward_models=["a", "b"]).reward_sources == ["a", "b"]


def test_the_papers_defaults() -> None:
    reward = RewardTrainingConfig(**BASE)
    assert (reward.num_layers, reward.pooling, reward.task) == (8, "query", "motion_quality")
    assert (reward.learning_rate, reward.head_learning_rate, reward.adam_weight_decay) == (1e-6, 1e-5, 0.01)
    assert reward.metric_for_best_model == "accuracy"
    assert RewardTrainingConfig(**BASE, loss="bt").metric_for_best_model == "pair_accuracy"
    prfl = PRFLTrainingConfig(**BASE, reward_model="r")
    assert (prfl.num_inference_steps, prfl.prompt_dropout, prfl.learning_rate) == (40, 0.1, 5e-6)
    assert prfl.update_schedule == "alternate"


def test_random_timesteps_need_something_to_validate_on() -> None:
    options = {"output_dir": "-", "pretrained_model_name_or_path": "-", "train_dataset": "-"}
    with pytest.raises(
        ValueError, match="`validation_random_timesteps` must be left out without `validation_dataset`"
    ):
        RewardTrainingConfig(**options, validation_random_timesteps=5)
    RewardTrainingConfig(**options, validation_random_timesteps=5, validation_dataset="-")
