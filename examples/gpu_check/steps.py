"""The steps of the check. Each runs in its own process and returns JSON values."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from transformers import UMT5Config, UMT5EncoderModel

from examples.benchmark.benchmark import MODELS, machine, planned, precision, prepare_inputs
from examples.benchmark.cases import PRFL_EARLY, Case
from examples.benchmark.measuring import matmul_flops, most_bytes_alive
from examples.benchmark.sizes import SIZES, Clip
from hy_prfl.runtime.attention import TRAINABLE_BACKENDS, check_attention_backend
from hy_prfl.runtime.distributed import on_cpu
from hy_prfl.runtime.vae_tiling import pass_memory, with_workspaces


ROOT = Path(__file__).parents[2]
PACKAGES = ("deepspeed", "torchao", "bitsandbytes", "flash-attn", "triton")
# Steps of the chain. With 12, `PRFL_EARLY` takes gradient in the second step, so there is also one step without
# gradient.
CHAIN = 12
GIGA, TERA = 1e9, 1e12
# cuBLAS's workspaces on an H200, which torch's allocator counts and the planner does not.
CUBLAS_BYTES = 69e6


@dataclass(frozen=True)
class Training:
    """
    One training step.

    Args:
        size (`str`):
            Name of the models in `examples.benchmark.sizes`.
        clip (`Clip`):
            Clip to train on.
        options (`dict`):
            Options of the trainer.
    """

    size: str
    clip: Clip
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        """The same as a case of the benchmark, with its models and trainer."""
        size = dataclasses.replace(SIZES[self.size], options={"gradient_accumulation_steps": 1, **self.options})
        return Case(self.size, size, self.clip, PRFL_EARLY, "", CHAIN)


@dataclass(frozen=True)
class Scale:
    """
    Sizes of all models and clips.

    Args:
        trainings (`dict[str, Training]`):
            Training steps by name.
        vae_clip (`Clip`), vae_size (`str`):
            Clip that the VAE encodes and decodes, and size whose VAE it is.
        text_encoder (`dict`), text_tokens (`int`):
            Arguments of `UMT5Config`, and tokens of the prompt.
    """

    trainings: dict[str, Training]
    vae_clip: Clip
    vae_size: str
    text_encoder: dict[str, Any]
    text_tokens: int


LORA = {"lora_rank": 32}
ONE_GPU = {"base_quantization": "int8", "offload_activations": True}
P480, P720 = Clip(81, 480, 832), Clip(81, 720, 1280)
TINY, TINY_LARGE = Clip(9, 64, 64), Clip(9, 128, 128)
SCALES = {
    "real": Scale(
        trainings={
            "1.3B 480P, all weights": Training("1.3b", P480),
            "14B 480P, LoRA": Training("14b", P480, LORA),
            "14B 480P, LoRA, int8 base": Training("14b", P480, {**LORA, **ONE_GPU}),
            "14B 720P, LoRA": Training("14b", P720, {**LORA, "offload_activations": True}),
        },
        vae_clip=P480,
        vae_size="1.3b",
        # UMT5-XXL, as in the published pipelines.
        text_encoder={
            "vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        text_tokens=512,
    ),
    "tiny": Scale(
        trainings={
            "tiny, all weights": Training("tiny", TINY),
            "tiny, LoRA": Training("tiny", TINY, LORA),
            "tiny, LoRA, int8 base": Training("tiny", TINY, {**LORA, **ONE_GPU}),
            "tiny, larger, LoRA": Training("tiny", TINY_LARGE, {**LORA, "offload_activations": True}),
        },
        vae_clip=TINY,
        vae_size="tiny",
        text_encoder={"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        text_tokens=16,
    ),
}  # fmt: skip


def check_device() -> torch.device:
    """Device of the steps."""
    return torch.device("cpu" if on_cpu() else "cuda")


def synchronize() -> None:
    """Wait for the device."""
    if not on_cpu():
        torch.cuda.synchronize()


@contextmanager
def measured(result: dict[str, Any]) -> Iterator[None]:
    """Add the seconds of the context to `result`, and on a GPU the peak of allocated gigabytes."""
    synchronize()
    if not on_cpu():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    synchronize()
    result["seconds"] = time.perf_counter() - start
    if not on_cpu():
        result["gigabytes"] = torch.cuda.max_memory_allocated() / GIGA


def environment() -> dict[str, Any]:
    """The machine, installed packages, and attention kernels that work on it."""
    kernels = {}
    for name in sorted(backend.value for backend in _AttentionBackendRegistry.list_backends()):
        # Kernels of the Hub would be downloaded.
        if name in TRAINABLE_BACKENDS and not name.endswith("_hub"):
            kernels[name] = _kernel_works(name)
    result = {**machine(torch.get_num_threads()), "packages": {name: _version(name) for name in PACKAGES}}
    if not on_cpu():
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = {
            "name": properties.name,
            "gigabytes": properties.total_memory / GIGA,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return {**result, "attention_kernels": kernels}


def _kernel_works(name: str) -> str:
    try:
        check_attention_backend(
            name, option="attention_backend", trains=True, device=check_device(), dtype=precision()
        )
    except ValueError as error:
        return str(error).partition(": ")[2][:200]
    return "works"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def matmul() -> dict[str, Any]:
    """TFLOP/s of a large matrix product, to compare the training steps with."""
    return {"teraflops_per_second": matmul_flops(check_device(), precision()) / TERA}


def communication() -> dict[str, Any]:
    """NCCL, or gloo on the CPU, with one process: it starts, and an all-reduce returns its input."""
    backend = "gloo" if on_cpu() else "nccl"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        tensor = torch.arange(1 << 20, device=check_device(), dtype=torch.float32)
        expected = tensor.clone()
        dist.all_reduce(tensor)
        dist.destroy_process_group()
    return {"backend": backend, "is_exact": torch.equal(tensor, expected)}


def vae(scale: Scale) -> dict[str, Any]:
    """Encode and decode one clip in float32 without tiles."""
    config = {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, **SIZES[scale.vae_size].vae}
    with torch.device(check_device()):
        model = AutoencoderKLWan(**config).eval()
        clip = scale.vae_clip
        video = torch.rand(1, 3, clip.num_frames, clip.height, clip.width) * 2 - 1
    results: dict[str, Any] = {}
    with torch.no_grad():
        for name, operation in (("encode", model.encode), ("decode", model.decode)):
            result: dict[str, Any] = {}
            with measured(result):
                output = operation(video)
            video = output.latent_dist.mode() if name == "encode" else output.sample
            weights = sum(parameter.nbytes for parameter in model.parameters())
            size = {"height": clip.height, "width": clip.width, "num_frames": clip.num_frames}
            if scale.vae_size != "tiny":
                own = pass_memory(model.config, name, **size)  # type: ignore[arg-type]
                result["planned_gigabytes"] = (weights + with_workspaces(own, check_device())) / GIGA
            result["is_finite"] = bool(torch.isfinite(video).all())
            results[name] = result
    return results


def text_encoder(scale: Scale) -> dict[str, Any]:
    """Encode one prompt in bfloat16."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(check_device()):
        model = UMT5EncoderModel(UMT5Config(**scale.text_encoder)).eval()
        tokens = torch.randint(scale.text_encoder["vocab_size"], (1, scale.text_tokens))
    torch.set_default_dtype(kept)
    result: dict[str, Any] = {"num_parameters": sum(parameter.numel() for parameter in model.parameters())}
    with torch.no_grad(), measured(result):
        states = model(tokens).last_hidden_state
    return {**result, "is_finite": bool(torch.isfinite(states).all())}


class _AsItIs:
    """Mixin that changes nothing."""


def training(what: Training, folder: Path) -> dict[str, Any]:
    """One step of the trainer with random weights, compared with the plan."""
    if not on_cpu():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    case, result = what.case, {}
    inputs = folder / f"{MODELS}-{what.size}"
    start = time.perf_counter()
    prepare_inputs(case, inputs)
    result["preparing_seconds"] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as output:
        start = time.perf_counter()
        trainer = case.trainer(inputs, Path(output), _AsItIs)
        trainer.start_streams()
        result["loading_seconds"] = time.perf_counter() - start
        with measured(result):
            metrics = trainer.train_step()
        if on_cpu():
            result["gigabytes"] = most_bytes_alive(trainer, trainer.train_step) / GIGA
        predicted = planned(case, trainer.config)
    result["planned_gigabytes"] = (predicted["planned_bytes"] + (0 if on_cpu() else CUBLAS_BYTES)) / GIGA
    result["teraflops"] = predicted["planned_flops"] / TERA
    result["teraflops_per_second"] = result["teraflops"] / result["seconds"]
    return {**result, "metrics": {name: float(value) for name, value in metrics.items()}}


def bfloat16_tests() -> dict[str, Any]:
    """Test every launch configuration in bfloat16 on this GPU against float32 on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "4", "tests/distributed/test_bfloat16.py"]
    result: dict[str, Any] = {}
    start = time.perf_counter()
    finished = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    result["seconds"] = time.perf_counter() - start
    lines = finished.stdout.strip().splitlines()
    return {**result, "passed": finished.returncode == 0, "summary": lines[-1] if lines else finished.stderr[-500:]}


def all_steps(scale: Scale, folder: Path, *, tests: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """The steps by name, in the order in which they run: quick ones first."""
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "environment": environment,
        "matmul": matmul,
        "communication": communication,
        "VAE": lambda: vae(scale),
        "text encoder": lambda: text_encoder(scale),
    }
    for name, what in scale.trainings.items():
        steps[name] = lambda what=what: training(what, folder)  # type: ignore[misc]
    return {**steps, "bfloat16 tests": bfloat16_tests} if tests else steps
