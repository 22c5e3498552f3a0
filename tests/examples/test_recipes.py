"""Every file in examples/ and accelerate_configs/ is read as the commands in it would read it."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hy_prfl.configs.generate import GenerateConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.preprocess import PreprocessConfig
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.configs.score import ScoreConfig
from hy_prfl.models.published import PUBLISHED
from hy_prfl.scripts.plan import main as plan_command


ROOT = Path(__file__).parents[2]
CONFIGS = {
    "preprocess": PreprocessConfig,
    "train_reward": RewardTrainingConfig,
    "train_prfl": PRFLTrainingConfig,
    "score": ScoreConfig,
    "generate": GenerateConfig,
}
TRAINING_RECIPES = sorted([*(ROOT / "examples/prfl").glob("*.yaml"), *(ROOT / "examples/reward").glob("*.yaml")])
PLANNED = re.compile(r"Planned, not measured: .* ([\d.]+) GB on each; (\d+) s a step")
RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def head_commands(path: Path) -> list[list[str]]:
    """The commands in the comment at the head of a recipe, as words."""
    text = path.read_text(encoding="utf-8")
    comment = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    commands = re.findall(r"^accelerate launch .*$", comment.replace("\\\n", " "), flags=re.MULTILINE)
    return [command.split() for command in commands]


def head_text(path: Path) -> str:
    """The comment at the head of a recipe, on one line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return " ".join(line.removeprefix("#").strip().removesuffix("\\").strip() for line in lines)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= len(CONFIGS)
    assert {path.stem for path in RECIPES if path.parent.name == "shapes"} == set(CONFIGS)


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_parses_with_the_command_in_its_head(path: Path) -> None:
    """The config class takes the recipe together with the options that the head gives it."""
    commands = head_commands(path)
    assert commands, "the head of a recipe shows the command that runs it"
    for words in commands:
        module = words[words.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None, module
        options = words[words.index("-m") + 2 :]
        assert ["--config", relative(path)] == options[:2]
        config_class = CONFIGS[module.removeprefix("hy_prfl.scripts.")]
        config = parse_config(config_class, ["--config", str(path), *options[2:]])
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert set(given) <= {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("path", [*RECIPES, *ACCELERATE_CONFIGS], ids=relative)
def test_files_named_in_a_head_exist(path: Path) -> None:
    head = "".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    for name in re.findall(r"(?:accelerate_configs|ds_configs|examples)/[\w./-]+\.(?:yaml|json)", head):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=relative)
def test_accelerate_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(path))
    assert config.num_machines >= 1
    deepspeed_config = config.deepspeed_config.get("deepspeed_config_file") if config.deepspeed_config else None
    if deepspeed_config is not None:
        assert Path(deepspeed_config).is_file(), deepspeed_config


@pytest.mark.parametrize("path", TRAINING_RECIPES, ids=relative)
def test_head_says_what_the_recipe_needs(path: Path) -> None:
    """Memory, time, and the command that they come from, whose options are those of the launch above it."""
    head = head_text(path)
    assert PLANNED.search(head), "the head says what `hy-prfl plan` says"
    (command,) = re.findall(r"hy-prfl plan .*?--num_rows \d+", head)
    options = dict(zip(*[iter(command.split()[2:])] * 2, strict=True))
    assert options["--config"] == relative(path)
    assert ("720P" in head.split(",")[1]) == (options["--height"] == "720")
    launch = re.findall(r"accelerate_configs/(\w+)\.yaml", head)[0]
    stage = {"zero2": "2", "zero3": "3"}.get(launch, "0")
    assert options["--zero_stage"] == stage
    assert options["--num_gpus"] == ("1" if launch == "single_gpu" else "8")


@pytest.mark.parametrize(
    "name",
    ["prfl/wan2.1_t2v_1.3b_480p_lora", "prfl/wan2.1_t2v_14b_480p_lora_24gb", "reward/wan2.1_t2v_1.3b_480p_bt"],
)
def test_head_is_what_the_planner_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    head = head_text(ROOT / f"examples/{name}.yaml")
    (command,) = re.findall(r"hy-prfl plan (.*?--num_rows \d+)", head)
    plan_command([*command.split(), "--output", str(tmp_path / "plan.json")])
    plan = json.loads((tmp_path / "plan.json").read_text())
    found = PLANNED.search(head)
    assert found is not None
    assert plan["fits"]
    assert plan["peak"] == pytest.approx(float(found[1]), abs=0.1)
    assert plan["seconds_per_step"] == pytest.approx(float(found[2]), abs=1)


def test_recipes_for_one_gpu_fit_it() -> None:
    """The table of docs/one_gpu.md says what the heads say, and that is less than the GPU has."""
    rows = re.findall(
        r"^\| (\d+) GB \|.*\((?:\.\./)(examples/.*?\.yaml)\) \| ([\d.]+) GB \|",
        (ROOT / "docs/one_gpu.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert {path for _, path, _ in rows} >= {relative(path) for path in TRAINING_RECIPES if path.stem.endswith("gb")}
    for capacity, path, peak in rows:
        found = PLANNED.search(head_text(ROOT / path))
        assert found is not None
        assert found[1] == peak, path
        assert float(peak) <= float(capacity), path


def test_recipes_cover_the_published_models() -> None:
    """All published pipelines, each with a reward model and with PRFL of all weights and of an adapter."""
    trained = {"reward": set(), "full": set(), "lora": set()}
    for path in TRAINING_RECIPES:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = "reward" if path.parent.name == "reward" else ("lora" if "lora_rank" in given else "full")
        trained[kind].add(given["pretrained_model_name_or_path"])
    assert trained == dict.fromkeys(trained, set(PUBLISHED))


def test_shapes_recipes_agree() -> None:
    """All stages of the demo pad to one length, and generation walks the grid that the reward updates walk."""
    values = {name: yaml.safe_load((ROOT / f"examples/shapes/{name}.yaml").read_text()) for name in CONFIGS}
    assert len({values[name]["max_sequence_length"] for name in ("preprocess", "score", "generate")}) == 1
    assert values["generate"]["num_inference_steps"] == values["train_prfl"]["num_inference_steps"]
    for name in ("fps", "num_frames", "buckets"):
        assert values["preprocess"][name] == values["score"][name]


def test_commands_of_the_readme_parse() -> None:
    """Every command that the README shows names files that are there, and options that its script has."""
    commands = re.findall(
        r"^accelerate launch .*$", (ROOT / "README.md").read_text().replace("\\\n", " "), re.MULTILINE
    )
    # What is abridged by "..." shows an option, not a command.
    commands = [command for command in commands if "..." not in command]
    assert len(commands) >= len(CONFIGS)
    for words in map(str.split, commands):
        options = words[words.index("-m") + 2 :]
        for word in words:
            assert not word.startswith(("examples/", "accelerate_configs/")) or (ROOT / word).is_file(), word
        script = words[words.index("-m") + 1].removeprefix("hy_prfl.scripts.")
        parse_config(CONFIGS[script], [str(ROOT / word) if word.startswith("examples/") else word for word in options])
