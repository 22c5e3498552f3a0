"""
Writes what each recipe in `examples/prfl` and `examples/reward` needs according to the planner: `make recipes`, or

    python -m examples.real_size.recipes

The page is `docs/recipes.md`. Needs no GPU and no weights, and about two minutes. Engine and number of GPUs are read
from the file in `accelerate_configs/` that the command in the recipe's head names. The size of the clips is read from
the recipe's name.
"""

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hy_prfl.configs.base import TrainingConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.plan import PlanConfig
from hy_prfl.planning import Plan, plan
from hy_prfl.runtime.atomic_writes import write_text
from hy_prfl.scripts.plan import read_recipe


ROOT = Path(__file__).parents[2]
FOLDERS = {"prfl": "Generators", "reward": "Reward models"}
# Height, width and frames of the clips, by a word in the recipe's name.
CLIPS = {"480p": (480, 832, 81), "720p": (720, 1280, 81), "704": (704, 1280, 121)}
# Memory of a GPU in GB, unless the name has another.
GPU_MEMORY = 80.0

PAGE = """# Recipes

Every recipe for training in [`examples/`](../examples/README.md), and what it needs. Written by `make recipes` from the recipes
and from `hy-prfl plan`; a test computes all of it again. **Planned, not measured on a GPU**: [real_size.md](real_size.md) has what
the trainers' own code allocates and computes in one step.

- **GPU**: GB of each GPU, 3 of them assumed for CUDA and fragmentation. **Host**: GB of host memory of all processes together,
  without Python itself. **Disk**: GB of the checkpoints that exist at a time.
- **Update**: seconds at 40 % of an H100's peak, without communication.
- Clips have 81 frames of 480 x 832 (480P) or 720 x 1280 (720P), those of TI2V 5B 121 frames of 704 x 1280.
- The options for the datasets, which the launch command here leaves out, are in the head of the recipe. `hy-prfl plan --config
  RECIPE` with `--height`, `--width`, `--num_gpus`, `--zero_stage` and any option of the recipe says what a change would need.
"""


@dataclass(kw_only=True)
class RecipesConfig:
    """Options of the page."""

    output: str = field(default=str(ROOT / "docs" / "recipes.md"), metadata={"help": "File to write the page to."})


@dataclass(frozen=True)
class Recipe:
    """
    A recipe, its engine and its size.

    Args:
        path (`Path`):
            Its file.
        training (`TrainingConfig`):
            Its options.
        engine (`str`):
            Name of the file in `accelerate_configs/` that its head names, without `.yaml`.
        num_gpus, zero_stage, offload:
            Settings in that file, see [`~hy_prfl.planning.plan`].
        height, width, num_frames (`int`):
            Size of its clips in pixels and frames.
        gpu_memory (`float`):
            GB of a GPU.
    """

    path: Path
    training: TrainingConfig
    engine: str
    num_gpus: int
    zero_stage: int
    offload: bool
    height: int
    width: int
    num_frames: int
    gpu_memory: float

    @property
    def name(self) -> str:
        """Folder and file, as in `prfl/wan2.1_t2v_14b_480p_lora`."""
        return f"{self.path.parent.name}/{self.path.stem}"

    @property
    def link(self) -> str:
        """Link to it from a page in `docs/`."""
        return f"[`{self.name}`](../examples/{self.name}.yaml)"

    @property
    def engine_name(self) -> str:
        """Engine, and the degree of context parallelism if it is above 1."""
        degree = self.training.context_parallel_degree
        return self.engine + (f", context parallel {degree}" if degree > 1 else "")


def recipe_paths() -> list[Path]:
    """Files of all recipes for training."""
    return sorted(path for folder in FOLDERS for path in (ROOT / "examples" / folder).glob("*.yaml"))


def read_head(path: Path) -> tuple[str, list[str]]:
    """Purpose of a recipe, and the words of its launch command, from the comment at its head."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    head = " ".join(line.removeprefix("#").strip().removesuffix("\\").strip() for line in lines)
    purpose, launch, options = head.partition("accelerate launch ")
    if not launch:
        raise ValueError(f"{path}: its head has no `accelerate launch` command.")
    return purpose.strip().removesuffix("."), (launch + options).split()


@functools.cache
def load_recipe(path: Path) -> Recipe:
    """
    Read a recipe.

    Raises:
        ValueError: If its head has no command, or its name no size.
    """
    _, words = read_head(path)
    accelerate_config = ROOT / words[words.index("--config_file") + 1]
    launch = yaml.safe_load(accelerate_config.read_text(encoding="utf-8"))
    zero: dict[str, Any] = {"stage": 0}
    if "deepspeed_config" in launch:
        deepspeed_config = ROOT / launch["deepspeed_config"]["deepspeed_config_file"]
        zero = json.loads(deepspeed_config.read_text(encoding="utf-8"))["zero_optimization"]
    sizes = [CLIPS[word] for word in path.stem.split("_") if word in CLIPS]
    if len(sizes) != 1:
        raise ValueError(f"{path}: its name must contain one of {', '.join(CLIPS)}.")
    ((height, width, num_frames),) = sizes
    frames = re.search(r"_(\d+)frames(?:_|$)", path.stem)
    memory = re.search(r"_(\d+)gb(?:_|$)", path.stem)
    training = read_recipe(PlanConfig(recipe=str(path)), [])
    return Recipe(
        path=path,
        training=training,
        engine=accelerate_config.stem,
        num_gpus=launch["num_processes"],
        zero_stage=zero["stage"],
        offload="offload_optimizer" in zero,
        height=height,
        width=width,
        num_frames=int(frames[1]) if frames else num_frames,
        gpu_memory=float(memory[1]) if memory else GPU_MEMORY,
    )


@functools.cache
def plan_recipe(path: Path) -> Plan:
    """Plan of a recipe."""
    recipe = load_recipe(path)
    return plan(
        recipe.training,
        height=recipe.height,
        width=recipe.width,
        num_frames=recipe.num_frames,
        num_gpus=recipe.num_gpus,
        zero_stage=recipe.zero_stage,
        offload=recipe.offload,
        gpu_memory=recipe.gpu_memory,
    )


def table_row(path: Path) -> str:
    """A recipe's row of the page."""
    recipe, planned = load_recipe(path), plan_recipe(path)
    purpose, words = read_head(path)
    # Without the datasets, which follow the recipe.
    launch = " ".join(words[: words.index("--config") + 2])
    disk = "all are kept"
    if planned.num_checkpoints is not None:
        disk = f"{planned.num_checkpoints * planned.checkpoint:,.0f}"
    cells = [
        recipe.link,
        purpose,
        f"{recipe.num_gpus} x {recipe.gpu_memory:g} GB",
        recipe.engine_name,
        f"{planned.peak:.1f}",
        f"{recipe.num_gpus * planned.host_peak:,.0f}",
        disk,
        f"{planned.seconds_per_step:,.0f}",
        f"`{launch}`",
    ]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The page, with a table for each folder."""
    parts = [PAGE]
    for folder, title in FOLDERS.items():
        rows = [table_row(path) for path in recipe_paths() if path.parent.name == folder]
        header = "| recipe | what for | GPUs | engine | GPU | host | disk | update | launch |"
        parts.append("\n".join([f"## {title}", "", header, "|---" * 9 + "|", *rows, ""]))
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    config = parse_config(RecipesConfig, description=__doc__)
    write_text(Path(config.output), page())


if __name__ == "__main__":
    main()
