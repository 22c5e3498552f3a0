r"""
Estimates what a recipe needs: memory of each GPU, FLOPs and time of a step, and what to change if it does not fit.

    hy-prfl plan --config examples/prfl/wan2.1_t2v_14b_480p_full.yaml --num_gpus 8 --zero_stage 3 --gpu_memory 80

This needs no GPU, no weights and no data. You can try options of the recipe on the command line:

    hy-prfl plan --config examples/prfl/wan2.1_t2v_14b_480p_full.yaml --height 720 --width 1280 --num_gpus 8 \
        --zero_stage 3 --context_parallel_degree 8 --offload_activations true

The cost of candidates compared to plain sampling, for the size of the videos in the recipe:

    hy-prfl plan --config examples/generate/wan2.1_t2v_14b_480p.yaml --num_candidates 8 --keep 10:4,20:1
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.base import Config, TrainingConfig, check
from ..configs.generate import GenerateConfig
from ..configs.inputs import check_sources
from ..configs.outputs import check_output_files
from ..configs.parser import parse_config
from ..configs.plan import PlanConfig
from ..configs.prfl import PRFLTrainingConfig
from ..configs.reward import RewardTrainingConfig
from ..configs.yaml_file import read_yaml
from .running import run


if TYPE_CHECKING:
    from ..planning import Plan
    from ..planning.generation import GenerationPlan

CONFIGS: dict[str, type[Config]] = {
    "train_prfl": PRFLTrainingConfig,
    "train_reward": RewardTrainingConfig,
    "generate": GenerateConfig,
}
# Required options of a run that a plan does not need.
PLACEHOLDERS = {
    "train_prfl": ("output_dir", "train_dataset", "reward_model"),
    "train_reward": ("output_dir", "train_dataset"),
    "generate": ("output_dir", "prompts"),
}
# Options of both `plan` and `generate`.
SIZE = ("height", "width", "num_frames")


def main(argv: Sequence[str] | None = None) -> None:
    """Plan one recipe."""
    own, others = separate_options(sys.argv[1:] if argv is None else argv)
    config = parse_config(PlanConfig, own, description=__doc__)
    training = read_recipe(config, others, argv=own)
    check_sources(training, "pretrained_model_name_or_path")
    check_output_files(config, "output")
    if isinstance(training, GenerateConfig):
        plan_generate(config, training)
        return
    assert isinstance(training, TrainingConfig)
    degree, num_gpus = training.context_parallel_degree, config.num_gpus
    check(num_gpus % degree == 0, "context_parallel_degree", degree, f"a divisor of `num_gpus`, {num_gpus}")
    print(f"Planning {Path(config.recipe)} ...", file=sys.stderr, flush=True)

    # Imported here, so that a misspelt option is reported before torch is loaded.
    from ..models.loading import read_reward_config
    from ..models.shared_backbone import group_folders
    from ..planning import plan
    from ..runtime.messages import set_up_logging

    set_up_logging()
    reward_config, shared_backbones = None, None
    if isinstance(training, PRFLTrainingConfig):
        option = "reward_model" if training.reward_models is None else "reward_models"
        folders = [source if Path(source).is_dir() else None for source in training.reward_sources]
        reward_config = [None if folder is None else read_reward_config(folder, option=option) for folder in folders]
        shared_backbones = group_folders(folders)
    result = plan(
        training,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        num_gpus=config.num_gpus,
        gpu_memory=config.gpu_memory,
        zero_stage=config.zero_stage,
        offload=config.offload,
        tflops=config.tflops,
        utilization=config.utilization,
        reserved=config.reserved_memory,
        num_rows=config.num_rows,
        first_frame=config.first_frame,
        reward_config=reward_config,
        shared_backbones=shared_backbones,
    )
    show(config, result)


def plan_generate(config: PlanConfig, generation: GenerateConfig) -> None:
    """Plan one recipe of `generate`."""
    for name in ("num_gpus", "zero_stage", "offload", "num_rows"):
        value, default = getattr(config, name), PlanConfig.__dataclass_fields__[name].default
        check(value == default, name, value, "left out for `generate`: each of its processes makes its own videos")
    print(f"Planning {Path(config.recipe)} ...", file=sys.stderr, flush=True)

    from ..models.loading import read_reward_config
    from ..planning.generation import plan_generation
    from ..runtime.messages import set_up_logging

    set_up_logging()
    reward_config = None
    if generation.reward_model is not None and Path(generation.reward_model).is_dir():
        reward_config = read_reward_config(generation.reward_model, option="reward_model")
    result = plan_generation(
        generation,
        gpu_memory=config.gpu_memory,
        tflops=config.tflops,
        utilization=config.utilization,
        reserved=config.reserved_memory,
        reward_config=reward_config,
    )
    show(config, result)


def show(config: PlanConfig, result: "Plan | GenerationPlan") -> None:
    """Print a plan, and write it to `output` if that is given."""
    from ..runtime.atomic_writes import write_text

    print(result)
    if config.output is not None:
        output = Path(config.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, result.to_json())


def separate_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of `plan`, with `--config` renamed to `--recipe`, and the options of the recipe."""
    names = {field.name for field in dataclasses.fields(PlanConfig)}
    own: list[str] = []
    others: list[str] = []
    target = own
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            name = name.replace("-", "_")
            word = f"--recipe{equals}{value}" if name == "config" else word
            target = own if name in names or name in ("config", "help") else others
        target.append(word)
    return own, others


def read_recipe(config: PlanConfig, options: Sequence[str], *, argv: Sequence[str] = ()) -> Any:
    """
    The recipe with `options`, which replace its values. Options that only a run needs may be missing.

    Args:
        argv (`Sequence[str]`):
            Options of `plan` from the command line. A size in them also replaces that of a recipe of `generate`.

    Raises:
        ValueError: If its keys fit none or several of the commands.
    """
    path = Path(config.recipe)
    given = read_yaml(path) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a mapping of field names to values, got {type(given).__name__}.")
    fields = {name: {field.name for field in dataclasses.fields(each)} for name, each in CONFIGS.items()}
    command: str | None = config.recipe_command
    if command is None:
        # Some fields, such as `reward_model`, belong to all commands.
        fitting = [name for name in CONFIGS if set(given) <= fields[name]]
        if len(fitting) != 1:
            raise ValueError(
                f"{path}: its keys do not fit exactly one of {', '.join(CONFIGS)}; give `--recipe_command`."
            )
        command = fitting[0]
    names = {
        word.removeprefix("--").split("=")[0].replace("-", "_") for word in (*options, *argv) if word.startswith("--")
    }
    present = {*given, *names}
    if "reward_models" in present:
        present.add("reward_model")
    placeholders = [f"--{name}=planned" for name in PLACEHOLDERS[command] if name not in present]
    if command == "generate":
        placeholders += [f"--{name}={getattr(config, name)}" for name in SIZE if name in names]
        if {"num_candidates", "reward_guidance"} & present and "reward_model" not in present:
            placeholders.append("--reward_model=planned")
    return parse_config(CONFIGS[command], ["--config", str(path), *placeholders, *options])


if __name__ == "__main__":
    run(main)
