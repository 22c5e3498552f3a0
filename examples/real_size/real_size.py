"""
Checks that every recipe runs at its real size and needs what the planner says: `make real-size`, or

    python -m examples.real_size.real_size

Runs one step of the trainers' own code for each recipe in `examples/prfl` and `examples/reward`, with its size and
engine, on a pretended CUDA device (see `pretended_cuda.py`). Needs no GPU and no weights; each recipe takes 10 to 90
seconds and 2 GB. What is an error on CUDA is an error here. Measurements are written to `results.json`, and to
`docs/real_size.md` beside the planner's figures. Ends with an error if a recipe fails, or differs from the plan by
more than the bounds below. A recipe that was measured with the same options is measured again only with `--fresh`.
Needs `g++`.
"""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.real_size.library import compile_library
from examples.real_size.recipes import ROOT, Recipe, load_recipe, plan_recipe, recipe_paths
from hy_prfl.configs.parser import parse_config
from hy_prfl.planning.estimate import forwards_without_gradient
from hy_prfl.runtime.atomic_writes import write_text


RESULTS = Path(__file__).with_name("results.json")
# Largest relative difference from the plan.
MEMORY_BOUND, PART_BOUND = 0.03, 0.15
# Each rank that shares a clip embeds the whole text and all patches. The planner divides this work among the ranks.
FLOPS_BOUND, SHARED_FLOPS_BOUND = 0.01, 0.02
# How often the host may wait for the device in a step: it checks that each loss and each gradient norm is finite. With
# two experts it also reads the timestep of each rollout step, to choose the expert.
MOST_SYNCS = 8
# Memory of the engine, which is not part of the measurement.
ENGINE_PARTS = ("weights", "gradients", "optimizer states", "gradient buckets", "gathered weights")
FROZEN_PARTS = ("reward model", "reward model, gathered", "frozen expert")
PAGE_LOCKED_PARTS = ("block inputs", "reward model in host memory")
# Options that do not change a step.
PATHS = {"output_dir", "train_dataset", "reward_model"}
LIBRARIES = ("torch", "diffusers", "accelerate", "peft")

PAGE = f"""# One step of every recipe at its real size

Written by `make real-size` from [`results.json`](../examples/real_size/results.json), which the same command measures; a test
computes the planner's columns again. **No GPU was used**: the trainers' own code ran a step of each recipe at its real size on a
[pretended CUDA device](../examples/real_size/README.md), whose tensors have a shape, a type and a device, but no data. What is
an error on CUDA is an error there. Allocated memory and FLOPs are counted independently of `hy-prfl plan`.

- **Step**: GB at the peak of the step, measured and planned, and the ratio. In one process and under DDP it is all memory of the
  GPU except the 3 GB that the planner assumes for CUDA. Under ZeRO, and with sharded frozen models, it is the memory without
  weights, gradients and optimizer states, because these are not sharded here. Bounds: {MEMORY_BOUND:.0%}, and {PART_BOUND:.0%} for such a part.
- **TFLOP**: FLOPs of a GPU in the step, measured and planned. Before the step the generator walks to the second noise level that
  may be drawn, also where a recipe reuses rollouts. Bounds: {FLOPS_BOUND:.0%}, with context parallelism
  {SHARED_FLOPS_BOUND:.0%}.
- **Page-locked**: GB of host memory for offloaded block inputs and an offloaded reward model, measured and planned.
- **Syncs**: how often the host waited for the device: for the finiteness of losses and gradient norms, at most {MOST_SYNCS} times. With
  two experts also at each rollout step, whose timestep chooses the expert.
- **GPU**, **host** and **disk** are the planner's for the whole run: GB of each GPU, of host memory of each process, of a checkpoint.

Not included: NCCL, cuDNN's workspaces, fragmentation, and the values of tensors.
"""
HEADER = (
    "| recipe | engine | step, measured | planned | ratio | TFLOP, measured | planned | page-locked, measured | planned "
    "| syncs | GPU | host | disk |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(kw_only=True)
class RealSizeConfig:
    """Options of the check."""

    recipes: list[str] = field(default_factory=list, metadata={"help": "Recipes to run; all if left out."})
    results: str = field(default=str(RESULTS), metadata={"help": "JSON file of the measurements."})
    page: str = field(default=str(ROOT / "docs" / "real_size.md"), metadata={"help": "File to write the page to."})
    build_dir: str = field(default="outputs/real_size", metadata={"help": "Folder for the compiled device."})
    fresh: bool = field(default=False, metadata={"help": "Measure recipes again that have been measured."})


def options_of(recipe: Recipe) -> dict[str, Any]:
    """Options that a recipe sets, and its engine and size. A measurement is valid as long as these are the same."""
    options = {
        option.name: getattr(recipe.training, option.name)
        for option in dataclasses.fields(recipe.training)
        if option.name not in PATHS and getattr(recipe.training, option.name) != _default(option)
    }
    names = ("num_gpus", "zero_stage", "height", "width", "num_frames")
    return {**{name: getattr(recipe, name) for name in names}, **options}


def _default(option: dataclasses.Field) -> Any:
    factory = option.default_factory
    return option.default if factory is dataclasses.MISSING else factory()


def compare(path: Path, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a measurement with the plan. Not in a process with the pretended device: the plan is made on the CPU."""
    recipe, planned = load_recipe(path), plan_recipe(path)
    training = recipe.training
    # The measured step keeps no averaged weights.
    average = planned.memory.get("averaged weights", 0.0)
    expected, found = planned.peak - planned.reserved - average, measured["peak"] / 1e9
    is_sharded = getattr(training, "shard_reward_model", False) or getattr(training, "shard_frozen_expert", False)
    is_part = recipe.zero_stage > 0 or is_sharded
    if is_part:
        # The measured weights are not sharded, and there is no engine. So only the rest is compared.
        parts = ENGINE_PARTS if recipe.zero_stage else ("weights",)
        found -= measured["weights"] / 1e9
        expected -= sum(planned.memory.get(name, 0.0) for name in (*parts, *FROZEN_PARTS))
    from hy_prfl.formats.pipeline_info import PipelineInfo

    info = PipelineInfo.known(training.pretrained_model_name_or_path)
    chooses = measured["step_range"] is not None and info.has_two_experts
    return {
        "is_part": bool(is_part),
        "is_shared": training.context_parallel_degree > 1,
        "most_syncs": MOST_SYNCS + (measured["step_range"][0] + 2 if chooses else 0),
        "measured": found,
        "planned": expected,
        "measured_teraflops": measured["flops"] / 1e12,
        "planned_teraflops": expected_teraflops(training, planned.teraflops, measured["step_range"]),
        "num_syncs": measured["num_syncs"],
        "sync_places": measured["sync_places"],
        "host_buffers": measured["host_buffers"] / 1e9,
        "planned_host_buffers": sum(planned.host_memory.get(name, 0.0) for name in PAGE_LOCKED_PARTS),
    }


def expected_teraflops(training: Any, planned: Mapping[str, float], step_range: Sequence[int] | None) -> float:
    """FLOPs of one GPU in the measured step, in 10^12, computed from those of a whole planned step."""
    share = training.gradient_accumulation_steps * training.context_parallel_degree
    rest = sum(value for name, value in planned.items() if name != "rollout")
    if step_range is None:
        return rest / share
    # The measured step is preceded by a rollout up to the second step that may take gradient, also where rollouts are
    # reused. With `rerun_gradient_step`, the step is first run without gradient.
    first, last = step_range
    forwards = first + 1 + int(training.rerun_gradient_step)
    return (rest + planned["rollout"] * forwards / forwards_without_gradient(training, first, last)) / share


def faults(result: Mapping[str, Any]) -> list[str]:
    """List what is wrong in the comparison of a recipe."""
    bounds = {
        ("measured", "planned"): PART_BOUND if result["is_part"] else MEMORY_BOUND,
        ("measured_teraflops", "planned_teraflops"): SHARED_FLOPS_BOUND if result["is_shared"] else FLOPS_BOUND,
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


def table_row(path: Path, measured: Mapping[str, Any]) -> str:
    """A recipe's row of the page."""
    recipe, planned, result = load_recipe(path), plan_recipe(path), compare(path, measured)
    cells = [
        recipe.link,
        recipe.engine_name,
        f"{result['measured']:.1f}",
        f"{result['planned']:.1f}",
        f"{result['measured'] / result['planned']:.2f}",
        f"{result['measured_teraflops']:,.0f}",
        f"{result['planned_teraflops']:,.0f}",
        f"{result['host_buffers']:.1f}",
        f"{result['planned_host_buffers']:.1f}",
        str(result["num_syncs"]),
        f"{planned.peak:.1f}",
        f"{planned.host_peak:.1f}",
        f"{planned.checkpoint:,.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def page(results: Mapping[str, Any]) -> str:
    """The page: a row for each recipe that has been measured."""
    rows = [
        table_row(path, results["recipes"][load_recipe(path).name])
        for path in recipe_paths()
        if load_recipe(path).name in results["recipes"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["libraries"].items())
    return "\n".join([PAGE, f"Measured with {versions}.", "", HEADER, *rows, ""])


def measure_recipes(paths: Sequence[Path], library: Path) -> Iterator[dict[str, Any]]:
    """
    Run a step of each recipe, each in its own process.

    Yields:
        The fields of `steps.Measurement`, or the traceback as `error`, in the order of `paths`.
    """
    module = "examples.real_size.pretending"
    command = [sys.executable, "-m", module, str(library.resolve()), *(str(path) for path in paths)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for path in paths:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{module} ended with {process.wait()} before {path}.")
        yield json.loads(line)
    process.wait()


def read_results(path: Path) -> dict[str, Any]:
    """Earlier measurements; none, if they were made with other versions of the libraries."""
    libraries = {name: importlib.metadata.version(name).split("+")[0] for name in LIBRARIES}
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get("libraries") != libraries:
        return {"libraries": libraries, "recipes": {}}
    return known


def main() -> None:
    """Run the recipes, write results and page, and print what is wrong."""
    config = parse_config(RealSizeConfig, description=__doc__)
    results_file = Path(config.results)
    paths = [Path(name).resolve() for name in config.recipes] or recipe_paths()
    results = read_results(results_file)
    recipes: dict[str, Any] = results["recipes"]
    names = {path: load_recipe(path).name for path in paths}
    stale = [
        path
        for path in paths
        if config.fresh or recipes.get(names[path], {}).get("options") != options_of(load_recipe(path))
    ]
    failed: dict[str, str] = {}
    if stale:
        library = compile_library(Path(config.build_dir))
        for path, measured in zip(stale, measure_recipes(stale, library), strict=True):
            recipes.pop(names[path], None)
            if "error" in measured:
                failed[names[path]] = measured["error"]
                print(f"{names[path]}:\n{measured['error']}", flush=True)
                continue
            recipes[names[path]] = {"options": options_of(load_recipe(path)), **measured}
            write_text(results_file, json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(f"{names[path]}: measured", flush=True)
    write_text(Path(config.page), page(results))
    differing = {name: faults(compare(path, recipes[name])) for path, name in names.items() if name not in failed}
    for name, found in differing.items():
        print(f"{name}: {'; '.join(found) or 'as planned'}")
    num_wrong = len(failed) + sum(map(bool, differing.values()))
    print(f"{config.page}: {len(paths) - num_wrong} of {len(paths)} recipes run as planned.")
    if num_wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
