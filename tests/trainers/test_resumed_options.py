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
