"""
Checks that training on several processes gives the same weights as on one process: `make parity`, or

    python -m examples.parity.parity

Trains tiny models for four updates with each engine on two CPU processes. Compares the saved weights with those of one
process with the same samples and noise. Writes `outputs/parity.json`. Takes about ten minutes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from examples.benchmark.inputs import write_models, write_rows
from hy_prfl.configs.parser import parse_config


ENGINES = {
    "one process": ["--config_file", "accelerate_configs/cpu.yaml"],
    "DDP": ["--config_file", "accelerate_configs/ddp_cpu.yaml"],
    "ZeRO-2": ["--config_file", "accelerate_configs/zero2_cpu.yaml"],
    "ZeRO-3": ["--config_file", "accelerate_configs/zero3_cpu.yaml"],
}
WEIGHTS = {
    ("reward", "full"): "reward_model/diffusion_pytorch_model.safetensors",
    ("reward", "lora"): "reward_model/diffusion_pytorch_model.safetensors",
    ("prfl", "full"): "transformer/diffusion_pytorch_model.safetensors",
    ("prfl", "lora"): "pytorch_lora_weights.safetensors",
}
GLOBAL_BATCH_SIZE = 4


@dataclass(kw_only=True)
class ParityConfig:
    """Options of the comparison."""

    output_dir: str = field(default="outputs/parity", metadata={"help": "Folder for data and runs."})
    output: str = field(default="outputs/parity.json", metadata={"help": "Table to write."})
    engines: list[str] = field(
        default_factory=lambda: ["DDP", "ZeRO-2", "ZeRO-3"], metadata={"help": "Engines to compare."}
    )


def write_inputs(
    folder: Path, *, num_rows: int = 16, latents_shape: Sequence[int] = (16, 3, 4, 4), **pipeline_options: float
) -> None:
    """Write a pipeline (tiny by default), a reward model of two of its blocks, and labelled rows of random latents."""
    write_models(folder, **{"num_layers": 3, "num_attention_heads": 4, **pipeline_options})
    write_rows(folder, latents_shape=latents_shape, num_rows=num_rows)


def options(folder: Path, script: str, tuning: str) -> list[str]:
    """Options of one training run that do not depend on the engine."""
    values: dict[str, object] = {
        "pretrained_model_name_or_path": folder / "pipeline",
        "train_dataset": folder / "data",
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-4,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 2,
        "gradient_checkpointing": True,
        "report_to": "none",
    }
    if script == "reward":
        values |= {"num_layers": 2, "head_learning_rate": 1e-4}
    else:
        values |= {"reward_model": folder / "reward", "num_inference_steps": 4}
    if tuning == "lora":
        values |= {"lora_rank": 4}
    return [f"--{name}={value}" for name, value in values.items()]


def launch_command(
    folder: Path,
    name: str,
    launch: Sequence[str],
    script: str,
    tuning: str,
    degree: int,
    batch_size: int,
    more: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of one training run."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", f"hy_prfl.scripts.train_{script}",
        *options(folder, script, tuning), f"--output_dir={folder / name}", f"--context_parallel_degree={degree}",
        f"--train_batch_size={batch_size}", *more,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # DeepSpeed compiles a kernel on its first start. If it is killed meanwhile, it leaves a lock that all later starts
    # wait for. So these runs do not use the user's folder.
    environment["TORCH_EXTENSIONS_DIR"] = str(folder.resolve() / "torch_extensions")
    if launch == ENGINES["DDP"]:
        environment["ACCELERATE_USE_CPU"] = "true"
    return command, environment


def train(
    folder: Path,
    name: str,
    launch: Sequence[str],
    script: str,
    tuning: str,
    degree: int,
    batch_size: int,
    more: Sequence[str] = (),
    file: str | None = None,
) -> Path:
    """Train once, unless the weights `file` (by default that of `WEIGHTS`) exist, and return the folder of the run."""
    run = folder / name
    if not (run / (file or WEIGHTS[script, tuning])).is_file():
        command, environment = launch_command(folder, name, launch, script, tuning, degree, batch_size, more)
        finished = subprocess.run(command, env=environment, text=True, capture_output=True)
        if finished.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{finished.stdout}\n{finished.stderr}")
    return run


def relative_difference(weights: Path, reference: Path) -> float:
    """Norm of the difference of all weights, divided by the norm of the reference."""
    own, other = load_file(weights), load_file(reference)
    if set(own) != set(other):
        raise RuntimeError(f"{weights} and {reference} do not hold the same weights.")
    difference = sum((own[name].double() - other[name].double()).square().sum() for name in own)
    return float((difference / sum(other[name].double().square().sum() for name in other)) ** 0.5)


def variants(script: str) -> list[tuple[int, bool]]:
    """Pairs of a degree of context parallelism, and whether the reward model is sharded, to compare for a script."""
    return [(1, False), (2, False)] if script == "reward" else [(1, False), (2, False), (2, True)]


def main() -> None:
    """Run the comparison and print the table."""
    config = parse_config(ParityConfig, description=__doc__)
    folder = Path(config.output_dir)
    if not (folder / "data").exists():
        write_inputs(folder)
    single = ENGINES["one process"]
    rows = []
    for script, tuning in WEIGHTS:
        file = WEIGHTS[script, tuning]
        one = train(folder, f"single-{script}-{tuning}", single, script, tuning, 1, GLOBAL_BATCH_SIZE)
        for engine in config.engines:
            for degree, is_sharded in variants(script):
                name = f"{engine}-{degree}-{script}-{tuning}{'-split' if is_sharded else ''}"
                more = ["--shard_reward_model=true"] if is_sharded else []
                batch_size = GLOBAL_BATCH_SIZE * degree // 2
                run = train(folder, name, ENGINES[engine], script, tuning, degree, batch_size, more)
                rows.append(
                    {
                        "engine": engine,
                        "context_parallel_degree": degree,
                        "tuning": tuning,
                        "script": script,
                        "shard_reward_model": is_sharded,
                        "relative_difference": relative_difference(run / file, one / file),
                    }
                )
                print(
                    "{engine:8} {context_parallel_degree} {tuning:5} {script:7} {shard_reward_model!s:5} "
                    "{relative_difference:.1e}".format(**rows[-1])
                )
    Path(config.output).write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
