"""
Does the planner tell the truth about memory? `python -m examples.benchmark.memory_check`

Trains generators of some ten million parameters for two steps on the CPU, in float32, records every allocation of the
second step with torch's profiler, and compares the most that was alive with what `plan` says. Beside it the process's
own memory (`RssAnon`), in which everything else is too: Python, libraries, what the allocator keeps for later. Every case
is a process of its own. Writes `examples/benchmark/memory_check.json`. Takes some minutes.
"""

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from examples.benchmark.inputs import write_models, write_rows
from examples.benchmark.measuring import most_bytes_alive
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.planning import Plan, plan
from hy_prfl.planning.engines import Engine
from hy_prfl.trainers.prfl_trainer import PRFLTrainer


TEXT_TOKENS = 16
CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, recomputed": {"gradient_checkpointing": True},
    "all weights, 3 blocks recomputed": {"gradient_checkpointing": True, "gradient_checkpointing_blocks": 3},
    "all weights, two micro-batches": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "all weights, step run twice": {"rerun_gradient_step": True},
    "LoRA": {"lora_rank": 16},
    "LoRA, recomputed": {"lora_rank": 16, "gradient_checkpointing": True},
}


@dataclass(kw_only=True)
class MemoryCheckConfig:
    """Options of the check."""

    output: str = field(default="examples/benchmark/memory_check.json", metadata={"help": "Table to write."})
    num_layers: int = field(default=6, metadata={"help": "Blocks of the generator."})
    num_attention_heads: int = field(default=12, metadata={"help": "Heads, of 64 dimensions."})
    ffn_dim: int = field(default=3072, metadata={"help": "Width of the feed-forward layers."})
    num_frames: int = field(default=13, metadata={"help": "Frames of the clips."})
    size: int = field(default=256, metadata={"help": "Sides of the clips in pixels."})
    case: str | None = field(default=None, metadata={"help": "Only this case, printed as JSON; used by the script."})


def write_inputs(
    folder: Path, *, num_layers: int, num_attention_heads: int, ffn_dim: int, num_frames: int, size: int
) -> None:
    """A pipeline with a generator of these sizes, a reward model of two of its blocks, and 4 rows."""
    write_models(
        folder,
        num_layers=num_layers, num_attention_heads=num_attention_heads, attention_head_dim=64, ffn_dim=ffn_dim,
    )  # fmt: skip
    latents_shape = (16, (num_frames - 1) // 4 + 1, size // 8, size // 8)
    write_rows(folder, latents_shape=latents_shape, max_sequence_length=TEXT_TOKENS)


def recipe(folder: Path, **options: Any) -> PRFLTrainingConfig:
    """A short run on these inputs, one step of the chain without gradient."""
    return PRFLTrainingConfig(
        output_dir=str(folder / "run"),
        pretrained_model_name_or_path=str(folder / "pipeline"),
        train_dataset=str(folder / "data"),
        reward_model=str(folder / "reward"),
        num_inference_steps=3,
        step_range=[1, 1],
        report_to=["none"],
        **options,
    )


def planned(training: PRFLTrainingConfig, *, num_frames: int, size: int) -> Plan:
    """What the planner says of it."""
    return plan(
        training,
        height=size,
        width=size,
        num_frames=num_frames,
        text_tokens=TEXT_TOKENS,
        gpu_memory=1e6,
        reserved=0,
        engine=Engine(mixed_precision=False, on_gpu=False),
        reward_config=WanRewardModel.load_own_config(training.reward_model),
    )


def measure_step(trainer: PRFLTrainer) -> float:
    """Most bytes alive at a time in the trainer's second step."""
    trainer.start_streams()
    trainer.train_step()
    trainer.global_step += 1
    return most_bytes_alive(trainer, trainer.train_step)


def run_case(config: MemoryCheckConfig) -> dict[str, Any]:
    """Measure and plan one case."""
    assert config.case is not None
    sizes = {"num_frames": config.num_frames, "size": config.size}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = {key: getattr(config, key) for key in ("num_layers", "num_attention_heads", "ffn_dim")}
        write_inputs(folder, **model, **sizes)
        training = recipe(folder, **CASES[config.case])
        needs = planned(training, **sizes)
        measured = measure_step(PRFLTrainer(training)) / 1e9
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    process = int(status.split("RssAnon:")[1].split()[0]) / 1e6
    return {
        "case": config.case,
        "parameters": needs.num_parameters,
        "tokens": needs.num_tokens,
        "planned_gb": round(needs.peak, 4),
        "measured_gb": round(measured, 4),
        "planned_over_measured": round(needs.peak / measured, 4),
        "process_gb": round(process, 4),
    }


def main() -> None:
    """Run every case in its own process and print the table."""
    torch.set_num_threads(1)
    config = parse_config(MemoryCheckConfig, description=__doc__)
    if config.case is not None:
        print(json.dumps(run_case(config)))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, "-m", "examples.benchmark.memory_check", *sys.argv[1:], f"--case={case}"]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(finished.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
        report = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        Path(config.output).write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
