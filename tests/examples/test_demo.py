"""The demo is the chain of the entry points, on captions and seeds that are kept apart."""

import json
from pathlib import Path

import pytest

from examples.shapes.clips import split_captions
from examples.shapes.demo import DemoConfig, plan, write_prompts
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig


def test_the_plan_is_the_chain_of_the_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    stages = plan(DemoConfig(output_dir=str(tmp_path)))
    modules = [
        command[command.index("--config") - 1] for one in stages for command in one.commands if "--config" in command
    ]
    verbs = [module.removeprefix("hy_prfl.scripts.") for module in modules]
    assert verbs == [
        *["preprocess"] * 3, "train_reward", *["train_prfl"] * 2,
        "generate", *["preprocess"] * 2, "train_reward", "train_prfl",
        *["generate"] * 4, *["score"] * 4,
    ]  # fmt: skip
    assert len({one.digest() for one in stages}) == len(stages)


@pytest.mark.parametrize("name", ["flow_matching", "prfl", "round"])
def test_runs_of_the_generator_accept_their_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    config = DemoConfig(output_dir=str(tmp_path))
    ((command,),) = [stage.commands for stage in plan(config) if stage.name == name]
    prfl = parse_config(PRFLTrainingConfig, command[command.index("--config") :])
    # As many updates in all.
    num_updates = prfl.max_train_steps * (1 if name == "flow_matching" else 2)
    assert num_updates == 2 * config.prfl_steps


def test_a_round_learns_from_its_own_videos_beside_the_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of its reward model and of its generator parse, and name what the stages before have made."""
    monkeypatch.chdir(Path(__file__).parents[2])
    commands = {stage.name: stage.commands for stage in plan(DemoConfig(output_dir=str(tmp_path)))}
    (command,) = commands["round_reward"]
    reward = parse_config(RewardTrainingConfig, command[command.index("--config") :])
    names = [Path(dataset).name for dataset in reward.train_dataset]
    assert names == ["labelled", "round_train"]
    assert reward.train_dataset_weights == [1, 2]
    assert [Path(dataset).name for dataset in reward.validation_dataset or []] == ["held_out", "round_validation"]
    (command,) = commands["round"]
    prfl = parse_config(PRFLTrainingConfig, command[command.index("--config") :])
    assert prfl.reward_models == [str(tmp_path / name / "best") for name in ("round_reward", "reward")]
    assert prfl.lora_path is None


def test_prompts_are_captions_of_their_split_with_seeds_of_their_own(tmp_path: Path) -> None:
    for split in ("train", "held_out"):
        write_prompts(tmp_path / "prompts.json", split, 30, first_seed=7)
        rows = json.loads((tmp_path / "prompts.json").read_text())
        assert {row["caption"] for row in rows} <= {str(caption) for caption in split_captions(split)}
        assert [row["seed"] for row in rows] == list(range(7, 37))
        assert len({row["id"] for row in rows}) == 30


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_prompts` must be"):
        DemoConfig(num_prompts=0)
