"""
Checks one GPU against the planner: `make gpu-check`, or

    python -m examples.gpu_check.gpu_check
    python -m examples.gpu_check.gpu_check --device cpu --sizes tiny     # to try it out, a minute or two

Takes less than 15 minutes on one H100 with 80 GB (estimated). It lists what is installed and runs: a large matrix
product, NCCL with one process, the VAE, the text encoder, a training step of 1.3B with all weights, training steps of
14B with LoRA (480P, 480P with an int8 base, 720P), and the tests in bfloat16. Weights are random; nothing is
downloaded. The models are those of the benchmark, the trainer is the real one. Memory is compared with `hy-prfl plan`,
speed with the matrix product. Writes `results.json`, and `results.md` to paste into an issue, to `outputs/gpu_check`.
Without a GPU it prints what it would do.

Needs 45 GB of disk for the weights of 14B in bfloat16, and keeps them for the next run.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config


# Largest relative difference between planned and measured memory of a training step.
MEMORY_BOUND = 0.1
# To estimate seconds: peak of an H100, share of it that a step reaches, and seconds to make and load each GB of a
# model.
PEAK_TERAFLOPS, UTILIZATION, SECONDS_PER_GIGABYTE = 989.0, 0.4, 1.5
# Estimated seconds of the steps without training on an H100, and seconds to start the process of a step.
OTHER_SECONDS = {
    "environment": 20, "matmul": 10, "communication": 10, "VAE": 30, "text encoder": 30, "bfloat16 tests": 200,
}  # fmt: skip
START_SECONDS = 15.0


@dataclass(kw_only=True)
class GPUCheckConfig:
    """Options of the check."""

    output_dir: str = field(default="outputs/gpu_check", metadata={"help": "Folder for models and results."})
    device: Literal["cuda", "cpu"] = field(default="cuda", metadata={"help": "Device of the check."})
    sizes: Literal["real", "tiny"] = field(default="real", metadata={"help": "Size of models and clips."})
    steps: list[str] = field(default_factory=list, metadata={"help": "Steps to run; all if left out."})
    tests: bool = field(default=True, metadata={"help": "Also run the tests in bfloat16; on a GPU only."})
    minutes: float = field(
        default=15.0, metadata={"help": "A step that is not expected to end within this time is skipped."}
    )

    def __post_init__(self) -> None:
        check(self.minutes > 0, "minutes", self.minutes, "greater than 0")
        fits = self.device == "cuda" or self.sizes == "tiny"
        check(fits, "sizes", self.sizes, "tiny on the CPU: a step of 14B would take days")


def expectations(sizes: str) -> dict[str, dict[str, float]]:
    """Expected seconds and gigabytes of each step on an H100, from the planner."""
    from examples.gpu_check.steps import CHAIN, SCALES
    from hy_prfl.configs.prfl import PRFLTrainingConfig
    from hy_prfl.formats.pipeline_info import PUBLISHED
    from hy_prfl.planning import plan

    expected: dict[str, dict[str, float]] = {
        name: {"seconds": START_SECONDS + value} for name, value in OTHER_SECONDS.items()
    }
    for name, what in SCALES[sizes].trainings.items():
        if sizes == "tiny":
            expected[name] = {"seconds": 20.0}
            continue
        models = {"1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}
        model = models[what.size]
        assert model in PUBLISHED
        options = {**what.case.options, "gradient_accumulation_steps": 1, "num_inference_steps": CHAIN}
        training = PRFLTrainingConfig(
            output_dir="-", pretrained_model_name_or_path=model, train_dataset="-", reward_model="-", **options
        )
        planned = plan(
            training, height=what.clip.height, width=what.clip.width, num_frames=what.clip.num_frames, reserved=0,
            tflops=PEAK_TERAFLOPS, utilization=UTILIZATION,
        )  # fmt: skip
        loading = SECONDS_PER_GIGABYTE * 2 * planned.num_parameters / 1e9
        seconds = START_SECONDS + planned.seconds_per_step + loading
        expected[name] = {"seconds": seconds, "gigabytes": planned.peak}
    return expected


def faults(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the results, one line each."""
    found = []
    for name, result in results.items():
        if "error" in result:
            found.append(f"{name}: {result['error']}")
        for key, expected in (("is_exact", True), ("is_finite", True), ("passed", True)):
            if result.get(key, expected) is not expected:
                found.append(f"{name}: {key} is {result[key]}")
        for part, inner in result.items():
            if isinstance(inner, dict) and inner.get("is_finite") is False:
                found.append(f"{name}: {part} gives a NaN or an infinity")
        if "teraflops" in result:
            own, planned = result["gigabytes"], result["planned_gigabytes"]
            if abs(own - planned) > MEMORY_BOUND * planned:
                found.append(f"{name}: {own:.3g} GB, planned {planned:.3g}")
            if not all(value == value and abs(value) != float("inf") for value in result["metrics"].values()):
                found.append(f"{name}: metrics {result['metrics']}")
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as Markdown."""
    around, rows = results.get("environment", {}), []
    best = results.get("matmul", {}).get("teraflops_per_second")
    gpu = around.get("gpu")
    lines = [f"{gpu['name']}, {gpu['gigabytes']:.0f} GB, CUDA {gpu['cuda']}" if gpu else str(around.get("cpu", "CPU"))]
    lines.append(", ".join(f"{name} {version}" for name, version in around.get("libraries", {}).items() if version))
    packages = around.get("packages", {})
    lines.append(", ".join(f"{name} {version or 'is not there'}" for name, version in packages.items()))
    kernels = [name for name, state in around.get("attention_kernels", {}).items() if state == "works"]
    lines.append(f"attention kernels that train: {', '.join(kernels)}")
    if best is not None:
        lines.append(f"matrix product: {best:.3g} TFLOP/s")
    for name, result in results.items():
        for part, values in ((name, result), *((f"{name}, {key}", inner) for key, inner in result.items())):
            if isinstance(values, dict) and "seconds" in values:
                rows.append(_row(part, values, best))
        if "error" in result or "left_out" in result:
            rows.append(f"| {name} | {result.get('error') or result['left_out']} | | | | |")
    head = ["| step | s | GB | planned | TFLOP/s | of the matrix product |", "|---|---|---|---|---|---|"]
    return "\n\n".join([*filter(None, lines), "\n".join([*head, *rows])]) + "\n"


def _row(name: str, values: Mapping[str, Any], best: float | None) -> str:
    cells = [f"{values['seconds']:.1f}"]
    cells += [f"{values[key]:.3g}" if key in values else "" for key in ("gigabytes", "planned_gigabytes")]
    rate = values.get("teraflops_per_second")
    cells += ["", ""] if rate is None else [f"{rate:.3g}", f"{rate / best:.0%}" if best else ""]
    note = f": {values['summary']}" if "summary" in values else ""
    return f"| {name}{note} | {' | '.join(cells)} |"


def explain(config: GPUCheckConfig) -> str:
    """What the check would run on a GPU, with expected time and memory."""
    lines = ["There is no CUDA GPU here. With one, this would run, with expected seconds on an H100:"]
    expected = expectations(config.sizes)
    for name, what in expected.items():
        memory = f", {what['gigabytes']:.0f} GB" if "gigabytes" in what else ""
        lines.append(f"  {name:<28}{what['seconds']:>6.0f} s{memory}")
    total = sum(what["seconds"] for what in expected.values())
    lines.append(f"  {'together':<28}{total:>6.0f} s, and 45 GB of disk")
    lines.append("To try it out on the CPU, at a tiny size: --device cpu --sizes tiny")
    return "\n".join(lines)


def run_step(name: str, sizes: str, folder: Path, result: Path) -> None:
    """Run one step in its own process, and write its result or the error."""
    import torch

    from examples.gpu_check.steps import SCALES, all_steps
    from hy_prfl.runtime.atomic_writes import write_text

    torch.set_num_threads(2 if os.environ.get("ACCELERATE_USE_CPU") else torch.get_num_threads())
    try:
        values = all_steps(SCALES[sizes], folder, tests=True)[name]()
    # A failure is a result of the check, and the next steps still run.
    except Exception as error:
        import traceback

        traceback.print_exc()
        values = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    write_text(result, json.dumps(values, indent=2))


def main() -> None:
    """Run the steps, write the results and print what is wrong."""
    config = parse_config(GPUCheckConfig, description=__doc__)
    if config.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    from examples.benchmark.benchmark import in_process_of_its_own
    from examples.gpu_check.steps import SCALES, all_steps
    from hy_prfl.runtime.atomic_writes import write_text

    if config.device == "cuda" and not torch.cuda.is_available():
        print(explain(config))
        return
    folder = Path(config.output_dir)
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    names = list(all_steps(SCALES[config.sizes], folder, tests=config.tests and config.device == "cuda"))
    unknown = sorted(set(config.steps) - set(names))
    check(not unknown, "steps", unknown, f"of {', '.join(names)}")
    expected, results = expectations(config.sizes), {}
    began = time.perf_counter()
    for name in (each for each in names if not config.steps or each in config.steps):
        left = 60 * config.minutes - (time.perf_counter() - began)
        if expected[name]["seconds"] > left:
            results[name] = {"left_out": f"not enough time: {left:.0f} of {expected[name]['seconds']:.0f} s are left"}
            print(f"{name}: {results[name]['left_out']}", flush=True)
            continue
        file = folder / "steps" / f"{name}.json"
        file.unlink(missing_ok=True)
        log = file.with_suffix(".txt")
        try:
            in_process_of_its_own(log, run_step, name, config.sizes, folder, file)
            results[name] = json.loads(file.read_text(encoding="utf-8"))
        except RuntimeError as error:
            results[name] = {"error": str(error).splitlines()[0]}
        print(f"{name}: {results[name].get('error', 'done')}", flush=True)
        write_text(folder / "results.json", json.dumps(results, indent=2))
        write_text(folder / "results.md", table(results))
    found = faults(results)
    print(f"\n{table(results)}\n{folder / 'results.md'}: {'; '.join(found) or 'all is as expected'}")
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
