"""
The launch configurations for GPUs, in bfloat16, against one process on the CPU in float32.

On the CPU always, with the topology of the CPU's configurations; on GPUs with their own, where there are any.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .training import ENGINES, GLOBAL_BATCH_SIZE, WEIGHTS, launch, launch_command, train


DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
ON_CPU = {
    "single_gpu": [*ENGINES["one process"], "--mixed_precision", "bf16"],
    "ddp": [*ENGINES["DDP"], "--mixed_precision", "bf16"],
    # DeepSpeed's files as they are.
    "zero2": [*ENGINES["ZeRO-2"], "--deepspeed_config_file", "ds_configs/zero2.json"],
    "zero3": [*ENGINES["ZeRO-3"], "--deepspeed_config_file", "ds_configs/zero3.json"],
    "zero3_offload": [*ENGINES["ZeRO-3"], "--deepspeed_config_file", "ds_configs/zero3_offload.json"],
}
SWITCHES = {
    "block inputs in host memory": "--offload_activations=true",
    "reward model in host memory": "--offload_reward_model=true",
    "gradient step run twice": "--rerun_gradient_step=true",
    "compiled blocks": "--compile=true",
}
Train = Callable[..., Path]

pytestmark = pytest.mark.launch


def count_gpus(environment: dict[str, str]) -> int:
    """GPUs that torch can use in a process with this environment."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout)


@pytest.fixture(scope="module")
def num_gpus(gpu_environment: dict[str, str]) -> int:
    """GPUs of this machine."""
    return count_gpus(gpu_environment)


@pytest.fixture
def train_in_bfloat16(inputs: Path, num_gpus: int, gpu_environment: dict[str, str]) -> Train:
    """Function that trains as `parity.train` does, in bfloat16 on a device, and returns the folder of the run."""

    def run(
        device: str, config: str, script: str, tuning: str, *more: str, num_processes: int = 1, degree: int = 1
    ) -> Path:
        if device == "gpu" and num_gpus < num_processes:
            pytest.skip(f"{num_gpus} GPUs")
        name = "-".join([device, config, script, tuning, str(num_processes), str(degree), *more])
        engine = ON_CPU[config] if device == "cpu" else ["--config_file", f"accelerate_configs/{config}.yaml"]
        engine = [*engine, "--num_processes", str(num_processes)]
        arguments = (inputs, name, engine, script, tuning, degree, GLOBAL_BATCH_SIZE * degree // num_processes, more)
        if device == "cpu":
            finished = launch(*arguments)
        else:
            command, _ = launch_command(*arguments)
            finished = subprocess.run(command, env=gpu_environment, text=True, capture_output=True)
        assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
        return inputs / name

    return run


def movement(run: Path, start: Path, file: str, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """By how much all weights have moved, as one vector, from where they are if they are loaded in this type."""
    first, last = load_file(start / file), load_file(run / file)
    return torch.cat([(last[name].double() - first[name].to(dtype).double()).flatten() for name in sorted(first)])


def assert_trained_alike(
    inputs: Path, run: Path, script: str, tuning: str, *, loaded_in: torch.dtype = torch.float32
) -> None:
    """Losses and gradients are those of float32 but for rounding, and so is where the weights went."""
    single, file = ENGINES["one process"], WEIGHTS[script, tuning]
    one = train(inputs, f"one-{script}-{tuning}", single, script, tuning, 1, GLOBAL_BATCH_SIZE)
    rates = ["--learning_rate=1e-12", *(["--head_learning_rate=1e-12"] if script == "reward" else [])]
    start = train(inputs, f"start-{script}-{tuning}", single, script, tuning, 1, 1, ["--max_train_steps=1", *rates])
    found, expected = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (run, one)
    )
    for ours, exact in zip(found, expected, strict=True):
        names = [name for name in exact if name.endswith(("loss", "grad_norm", "learning_rate"))]
        assert len(names) >= 3
        for name in names:
            assert math.isfinite(ours[name])
            assert ours[name] == pytest.approx(exact[name], rel=0.05), name
    # Float32 weights are saved, not the working copies in bfloat16.
    weights = load_file(run / file)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any((value != value.bfloat16().float()).any() for value in weights.values())
    own, other = movement(run, start, file, dtype=loaded_in), movement(one, start, file)
    assert torch.nn.functional.cosine_similarity(own, other, dim=0) > 0.98


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("script", "tuning"), list(WEIGHTS))
def test_one_process(inputs: Path, train_in_bfloat16: Train, device: str, script: str, tuning: str) -> None:
    run = train_in_bfloat16(device, "single_gpu", script, tuning)
    # A generator under LoRA is frozen, and so in half precision, and its adapter is born beside it.
    is_half = (script, tuning) == ("prfl", "lora")
    assert_trained_alike(inputs, run, script, tuning, loaded_in=torch.bfloat16 if is_half else torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("config", "script", "tuning"),
    [
        ("ddp", "reward", "full"),
        ("ddp", "prfl", "lora"),
        ("zero2", "prfl", "full"),
        ("zero3", "prfl", "full"),
        ("zero3", "prfl", "lora"),
        ("zero3_offload", "prfl", "full"),
    ],
)
def test_engines(
    inputs: Path, num_gpus: int, train_in_bfloat16: Train, device: str, config: str, script: str, tuning: str
) -> None:
    """On one GPU NCCL talks to itself. DeepSpeed makes its float32 masters from weights in bfloat16."""
    num_processes = 1 if device == "gpu" and num_gpus == 1 else 2
    run = train_in_bfloat16(device, config, script, tuning, num_processes=num_processes)
    is_half = config != "ddp" or tuning == "lora"
    assert_trained_alike(inputs, run, script, tuning, loaded_in=torch.bfloat16 if is_half else torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches(inputs: Path, train_in_bfloat16: Train, switch: str) -> None:
    """What a GPU does in its own way."""
    run = train_in_bfloat16("gpu", "single_gpu", "prfl", "full", SWITCHES[switch])
    assert_trained_alike(inputs, run, "prfl", "full")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_context_parallelism(inputs: Path, train_in_bfloat16: Train, device: str, config: str) -> None:
    run = train_in_bfloat16(device, config, "prfl", "full", num_processes=2, degree=2)
    dtype = torch.float32 if config == "ddp" else torch.bfloat16
    assert_trained_alike(inputs, run, "prfl", "full", loaded_in=dtype)
