"""Every file in examples/ and accelerate_configs/ can be read by the command that it is for."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from examples.real_size.recipes import load_recipe, page, plan_recipe, read_head, recipe_paths
from hy_prfl.configs.generate import GenerateConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.preprocess import PreprocessConfig
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.configs.score import ScoreConfig
from hy_prfl.formats.pipeline_info import PUBLISHED


ROOT = Path(__file__).parents[2]
CONFIGS = {
    "preprocess": PreprocessConfig,
    "train_reward": RewardTrainingConfig,
    "train_prfl": PRFLTrainingConfig,
    "score": ScoreConfig,
    "generate": GenerateConfig,
}
TRAINING_RECIPES = recipe_paths()
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*/*.yaml") if path.parent.name != "shapes")
# Options that a command needs, besides its required fields.
NEEDED = {
    "preprocess": ["--manifest=x"],
    "generate": ["--prompts=x"],
    "train_prfl": ["--reward_model=left_out"],
    "score": ["--manifest=x", "--output=x.csv", "--pretrained_model_name_or_path=x"],
}
RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def head_commands(path: Path) -> list[list[str]]:
    """The commands in the comment at the head of a recipe, as lists of words."""
    text = path.read_text(encoding="utf-8")
    comment = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    commands = re.findall(r"^accelerate launch .*$", comment.replace("\\\n", " "), flags=re.MULTILINE)
    return [command.split() for command in commands]


def head_module(path: Path) -> str:
    """The training command in the head of a recipe."""
    words = next(iter(head_commands(path)))
    return words[words.index("-m") + 1].removeprefix("hy_prfl.scripts.")


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= len(CONFIGS)
    assert {path.stem for path in RECIPES if path.parent.name == "shapes"} == set(CONFIGS)


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_parses_with_the_command_in_its_head(path: Path) -> None:
    """The config class accepts the recipe with the options in its head."""
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


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_recipe_has_only_what_differs_from_the_defaults(path: Path) -> None:
    config_class = CONFIGS[head_module(path)]
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = set(given)
    options = [f"--{option.name}=left_out" for option in dataclasses.fields(config_class) if is_required(option)]
    required = dataclasses.asdict(parse_config(config_class, [*options, *NEEDED.get(head_module(path), [])]))
    words = next(iter(head_commands(path)))
    config = parse_config(config_class, ["--config", str(path), *words[words.index("-m") + 4 :]])
    assert {name for name in names if getattr(config, name) == required[name]} == set()


def is_required(option: dataclasses.Field) -> bool:
    return option.default is option.default_factory is dataclasses.MISSING


def test_page_of_recipes_is_what_the_planner_says() -> None:
    """All figures of the page are computed again. `python -m examples.real_size.recipes` writes it."""
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("path", TRAINING_RECIPES, ids=relative)
def test_head_is_short_and_the_recipe_fits(path: Path) -> None:
    purpose, words = read_head(path)
    assert words[words.index("--config") + 1] == relative(path)
    assert len(purpose) < 160
    assert not re.search(r"\d GB|\d s |hours", purpose), "figures are in docs/recipes.md"
    assert ("720P" in purpose.split(",")[1]) == ("720p" in path.stem)
    recipe, planned = load_recipe(path), plan_recipe(path)
    assert planned.fits
    assert recipe.num_gpus == (1 if recipe.engine == "single_gpu" else 8)
    assert recipe.zero_stage == {"zero2": 2, "zero3": 3}.get(recipe.engine, 0)


def test_recipes_for_one_gpu_fit_it() -> None:
    """The table of docs/one_gpu.md has the planner's figures, and they fit into the GPU."""
    rows = re.findall(
        r"^\| (\d+) GB \|.*\((?:\.\./)(examples/.*?\.yaml)\) \| ([\d.]+) GB \|",
        (ROOT / "docs/one_gpu.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert {path for _, path, _ in rows} >= {relative(path) for path in TRAINING_RECIPES if path.stem.endswith("gb")}
    for capacity, path, peak in rows:
        planned = plan_recipe(ROOT / path)
        assert float(peak) == pytest.approx(planned.peak, abs=0.06), path
        assert planned.gpu_memory == float(capacity)
        assert planned.fits


def test_recipes_cover_the_published_models() -> None:
    """All published pipelines have recipes for a reward model, and for PRFL with all weights and with an adapter."""
    trained = {"reward": set(), "full": set(), "lora": set()}
    for path in TRAINING_RECIPES:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = "reward" if path.parent.name == "reward" else ("lora" if "lora_rank" in given else "full")
        trained[kind].add(given["pretrained_model_name_or_path"])
    assert trained == dict.fromkeys(trained, set(PUBLISHED))


def test_shapes_recipes_agree() -> None:
    """All stages of the demo pad to one length, and generation has the same timesteps as the reward updates."""
    values = {name: yaml.safe_load((ROOT / f"examples/shapes/{name}.yaml").read_text()) for name in CONFIGS}
    assert len({values[name]["max_sequence_length"] for name in ("preprocess", "score", "generate")}) == 1
    assert values["generate"]["num_inference_steps"] == values["train_prfl"]["num_inference_steps"]
    for name in ("fps", "num_frames", "buckets"):
        assert values["preprocess"][name] == values["score"][name]
