"""What README, docs/ and the examples' pages show works: commands, options, links, code and figures."""

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from hy_prfl import WanRewardModel
from hy_prfl.cli import COMMANDS
from hy_prfl.configs.annotate import AnnotateConfig
from hy_prfl.configs.compare import CompareConfig
from hy_prfl.configs.convert import ConvertConfig
from hy_prfl.configs.generate import GenerateConfig
from hy_prfl.configs.hub import PullConfig, PushConfig
from hy_prfl.configs.label import LabelConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.plan import PlanConfig
from hy_prfl.configs.preprocess import PreprocessConfig
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.recipe import RecipeConfig
from hy_prfl.configs.report import ReportConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.configs.score import ScoreConfig
from hy_prfl.formats.pipeline_info import BOUNDARY_RATIOS, PUBLISHED
from hy_prfl.scripts.plan import read_recipe, separate_options
from tests.formats.test_upstream_table import FLAGS


ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
CONFIGS: dict[str, type[Any]] = {
    "preprocess": PreprocessConfig,
    "label": LabelConfig,
    "annotate": AnnotateConfig,
    "compare": CompareConfig,
    "report": ReportConfig,
    "train_reward": RewardTrainingConfig,
    "train_prfl": PRFLTrainingConfig,
    "plan": PlanConfig,
    "score": ScoreConfig,
    "generate": GenerateConfig,
    "convert": ConvertConfig,
    "convert_recipe": RecipeConfig,
    "push": PushConfig,
    "pull": PullConfig,
}
# Options of pip, hf and pytest.
OTHER_OPTIONS = {"local_dir", "durations", "index_url"}
DEMO = json.loads((ROOT / "examples/shapes/results/summary.json").read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> Iterator[list[str]]:
    """Every line of a page's shell blocks, as words, without comments."""
    for block in code_blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def table_rows(path: Path) -> list[list[str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


ALL_COMMANDS = [(name_of(path), words) for path in PAGES for words in commands(path)]


@pytest.mark.parametrize(("page", "words"), ALL_COMMANDS, ids=lambda value: str(value)[:60])
def test_command_runs(page: str, words: list[str]) -> None:
    """It names files, modules and targets that exist, and options that its command takes together."""
    for word in words:
        if re.match(r"(examples|accelerate_configs|ds_configs|tests)/", word):
            assert (ROOT / word).exists(), word
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    if "-m" in words and words[0] in ("python", "accelerate"):
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
    for position, word in enumerate(words):
        name = word.removeprefix("hy_prfl.scripts.") if word != words[0] else words[1]
        is_command = word.startswith("hy_prfl.scripts.") or (position == 0 and word == "hy-prfl")
        # What is abridged by "..." shows an option, not a command.
        if is_command and "..." not in words and "RECIPE" not in words:
            assert name in COMMANDS
            start = 2 if position == 0 else position + 1
            options = [str(ROOT / each) if each.startswith("examples/") else each for each in words[start:]]
            parse(name, options)


def parse(command: str, options: list[str]) -> None:
    """As the script does."""
    if command == "plan":
        own, others = separate_options(options)
        read_recipe(parse_config(PlanConfig, own), others)
    elif command == "convert_recipe":
        parse_config(RecipeConfig, [re.sub(r"^--config$", "--recipe", word) for word in options])
    else:
        parse_config(CONFIGS[command], options)


def options_of_examples() -> set[str]:
    """Fields of the dataclasses, and options of the argument parsers, of the scripts in examples/."""
    names: set[str] = set()
    for path in (ROOT / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                names |= {str(word.value).lstrip("-") for word in node.args if isinstance(word, ast.Constant)}
    return names


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_options_exist(path: Path) -> None:
    fields = {field.name for config in CONFIGS.values() for field in dataclasses.fields(config)}
    launcher = {name.removeprefix("--") for name in launch_command_parser()._option_string_actions}
    known = fields | launcher | options_of_examples() | OTHER_OPTIONS | {"config", "help"}
    known |= {f"no_{name}" for name in fields}
    if path.name == "upstream.md":
        known |= {*FLAGS, "nnodes", "nproc_per_node", "master_port", "use_prompt_extend"}
    found = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", path.read_text())}
    assert found - known == set()


def anchors(path: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_index_lists_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    listed = [name for row in table_rows(index) for name in re.findall(r"\]\(([\w.]+\.md)\)", row[0])]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path != index)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python_compiles_and_its_imports_work(path: Path) -> None:
    for block in code_blocks(path, "python"):
        imports = [node for node in ast.parse(block).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(body=list(imports), type_ignores=[]), name_of(path), "exec"), {})


def test_python_of_the_readme_runs(pipeline_dir: Path, tmp_path: Path) -> None:
    """On the tiny pipeline, with a LoRA and a reward model made for it; one reward comes out, as by hand."""
    pipeline = WanPipeline.from_pretrained(pipeline_dir)
    WanRewardModel.from_transformer(pipeline.transformer, num_layers=2).save_pretrained(tmp_path / "reward")
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    lora = get_peft_model_state_dict(pipeline.transformer)
    WanPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=lora)
    (block,) = code_blocks(ROOT / "README.md", "python")
    changes = {
        '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': repr(str(pipeline_dir)),
        '"outputs/prfl"': repr(str(tmp_path / "lora")),
        '"outputs/reward/best"': repr(str(tmp_path / "reward")),
        "height=480, width=832, num_frames=81": "height=32, width=48, num_frames=9, num_inference_steps=2",
        '"cuda"': '"cpu"',
        "torch.bfloat16": "torch.float32",
    }
    for old, new in changes.items():
        assert old in block, old
        block = block.replace(old, new)
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    exec(block, result)
    assert result["reward"].shape == (1,)
    model = WanRewardModel.from_pretrained(tmp_path / "reward").eval()
    prompt = pipeline.encode_prompt("A woman waves.", do_classifier_free_guidance=False, max_sequence_length=512)[0]
    with torch.no_grad():
        expected = model(result["noisy_latents"], torch.tensor([600.0]), prompt).logits.sigmoid()
    assert torch.allclose(result["reward"], expected, atol=1e-6)


def test_sizes_of_the_models() -> None:
    """The table in README, against models that are built from the published configurations."""
    rows = {row[0].strip("`"): row for row in table_rows(ROOT / "README.md") if row[0].startswith("`Wan-AI/")}
    assert set(rows) == set(PUBLISHED)
    for name, row in rows.items():
        with torch.device("meta"):
            size = sum(weight.numel() for weight in WanTransformer3DModel(**PUBLISHED[name]).parameters()) / 1e9
        number = 2 if name in BOUNDARY_RATIOS else 1
        assert row[2] == f"{'2 x ' if number == 2 else ''}{size:.1f} B"
        assert float(row[3]) == pytest.approx(2 * number * size, abs=0.06)


def test_gpus_in_the_readme() -> None:
    """GPUs, memory and time of the recipes that README shows are those of docs/recipes.md, which has a test of its own."""
    planned = {
        row[0].split("`")[1]: row for row in table_rows(ROOT / "docs" / "recipes.md") if row[0].startswith("[`")
    }
    shown = [row for row in table_rows(ROOT / "README.md") if re.match(r"\[`(prfl|reward)/", row[0])]
    assert len(shown) >= 5
    for link, *cells in shown:
        name = link.split("`")[1]
        assert link == f"[`{name}`](examples/{name}.yaml)"
        _, _, gpus, _, gpu_memory, _, _, seconds, _ = planned[name]
        assert cells == [gpus, gpu_memory, seconds]


def test_demo_in_the_readme() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    good = [round(100 * DEMO[arm]["good"]) for arm in ("base", "prfl", "round")]
    found = f"Of all {DEMO['base']['num_videos']} videos {good[0]} % are good before, {good[1]} % after PRFL, and {good[2]} %"
    assert found in text


def test_demo_in_the_page_of_costs() -> None:
    rows = table_rows(ROOT / "docs" / "costs.md")
    metrics = DEMO["reward_model"]["metrics"]
    for title, name in {"accuracy": "accuracy", "AUC": "auc"}.items():
        (row,) = [row for row in rows if row[0] == f"reward model, {title}"]
        assert row[1:] == [f"{metrics[f'{name}/t{t}']:.2f}" for t in (100, 300, 500, 700, 900)]
    kinds = ("frozen", "jittering", "wrong_direction", "deforming", "vanishing", "beyond")
    titles = {"base": "before", "flow_matching": "flow matching only", "prfl": "PRFL", "round": "PRFL after a round"}
    for arm, title in titles.items():
        (row,) = [row for row in rows if row[0] == title]
        found = DEMO[arm]
        counts = [str(found["failures"].get(kind, 0)) for kind in kinds]
        assert row[1:] == [f"{100 * found['good']:.0f}%", f"{found['reward']:.2f}", *counts]
