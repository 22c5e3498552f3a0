"""
Does every recipe run at its real size, and does it need what the planner says? `make real-size`, or

    python -m examples.real_size.real_size

Runs one step of the trainers' own code for each recipe under `examples/prfl` and `examples/reward`, at the size and on the
engine that its head names, on a pretended CUDA device (see `pretended_cuda.py`): no GPU, no weights, about a minute and
2 GB for each. A step that CUDA would refuse is refused here. It writes `outputs/real_size/results.json` and a table beside
it, and ends with an error if a recipe fails, or differs from the plan by more than the bounds below. Needs `g++`.
"""

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.real_size.library import compile_library
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.plan import PlanConfig
from hy_prfl.scripts.plan import read_recipe, split_options


ROOT = Path(__file__).parents[2]
RECIPE_FOLDERS = ("examples/prfl", "examples/reward")
# Largest relative difference from the plan.
MEMORY_BOUND, SHARED_MEMORY_BOUND = 0.03, 0.25
# Ranks that share a clip all embed the whole text and all patches, which the planner divides among them.
FLOPS_BOUND, SHARED_FLOPS_BOUND = 0.01, 0.02
# Waits of the host for the device in a step: finiteness of each loss and of each gradient norm. In a pipeline of two
# experts also one for each rollout step, whose timestep chooses the expert.
MOST_SYNCS = 8
# What an engine holds of its own, which is not there on the pretended device.
ENGINE_PARTS = ("weights", "gradients", "optimizer states", "gradient buckets", "gathered weights")
FROZEN_PARTS = ("reward model", "reward model, gathered", "frozen expert")
# Starts one recipe's run in a process of its own.
ADDRESS_SPACE = 12 << 30


@dataclass(kw_only=True)
class RealSizeConfig:
    """Options of the check."""

    recipes: list[str] = field(default_factory=list, metadata={"help": "Recipes to run; all if left out."})
    output_dir: str = field(default="outputs/real_size", metadata={"help": "Folder of the results."})


def plan_command(recipe: Path) -> list[str]:
    """The options of `hy-prfl plan` in a recipe's head."""
    lines = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    head = " ".join(line.removeprefix("#").strip().removesuffix("\\").strip() for line in lines)
    (command,) = re.findall(r"hy-prfl plan (.*?--num_rows \d+)", head)
    return command.split()


def read_head(recipe: Path) -> tuple[PlanConfig, Any]:
    """What a recipe's head plans for: the clips and the machine, and the recipe itself."""
    own, others = split_options(plan_command(recipe))
    config = parse_config(PlanConfig, own)
    return config, read_recipe(config, others)


def make_setting(config: PlanConfig, training: Any) -> Any:
    """What `measure` is told."""
    from examples.real_size.steps import Setting
    from hy_prfl.planning.models import load_experts, load_transformer_config, load_vae_stride

    path = training.pretrained_model_name_or_path
    transformer_config, (frames, rows, columns) = load_transformer_config(path), load_vae_stride(path)
    return Setting(
        training=training,
        transformer_config=transformer_config,
        experts=load_experts(path, training.expert),
        latents_shape=(
            transformer_config["out_channels"],
            (config.num_frames - 1) // frames + 1,
            config.height // rows,
            config.width // columns,
        ),
        zero_stage=config.zero_stage,
        num_gpus=config.num_gpus,
        first_frame=config.first_frame,
    )


def measure_recipe(recipe: Path) -> dict[str, Any]:
    """Run a step of a recipe, in a process that pretends to have a CUDA device."""
    from examples.real_size.steps import measure

    return dataclasses.asdict(measure(make_setting(*read_head(recipe))))


def compare(recipe: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """What was measured beside what the planner says. Not in a process that pretends: the plan is made on the CPU."""
    from hy_prfl.planning import plan
    from hy_prfl.planning.models import load_experts

    config, training = read_head(recipe)
    planned = plan(
        training,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        num_gpus=config.num_gpus,
        zero_stage=config.zero_stage,
        first_frame=config.first_frame,
    )
    # No average of the weights is kept here.
    average = planned.memory.get("averaged weights", 0.0)
    expected, found = planned.peak - planned.reserved - average, measured["peak"] / 1e9
    is_split = getattr(training, "shard_reward_model", False) or getattr(training, "shard_frozen_expert", False)
    if config.zero_stage or is_split:
        # Weights are whole on the pretended device, and an engine holds nothing there: the rest is compared.
        parts = ENGINE_PARTS if config.zero_stage else ("weights",)
        found -= measured["weights"] / 1e9
        expected -= sum(planned.memory.get(name, 0.0) for name in (*parts, *FROZEN_PARTS))
    experts = load_experts(training.pretrained_model_name_or_path, training.expert)
    choose_experts = measured["step_range"] is not None and experts.are_two
    return {
        "recipe": str(recipe.relative_to(ROOT)),
        "zero_stage": config.zero_stage,
        "is_split": bool(is_split),
        "most_syncs": MOST_SYNCS + (measured["step_range"][0] + 2 if choose_experts else 0),
        "context_parallel_degree": training.context_parallel_degree,
        "planned_peak": planned.peak,
        "host_memory": planned.host_peak,
        "checkpoint": planned.checkpoint,
        "measured": found,
        "planned": expected,
        "measured_teraflops": measured["flops"] / 1e12,
        "planned_teraflops": expected_teraflops(training, planned.teraflops, measured["step_range"]),
        "num_syncs": measured["num_syncs"],
        "sync_places": measured["sync_places"],
        "host_buffers": measured["host_buffers"] / 1e9,
        "planned_host_buffers": planned.host_memory.get("block inputs", 0.0),
    }


def expected_teraflops(training: Any, planned: dict[str, float], step_range: list[int] | None) -> float:
    """Operations of one GPU in the step that was run, made of those of a whole planned step."""
    share = training.gradient_accumulation_steps * training.context_parallel_degree
    rest = sum(value for name, value in planned.items() if name != "rollout")
    if step_range is None:
        return rest / share
    first, last = step_range
    return (rest + planned["rollout"] * (first + 1) / ((first + last) / 2)) / share


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong with a recipe's result."""
    if "error" in result:
        return [result["error"].splitlines()[-1]]
    is_shared = result["context_parallel_degree"] > 1
    is_part = is_shared or result["zero_stage"] > 0 or result["is_split"]
    bounds = {
        ("measured", "planned"): SHARED_MEMORY_BOUND if is_part else MEMORY_BOUND,
        ("measured_teraflops", "planned_teraflops"): SHARED_FLOPS_BOUND if is_shared else FLOPS_BOUND,
        ("host_buffers", "planned_host_buffers"): MEMORY_BOUND,
    }
    found = []
    for (measured, planned), bound in bounds.items():
        one, other = result[measured], result[planned]
        if abs(one - other) > bound * max(one, other):
            found.append(f"{measured} {one:.4g}, {planned} {other:.4g}")
    if result["num_syncs"] > result["most_syncs"]:
        found.append(f"{result['num_syncs']} waits for the device: {result['sync_places']}")
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| recipe | engine | GB of a GPU, planned | step at real size, GB | planned | TFLOP | planned | host GB | checkpoint GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        name = f"`{result['recipe'].removeprefix('examples/').removesuffix('.yaml')}`"
        if "error" in result:
            lines.append(f"| {name} | | | {result['error'].splitlines()[-1]} | | | | | |")
            continue
        engine = f"ZeRO-{result['zero_stage']}" if result["zero_stage"] else "one process or DDP"
        degree = result["context_parallel_degree"]
        engine += f", context parallel {degree}" if degree > 1 else ""
        lines.append(
            f"| {name} | {engine} | {result['planned_peak']:.1f} | {result['measured']:.1f} | {result['planned']:.1f} "
            f"| {result['measured_teraflops']:.0f} | {result['planned_teraflops']:.0f} | {result['host_memory']:.0f} "
            f"| {result['checkpoint']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def run_in_process(recipe: Path, library: Path) -> dict[str, Any]:
    """Run one recipe in a process of its own, so that a tensor that is not fake ends that process only."""
    program = (
        "import json, pathlib, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({ADDRESS_SPACE}, {ADDRESS_SPACE}))\n"
        "from examples.real_size.library import load_library\n"
        "load_library(pathlib.Path(sys.argv[1]))\n"
        "from examples.real_size.pretended_cuda import start\n"
        "start()\n"
        "from examples.real_size.real_size import measure_recipe\n"
        "print(json.dumps(measure_recipe(pathlib.Path(sys.argv[2]))))\n"
    )
    command = [sys.executable, "-c", program, str(library.resolve()), str(recipe)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        return {"recipe": str(recipe.relative_to(ROOT)), "error": finished.stderr.strip()}
    return compare(recipe, json.loads(finished.stdout.splitlines()[-1]))


def main() -> None:
    """Run the recipes, write the results and say what is wrong."""
    config = parse_config(RealSizeConfig, description=__doc__)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    recipes = [Path(name).resolve() for name in config.recipes]
    recipes = recipes or sorted(path for folder in RECIPE_FOLDERS for path in (ROOT / folder).glob("*.yaml"))
    # Quantised weights are tensors of torchao or bitsandbytes, which have no fake ones.
    quantized = [recipe for recipe in recipes if "_quantization:" in recipe.read_text(encoding="utf-8")]
    recipes = [recipe for recipe in recipes if recipe not in quantized]
    for recipe in quantized:
        print(f"{recipe.relative_to(ROOT)}: left out, its weights are quantised", flush=True)
    library = compile_library(output_dir / "build")
    results, wrong = [], 0
    for recipe in recipes:
        result = run_in_process(recipe, library)
        results.append(result)
        (output_dir / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        found = faults(result)
        wrong += bool(found)
        print(f"{result['recipe']}: {'; '.join(found) or 'as planned'}", flush=True)
    (output_dir / "results.md").write_text(table(results), encoding="utf-8")
    print(f"{output_dir / 'results.md'}: {len(results) - wrong} of {len(results)} recipes run as planned.")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
