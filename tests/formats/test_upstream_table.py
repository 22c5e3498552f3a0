"""docs/upstream.md has every key and flag of upstream's, and names no option that is not there."""

import dataclasses
import re
from pathlib import Path

import pytest

from hy_prfl.configs.convert import ConvertConfig
from hy_prfl.configs.generate import GenerateConfig
from hy_prfl.configs.label import LabelConfig
from hy_prfl.configs.recipe import RecipeConfig
from hy_prfl.formats.upstream_keys import ALL_KEYS, flatten
from hy_prfl.formats.upstream_recipe import CONFIGS
from tests.formats.upstream_recipes import RECIPES, upstream_recipe


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| upstream's")
]
THEIRS = [name for row in ROWS for name in re.findall(r"`([^`]+)`", row[0])]
# All that upstream's inference takes.
FLAGS = (
    "task size frame_num ckpt_dir offload_model ulysses_size ring_size t5_fsdp t5_cpu dit_fsdp save_folder save_file prompt "
    "base_seed image sample_solver sample_steps sample_shift sample_guide_scale teacache_thresh ddp_mode dataset_path "
    "resolution batch_size negative_prompt transformer_path lora_path lora_alpha distill_lora_path distill_lora_alpha"
).split()


def test_every_key_is_in_the_table() -> None:
    assert ALL_KEYS - set(THEIRS) == set()


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_the_files_is_in_the_table(name: str) -> None:
    assert set(flatten(upstream_recipe(name))) - set(THEIRS) == set()


def test_every_flag_is_in_the_table() -> None:
    assert {f"--{flag}" for flag in FLAGS} - set(THEIRS) == set()


def test_nothing_is_in_it_twice() -> None:
    names = [name for name in THEIRS if name != "task"]
    assert sorted(set(names)) == sorted(names)


def test_what_stays_out_has_a_reason() -> None:
    for name in ("--teacache_thresh", "--use_prompt_extend", "task", "lrm.query_attention.num_queries"):
        cells = [row[1] for row in ROWS if f"`{name}`" in row[0]]
        assert any(re.search(r"stays? out: |stay out: ", cell) for cell in cells), name


def test_options_are_there() -> None:
    classes = [*CONFIGS.values(), GenerateConfig, LabelConfig, RecipeConfig]
    fields = {field.name for each in classes for field in dataclasses.fields(each)}
    launcher = {"num_machines", "num_processes", "main_process_port", "config", "transformer"}
    launcher |= {field.name for field in dataclasses.fields(ConvertConfig)}
    named = {name for row in ROWS for name in re.findall(r"--(\w+)", row[1])}
    named |= set(re.findall(r"--(\w+)", PAGE.partition("| upstream's program")[0] + PAGE.rpartition("|\n")[2]))
    assert named - fields - launcher == set()


def test_page_is_linked() -> None:
    assert "(docs/upstream.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
