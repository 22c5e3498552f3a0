"""Every option of the trainers is either applied, refused or not compared when a run goes on from a checkpoint."""

import dataclasses
from typing import Any

import pytest

from hy_prfl.configs.base import TrainingConfig
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.trainers.resumed_options import RULES, find_changes, without_effect


CONFIGS: list[TrainingConfig] = [
    RewardTrainingConfig(output_dir="o", pretrained_model_name_or_path="p", train_dataset="d", lora_rank=4),
    PRFLTrainingConfig(
        output_dir="o", pretrained_model_name_or_path="p", train_dataset="d", reward_model="r", lora_rank=4
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_option_has_its_place(config: TrainingConfig) -> None:
    """A new option fails here until somebody has decided what a changed value does to a run that goes on."""
    names = {field.name for field in dataclasses.fields(config)}
    assert set(RULES[type(config)]) == names
    assert {rule.kind for rule in RULES[type(config)].values()} == {"applied", "refused", "not compared"}
    assert all(rule.note for rule in RULES[type(config)].values() if rule.kind == "refused")
    assert set(without_effect(config, "ZeRO-3")) <= names


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_each_changed_option_is_named_or_refused(config: TrainingConfig) -> None:
    before = dataclasses.asdict(config)
    assert find_changes(before, config, "whole") == []
    for name, rule in RULES[type(config)].items():
        changed = before | {name: ["to_k"] if name == "lora_target_modules" else "other"}
        ignored = without_effect(config, "whole").get(name)
        if rule.kind == "not compared":
            assert find_changes(changed, config, "whole") == []
        elif rule.kind == "refused" and ignored is None:
            with pytest.raises(
                ValueError, match=rf"`{name}` must be .*, as before the checkpoint, got .*: {rule.note}"
            ):
                find_changes(changed, config, "whole")
        else:
            (change,) = find_changes(changed, config, "whole")
            effect = "applied" if ignored is None else f"ignored, {ignored}"
            text = f"`{name}` was {changed[name]!r} before the checkpoint and is {before[name]!r} now: {effect}"
            assert str(change).startswith(text)


@pytest.mark.parametrize(
    ("before", "now", "engine", "effect"),
    [
        ({"max_grad_norm": 2.0}, {}, "whole", "applied."),
        ({"max_grad_norm": 2.0}, {}, "ZeRO-2", "ignored, DeepSpeed's own `gradient_clipping` rules."),
        ({"num_train_epochs": 2}, {}, "whole", "applied; the schedule"),
        ({"num_train_epochs": 2}, {"max_train_steps": 3}, "whole", "ignored, `max_train_steps` is given."),
        ({"lr_warmup_steps": 2}, {}, "whole", "ignored, `lr_scheduler` is constant."),
        ({"lr_warmup_steps": 2}, {"lr_scheduler": "linear"}, "whole", "applied; counted from the first update"),
        ({"lora_dropout": 0.5}, {"lora_rank": None}, "whole", "ignored, there is no adapter."),
        ({"pooling": "mean"}, {"reward_model": "r"}, "whole", "ignored, `reward_model` has its own."),
    ],
)
def test_what_has_no_effect_is_called_ignored(
    before: dict[str, Any], now: dict[str, Any], engine: str, effect: str
) -> None:
    config = dataclasses.replace(CONFIGS[0], **now)
    (change,) = find_changes(dataclasses.asdict(config) | before, config, engine)
    assert f" now: {effect}" in str(change)


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ({"revision": "main"}, {}, None),
        ({"revision": "main"}, {"pretrained_model_name_or_path": "."}, "`pretrained_model_name_or_path` is the folder '.'"),
        ({"tracker_project_name": "other"}, {}, None),
        ({"tracker_project_name": "other"}, {"report_to": ["none"]}, "`report_to` names no tracker"),
        ({"tracker_project_name": "other"}, {"report_to": ["none", "wandb"]}, None),
        ({"num_inference_steps": 8}, {}, None),
        ({"foreseen_levels": [0.1, 0.5]}, {}, "`reward_at` is next"),
        ({"foreseen_levels": [0.1, 0.5]}, {"reward_at": "foreseen"}, None),
        ({"rollout_buffer_size": 4}, {}, "`rollout_interval` is 1"),
        ({"rollout_states": 4}, {"rollout_interval": 2}, None),
        ({"max_rollout_staleness": 0.1}, {"update_schedule": "flow_matching"}, "`update_schedule` is flow_matching"),
        ({"rollout_interval": 2}, {"update_schedule": "flow_matching"}, "`update_schedule` is flow_matching"),
        ({"anchor_scale": 1.0}, {"update_schedule": "flow_matching"}, "`update_schedule` is flow_matching"),
        ({"anchor_scale": 1.0}, {}, None),
        ({"on_hacking": "stop"}, {}, "there is no `validation_dataset`"),
        ({"on_hacking": "stop"}, {"validation_dataset": "v"}, None),
        ({"reward_combination": "min"}, {}, "there is one `reward_model`"),
        ({"reward_weights": [1.0, 2.0]}, {"reward_model": None, "reward_models": ["a", "b"]}, None),
        ({"stop_input_gradient": True}, {}, "`num_chained_steps` is 1"),
        ({"hub_model_id": "a/b"}, {}, "`push_to_hub` is off"),
        ({"num_inference_steps": 8}, {"update_schedule": "flow_matching", "validation_dataset": "v"}, None),
        *(
            ({name: value}, {"update_schedule": "flow_matching"}, "`update_schedule` is flow_matching, and there is no")
            for name, value in [
                ("num_inference_steps", 8), ("sampler_flow_shift", 2.0), ("reward_model", "other"), ("reward_disagreement", 1.0),
            ]
        ),
    ],
)  # fmt: skip
def test_what_has_no_effect_in_prfl_is_called_ignored(
    before: dict[str, Any], now: dict[str, Any], reason: str | None
) -> None:
    """The log called them applied, though they change nothing in such a run."""
    config = dataclasses.replace(CONFIGS[1], **now)
    (change,) = find_changes(dataclasses.asdict(config) | before, config, "whole")
    assert (change.ignored is None) == (reason is None)
    assert f" now: {'applied' if reason is None else f'ignored, {reason}'}" in str(change)


# Another value of every option that may change.
OTHERS: dict[str, Any] = {
    "output_dir": "other", "pretrained_model_name_or_path": "other", "revision": "main", "variant": "fp16",
    "validation_dataset": "v", "train_dataset": "other", "seed": 1, "lora_dropout": 0.5, "base_quantization": "int8",
    "train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "max_train_steps": 5,
    "learning_rate": 1.0, "lr_scheduler": "linear", "lr_warmup_steps": 3, "lr_num_cycles": 2, "lr_power": 2.0,
    "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_weight_decay": 0.5, "adam_epsilon": 0.5, "max_grad_norm": 3.0,
    "use_ema": True, "ema_decay": 0.5, "max_skipped_updates": 3, "gradient_checkpointing": True,
    "gradient_checkpointing_blocks": 1, "offload_activations": True, "attention_backend": "native", "allow_tf32": True,
    "compile": True, "context_parallel_degree": 2, "dataloader_num_workers": 1, "weighting_scheme": "logit_normal",
    "flow_shift": 2.0, "logit_mean": 1.0, "logit_std": 2.0, "checkpointing_steps": 3, "checkpoints_total_limit": 3,
    "delete_checkpoints_first": True, "validation_steps": 3, "report_to": ["none"], "tracker_project_name": "other",
    "logging_steps": 3, "write_report": False, "push_to_hub": True, "hub_model_id": "a/b", "hub_private_repo": True,
    "hub_push_checkpoints": 2,
}  # fmt: skip
OTHERS_OF: dict[type[TrainingConfig], dict[str, Any]] = {
    RewardTrainingConfig: {
        **OTHERS, "train_dataset": ["other"], "validation_dataset": ["v"], "train_dataset_weights": [2.0],
        "reward_model": "r", "task": "physics_quality", "loss": "bt", "allow_unpaired": True, "head_learning_rate": 1.0,
        "validation_timesteps": [400], "validation_random_timesteps": 5, "validation_seed": 3,
        "metric_for_best_model": "auc",
    },
    PRFLTrainingConfig: {
        **OTHERS, "shard_frozen_expert": True, "frozen_expert_quantization": "int8", "reward_model": "other",
        "reward_models": ["a", "b"], "reward_weights": [2.0, 1.0], "reward_combination": "min", "reward_disagreement": 1.0,
        "allow_other_base": True, "shard_reward_model": True, "offload_reward_model": True,
        "reward_model_quantization": "int8", "prompt_dataset": "other", "update_schedule": "joint",
        "reward_loss": "sigmoid", "reward_scale": 2.0, "reward_target": 3.0, "anchor_scale": 1.0,
        "divide_by_step_width": False, "num_inference_steps": 8, "step_range": [2, 4], "num_gradient_steps": 2,
        "rerun_gradient_step": True, "num_chained_steps": 2, "stop_input_gradient": True, "reward_at": "foreseen",
        "foreseen_levels": [0.1, 0.5], "rollout_interval": 2, "rollout_buffer_size": 2, "rollout_states": 4,
        "rollout_cache_interval": 2, "max_rollout_staleness": 0.1, "reward_gradient_checkpointing_blocks": 1,
        "rollout_attention_backend": "native", "sampler_flow_shift": 2.0, "prompt_dropout": 0.5,
        "long_prompt_probability": 0.5, "num_validation_samples": 3, "validation_timesteps": [400],
        "validation_guidance_scale": 2.0, "validation_videos": True, "validation_fps": 8, "vae_tiling": "on",
        "validation_seed": 3, "monitor_reward_models": ["other"], "on_hacking": "stop",
    },
}  # fmt: skip
# Refused beside another value of another option, and not because they would be unused.
EXCLUSIVE = {"reward_model", "reward_models", "rollout_cache_interval", "loss", "freeze_blocks"}
VARIANTS: list[tuple[type[TrainingConfig], dict[str, Any]]] = [
    (RewardTrainingConfig, {}),
    (RewardTrainingConfig, {"lora_rank": None}),
    (RewardTrainingConfig, {"lora_rank": None, "freeze_blocks": True, "gradient_checkpointing": True}),
    (RewardTrainingConfig, {"validation_dataset": ["v"], "push_to_hub": True, "checkpoints_total_limit": 2}),
    (PRFLTrainingConfig, {}),
    (PRFLTrainingConfig, {"lora_rank": None, "push_to_hub": True}),
    (PRFLTrainingConfig, {"update_schedule": "flow_matching"}),
    (PRFLTrainingConfig, {"update_schedule": "flow_matching", "validation_dataset": "v", "gradient_checkpointing": True}),
    (PRFLTrainingConfig, {"update_schedule": "reward", "gradient_checkpointing": True, "rollout_interval": 3}),
    (PRFLTrainingConfig, {"reward_at": "foreseen", "reward_model": None, "reward_models": ["a"]}),
    (PRFLTrainingConfig, {"reward_model": None, "reward_models": ["a", "b"], "reward_combination": "min"}),
    (PRFLTrainingConfig, {"reward_model": None, "reward_models": ["a", "b"], "reward_combination": "product"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes"), VARIANTS, ids=[str(number) for number in range(len(VARIANTS))])
def test_what_the_options_refuse_as_unused_is_called_ignored(
    kind: type[TrainingConfig], changes: dict[str, Any]
) -> None:
    """
    Walks all options: if the others allow only the value that switches one off, its change is not what takes effect.

    A run that goes on without foreseen rewards, for example, also has to leave out their levels.
    """
    (base,), others = [config for config in CONFIGS if type(config) is kind], OTHERS_OF[kind]
    config = dataclasses.replace(base, **changes)
    may_change = {name for name, rule in RULES[kind].items() if rule.kind == "applied"}
    assert set(others) | EXCLUSIVE >= may_change
    missing = {}
    for name in may_change - EXCLUSIVE:
        try:
            dataclasses.replace(config, **{name: others[name]})
        except ValueError as error:
            if name not in without_effect(config, "whole"):
                missing[name] = str(error)
    assert missing == {}


def test_what_says_the_same_in_other_words_is_no_change() -> None:
    config = dataclasses.replace(CONFIGS[0], lora_alpha=4.0, lora_target_modules=["to_k", "to_q"])
    before = dataclasses.asdict(config) | {"lora_alpha": None, "lora_target_modules": ["to_q", "to_k"]}
    # An option that the checkpoint's version did not have yet had its default.
    del before["compile"]
    assert find_changes(before, config, "whole") == []
    assert [change.name for change in find_changes(before, dataclasses.replace(config, compile=True), "whole")] == [
        "compile"
    ]


def test_options_of_other_versions_are_named() -> None:
    (change,) = find_changes(dataclasses.asdict(CONFIGS[0]) | {"use_8bit_adam": True}, CONFIGS[0], "whole")
    assert "`use_8bit_adam` was True before the checkpoint and is None now: ignored, there is no such" in str(change)
