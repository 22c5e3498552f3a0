"""What is trained in launches of two processes, and how the results are compared."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from hy_prfl.data.encoding import vae_fingerprint
from hy_prfl.data.synthetic import synthetic_dataset
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.reward_model import WanRewardModel

from ..launching import run_launch


# Options of `accelerate launch`.
ENGINES = {
    "one process": ["--config_file", "accelerate_configs/cpu.yaml"],
    "DDP": ["--config_file", "accelerate_configs/ddp_cpu.yaml"],
    "ZeRO-2": ["--config_file", "accelerate_configs/zero2_cpu.yaml"],
    "ZeRO-3": ["--config_file", "accelerate_configs/zero3_cpu.yaml"],
}
# What a script writes at the end.
WEIGHTS = {
    ("reward", "full"): "reward_model/diffusion_pytorch_model.safetensors",
    ("reward", "lora"): "reward_model/diffusion_pytorch_model.safetensors",
    ("prfl", "full"): "transformer/diffusion_pytorch_model.safetensors",
    ("prfl", "lora"): "pytorch_lora_weights.safetensors",
}
GLOBAL_BATCH_SIZE = 4


def write_models(folder: Path, **pipeline_options: object) -> str:
    """Write `folder/pipeline`, and `folder/reward` of its first two blocks; returns the fingerprint of the VAE."""
    pipeline = build_pipeline(num_layers=3, num_attention_heads=4, **pipeline_options)  # type: ignore[arg-type]
    pipeline.save_pretrained(folder / "pipeline")
    fingerprint = vae_fingerprint(AutoencoderKLWan.from_pretrained(folder / "pipeline", subfolder="vae"))
    torch.manual_seed(0)
    reward_model = WanRewardModel.from_transformer(pipeline.transformer, num_layers=2, vae_fingerprint=fingerprint)
    reward_model.save_pretrained(folder / "reward")
    return fingerprint


def write_inputs(folder: Path, **pipeline_options: object) -> None:
    """Write the models, and `folder/data` with 16 labelled rows of random latents."""
    dataset = synthetic_dataset(
        latents_shape=(16, 3, 4, 4), text_dim=32, text_tokens=3, max_sequence_length=16, num_rows=16,
        vae_fingerprint=write_models(folder, **pipeline_options), dtype="float32",
    )  # fmt: skip
    dataset.save_to_disk(folder / "data")


def training_options(folder: Path, name: str, script: str, tuning: str, degree: int, batch_size: int) -> list[str]:
    """Options of four updates of a script, whose results go into `folder/name`."""
    values: dict[str, object] = {
        "pretrained_model_name_or_path": folder / "pipeline",
        "train_dataset": folder / "data",
        "output_dir": folder / name,
        "train_batch_size": batch_size,
        "context_parallel_degree": degree,
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
    return [f"--{option}={value}" for option, value in values.items()]


def training_environment(engine: Sequence[str]) -> dict[str, str]:
    """Environment of a launch on the CPU."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    if list(engine[:2]) == ENGINES["DDP"]:
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


def launch_command(
    folder: Path,
    name: str,
    engine: Sequence[str],
    script: str,
    tuning: str,
    degree: int,
    batch_size: int,
    more: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a real launch, for what [`launch`] cannot do: to be killed, or run by users."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *engine, "-m", f"hy_prfl.scripts.train_{script}"]
    options = training_options(folder, name, script, tuning, degree, batch_size)
    return [*command, *options, *more], training_environment(engine)


def launch(
    folder: Path,
    name: str,
    engine: Sequence[str],
    script: str,
    tuning: str,
    degree: int,
    batch_size: int,
    more: Sequence[str] = (),
) -> "CompletedProcess[str]":
    """Train in processes that are forked from one that has imported everything, whether that succeeds or fails."""
    num_processes = 1 if list(engine[:2]) == ENGINES["one process"] else 2
    if "--num_processes" in engine:
        num_processes = int(engine[list(engine).index("--num_processes") + 1])
    return run_launch(
        engine,
        f"hy_prfl.scripts.train_{script}",
        [*training_options(folder, name, script, tuning, degree, batch_size), *more],
        num_processes=num_processes,
        environment=training_environment(engine),
    )


def train(
    folder: Path,
    name: str,
    engine: Sequence[str],
    script: str,
    tuning: str,
    degree: int,
    batch_size: int,
    more: Sequence[str] = (),
    file: str | None = None,
) -> Path:
    """
    Train as [`launch`] does, unless the weights are there already, and return the folder of the run.

    Raises:
        RuntimeError: If a process fails, with all that was printed.
    """
    run = folder / name
    if not (run / (file or WEIGHTS[script, tuning])).is_file():
        finished = launch(folder, name, engine, script, tuning, degree, batch_size, more)
        if finished.returncode:
            raise RuntimeError(f"{' '.join(finished.args)}\n{finished.stdout}\n{finished.stderr}")
    return run


def relative_difference(weights: Path, reference: Path) -> float:
    """Norm of the difference of all weights, relative to the norm of the reference."""
    own, other = load_file(weights), load_file(reference)
    assert set(own) == set(other), f"{weights} and {reference} do not hold the same weights"
    difference = sum((own[name].double() - other[name].double()).square().sum() for name in own)
    return float((difference / sum(other[name].double().square().sum() for name in other)) ** 0.5)
