"""What holds for the options of every command."""

import dataclasses
import math
from typing import Any, get_args, get_type_hints

import pytest

from hy_prfl.configs.base import Config
from hy_prfl.configs.convert import ConvertConfig
from hy_prfl.configs.generate import GenerateConfig
from hy_prfl.configs.hub import PullConfig, PushConfig
from hy_prfl.configs.label import LabelConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.plan import PlanConfig
from hy_prfl.configs.preprocess import PreprocessConfig
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.recipe import RecipeConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.configs.score import ScoreConfig


TRAINING = {"output_dir": "o", "pretrained_model_name_or_path": "p", "train_dataset": "d"}
REQUIRED: dict[type[Config], dict[str, Any]] = {
    PreprocessConfig: {"output_dir": "o", "pretrained_model_name_or_path": "p", "manifest": "m.json"},
    ScoreConfig: {"output": "o.csv", "reward_model": "r", "dataset": "d"},
    GenerateConfig: {"output_dir": "o", "pretrained_model_name_or_path": "p", "prompts": "p.txt", "lora_path": ["l"]},
    RewardTrainingConfig: TRAINING,
    PRFLTrainingConfig: TRAINING | {"reward_model": "r"},
    PlanConfig: {"recipe": "r.yaml"},
    ConvertConfig: {"output_dir": "o", "lora": "l"},
    RecipeConfig: {"recipe": "r.yaml", "output": "o.yaml"},
    LabelConfig: {"output_dir": "o", "dataset": "d", "annotations": "a.csv"},
    PushConfig: {"folder": "f"},
    PullConfig: {"repo_id": "u/n", "output_dir": "o"},
}
# No limit.
INFINITE = {"max_grad_norm", "max_frame_duration"}


def options_of(kind: type) -> list[tuple[type[Config], str]]:
    return [
        (config_class, name)
        for config_class in REQUIRED
        for name, hint in get_type_hints(config_class).items()
        if kind in (hint, *get_args(hint), *(inner for part in get_args(hint) for inner in get_args(part)))
    ]


@pytest.mark.parametrize(("config_class", "name"), options_of(float))
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400"])
def test_numbers_are_finite(config_class: type[Config], name: str, value: str) -> None:
    options = [f"--{key}={text}" for key, text in REQUIRED[config_class].items()]
    if name in INFINITE and value in ("inf", "1e400"):
        assert getattr(parse_config(config_class, [*options, f"--{name}={value}"]), name) == math.inf
        return
    with pytest.raises(ValueError, match=rf"`{name}` must be a finite number.*, got (-?inf|nan)"):
        parse_config(config_class, [*options, f"--{name}={value}"])
    with pytest.raises(ValueError, match=rf"`{name}` must be a finite number"):
        config_class(**REQUIRED[config_class], **{name: float(value)})


def test_numbers_in_lists_are_finite() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Example(Config):
        shares: list[float]

    with pytest.raises(ValueError, match="`shares` must be a finite number, got nan"):
        Example(shares=[0.5, math.nan])


@pytest.mark.parametrize(("config_class", "name"), options_of(str))
@pytest.mark.parametrize("value", ["", "  "])
def test_texts_are_not_empty(config_class: type[Config], name: str, value: str) -> None:
    options = [f"--{key}={text}" for key, text in REQUIRED[config_class].items() if key != name]
    if name == "negative_prompt":
        assert getattr(parse_config(config_class, [*options, f"--{name}={value}"]), name) == value
        return
    with pytest.raises(ValueError, match=rf"`{name}` must be "):
        parse_config(config_class, [*options, f"--{name}", value])


@pytest.mark.parametrize("config_class", [RewardTrainingConfig, PRFLTrainingConfig, ScoreConfig])
def test_seeds_are_those_that_numpy_takes(
    config_class: type[RewardTrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = REQUIRED[config_class]
    names = [name for name in ("seed", "validation_seed") if hasattr(config_class, name)]
    for name in names:
        assert getattr(config_class(**options, **{name: 2**32 - 1}), name) == 2**32 - 1
        for value in (-1, 2**32, 10**30):
            with pytest.raises(ValueError, match=rf"`{name}` must be .*4294967296.*, got {value}"):
                config_class(**options, **{name: value})


def test_seed_of_every_process_of_a_training_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert RewardTrainingConfig(**TRAINING, seed=2**32 - 8).seed == 2**32 - 8
    with pytest.raises(ValueError, match="`seed` must be at least 0 and less than 4294967289, got 4294967289"):
        RewardTrainingConfig(**TRAINING, seed=2**32 - 7)


def test_seeds_of_videos() -> None:
    options = REQUIRED[GenerateConfig]
    assert GenerateConfig(**options, seed=10**18 - 2, num_videos_per_prompt=2).seed == 10**18 - 2
    for seed, number in ((10**18, 1), (10**18 - 2, 3), (2**70, 1), (-1, 1)):
        with pytest.raises(ValueError, match=rf"`seed` must be .*10\^18.*, got {seed}"):
            GenerateConfig(**options, seed=seed, num_videos_per_prompt=number)
