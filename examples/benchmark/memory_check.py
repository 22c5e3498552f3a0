"""
Does the planner tell the truth about memory? `python -m examples.benchmark.memory_check`

Trains generators of some ten million parameters for two steps on the CPU, in float32, records every allocation of the
second step with torch's profiler, and compares the most that was alive with what `plan` says. Beside it the process's
own memory (`RssAnon`), in which everything else is too: Python, libraries, what the allocator keeps for later. Every case
is a process of its own. Writes `examples/benchmark/memory_check.json`. Takes some minutes.
"""

import gc
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch.profiler import ProfilerActivity, profile

from examples.shapes.pipeline import save_pipeline
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.data.encoding import vae_fingerprint
from hy_prfl.data.schema import latent_features, pack_tensor, rows_to_table
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
    save_pipeline(
        folder / "pipeline",
        num_layers=num_layers, num_attention_heads=num_attention_heads, attention_head_dim=64, ffn_dim=ffn_dim,
    )  # fmt: skip
    transformer = WanTransformer3DModel.from_pretrained(folder / "pipeline", subfolder="transformer")
    fingerprint = vae_fingerprint(AutoencoderKLWan.from_pretrained(folder / "pipeline", subfolder="vae"))
    reward_model = WanRewardModel.from_transformer(transformer, num_layers=2, vae_fingerprint=fingerprint)
    reward_model.save_pretrained(folder / "reward")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(4):
        row: dict[str, object] = {
            "id": str(index), "prompt": "", "fps": 16.0, "max_sequence_length": TEXT_TOKENS,
            "vae_fingerprint": fingerprint, "text_encoder_fingerprint": "",
        }  # fmt: skip
        latents = rng.normal(size=(16, (num_frames - 1) // 4 + 1, size // 8, size // 8))
        row |= pack_tensor("latents", latents, "float32", source=str(index))
        for name in ("prompt_embeds", "null_prompt_embeds"):
            row |= pack_tensor(name, rng.normal(size=(3, 32)), "float32", source=str(index))
        rows.append(dict.fromkeys(latent_features()) | row)
    Dataset(rows_to_table(rows, "float32")).save_to_disk(folder / "data")


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
    """
    Most bytes alive at a time in the trainer's second step.

    What is there before it is counted tensor by tensor, what comes and goes in it by the allocator's own records: torch
    reports each allocation and release on the CPU to the profiler, those inside of kernels too.
    """
    trainer.start_streams()
    trainer.train_step()
    trainer.global_step += 1
    gc.collect()
    tensors = [*trainer.unwrapped.parameters(), *trainer.unwrapped.buffers()]
    tensors += [*trainer.reward_model.parameters(), *trainer.reward_model.buffers()]
    for state in trainer.updates.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    tensors += [parameter.grad for parameter in trainer.unwrapped.parameters() if parameter.grad is not None]
    before = sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return before + peak


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
