"""Every arm of the experiments is a run that its script accepts."""

from pathlib import Path

import pytest

from examples.shapes.experiments import generators, inputs, reward_models, rollouts, rounds, second_round
from examples.shapes.stages import Stage
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig


TUNED = generators.ARMS | second_round.ARMS


def options_of(stage: Stage, script: str) -> list[str]:
    """Options of the command of a stage that runs a script of the package."""
    (command,) = [command for command in stage.commands if f"hy_prfl.scripts.{script}" in command]
    return command[command.index(f"hy_prfl.scripts.{script}") + 1 :]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])


@pytest.mark.parametrize("arm", reward_models.ARMS)
def test_arms_of_reward_models(tmp_path: Path, arm: str) -> None:
    stage = reward_models.training_stage(tmp_path, arm, seed=3)
    config = parse_config(RewardTrainingConfig, options_of(stage, "train_reward"))
    assert config.seed == 3
    assert config.max_train_steps == config.validation_steps
    assert config.max_train_steps == reward_models.NUM_UPDATES * (2 if arm == "own_and_real" else 1)
    assert config.train_batch_size * (2 if config.loss == "bt" else 1) == 32


@pytest.mark.parametrize("name", [name for name, arm in TUNED.items() if arm.trains])
def test_arms_of_generators_have_equally_many_updates_or_a_multiple(tmp_path: Path, name: str) -> None:
    stage = generators.tuning_stage(tmp_path, name, TUNED[name], seed=3)
    config = parse_config(PRFLTrainingConfig, options_of(stage, "train_prfl"))
    assert config.seed == config.validation_seed == 3
    assert config.max_train_steps is not None
    updates = 2 if config.update_schedule == "alternate" else 1
    assert config.max_train_steps * updates == 2 * generators.NUM_STEPS * TUNED[name].times
    assert config.max_train_steps == generators.NUM_VALIDATIONS * config.validation_steps


def test_no_two_arms_are_the_same(tmp_path: Path) -> None:
    stages = [reward_models.training_stage(tmp_path, arm, seed) for arm in reward_models.ARMS for seed in (0, 1)]
    stages += [second_round.reward_stage(tmp_path, seed) for seed in (0, 1)]
    stages += [generators.tuning_stage(tmp_path, name, arm, seed) for name, arm in TUNED.items() for seed in (0, 1)]
    assert len({stage.digest() for stage in stages}) == len({stage.name for stage in stages}) == len(stages)


def test_the_second_reward_model_is_trained_as_the_first(tmp_path: Path) -> None:
    stages = reward_models.training_stage(tmp_path, "own_and_real", 3), second_round.reward_stage(tmp_path, 3)
    first, second = (parse_config(RewardTrainingConfig, options_of(stage, "train_reward")) for stage in stages)
    # 2,458 of the generator's own videos and 2,048 clips in 800 updates, then 819 videos more.
    assert second.max_train_steps == second.validation_steps == 945
    changed = {name for name, value in vars(first).items() if vars(second)[name] != value}
    assert changed == {"train_dataset", "output_dir", "max_train_steps", "validation_steps", "checkpointing_steps"}


def test_panels_show_arms() -> None:
    tuned = {name for name, arm in generators.ARMS.items() if arm.trains}
    for panels, arms in ((reward_models.PANELS, {*reward_models.ARMS}), (generators.PANELS, tuned)):
        assert {arm for panel in panels.values() for arm in panel} == arms


def test_inputs_have_seeds_of_their_own(tmp_path: Path) -> None:
    (clips,) = [stage for stage in inputs.video_stages(tmp_path) if stage.name == "clips"]
    seeds = [command[command.index("--seed") + 1] for command in clips.commands]
    assert len({*seeds}) == len(seeds)


@pytest.mark.parametrize("name", rollouts.ARMS)
def test_arms_of_rollouts(tmp_path: Path, name: str) -> None:
    arm = rollouts.ARMS[name]
    stage = rollouts.tuning_stage(tmp_path, name, arm, seed=1)
    config = parse_config(PRFLTrainingConfig, options_of(stage, "train_prfl"))
    assert (config.seed, config.max_train_steps, config.reward_scale) == (1, arm.num_steps, arm.scale)
    assert (config.rollout_interval > 1) == (arm.options[:4] != rollouts.FRESH)
    assert len(config.reward_models or [config.reward_model]) == (3 if arm.ensemble else 1)
    assert (config.lora_rank, config.divide_by_step_width) == (None if arm.full else 16, True)


def test_rollouts_cost_what_they_walk() -> None:
    """By hand: a step with gradient counts 4, and a flow-matching update is one; chains of 20 have 19 steps to start from."""
    # On average the gradient is in the tenth step, after nine without.
    assert rollouts.ARMS["prfl"].forwards() == 4 + 4 + 9
    # A chain of 19 forwards for eight updates.
    assert rollouts.ARMS["reused"].forwards() == pytest.approx(4 + 4 + 19 / 8)
    assert rollouts.ARMS["reused_short"].forwards() == pytest.approx(4 + 4 + 9 / 8)
    # Steps 0, 1, 3, 5, ... are called: before step k that is 0, 1, 2, 2, 3, 3, ..., 9, 9, 10 of them.
    assert rollouts.ARMS["cached"].forwards() == pytest.approx(4 + 4 + (1 + 2 * sum(range(2, 10)) + 10) / 19)
    assert rollouts.ARMS["anchored_hard_160"].forwards() == pytest.approx(4 + 4 + 19 / 8 + 1)


def test_rounds_label_what_was_tuned_before(tmp_path: Path) -> None:
    known: dict[str, str] = {}
    for number, each in enumerate(rounds.ROUNDS, 1):
        climbed = [rounds.reward_model_after(tmp_path, one, 1) for one in each.reward_models]
        for name, arm in each.climbs.items():
            digest = rollouts.tuning_stage(tmp_path, name, arm, 1, climbed).digest()
            assert known.setdefault(name, digest) == digest
        for name, arm in each.arms.items():
            judges = rounds.reward_models_of(tmp_path, arm, number, 1)
            assert name not in known
            known[name] = rollouts.tuning_stage(tmp_path, name, arm, 1, judges).digest()
    assert [rounds.num_labels_after(number) for number in range(6)] == [0, 1056, 1760, 2464, 5280, 8096]
    stage = rounds.reward_stage(tmp_path, tmp_path, 3, 1)
    config = parse_config(RewardTrainingConfig, options_of(stage, "train_reward"))
    assert len(config.train_dataset) == 1 + 7
    assert config.train_dataset_weights == [1.0] + [2.0] * 7


def test_pooled_reward_models_learn_from_all_seeds(tmp_path: Path) -> None:
    stage = rounds.pooled_reward_stage(tmp_path, tmp_path, [0, 1, 2], 1)
    config = parse_config(RewardTrainingConfig, options_of(stage, "train_reward"))
    assert len({*config.train_dataset}) == 1 + 3 * (3 + 2 + 2 + 2 + 2)
    assert config.output_dir == str(tmp_path / "rounds" / "reward_pooled_1")
    assert config.reward_model == str(rounds.reward_model_after(tmp_path, 5, 1))
