"""Sets up the processes of a run, and the collectives through which they agree on values."""

import gc
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)


# How long a rank waits for the others before the run ends with an error. The default of NCCL and DeepSpeed is ten
# minutes: too short while one rank downloads a model, writes 57 GB of weights or deletes an old checkpoint.
TRAINING_TIMEOUT = timedelta(hours=6)
# For ranks that only share a list of work and wait for each other at its end. One of them may have longer clips.
SHARED_WORK_TIMEOUT = timedelta(days=2)
# How long the threads of collectives have at the end to release their tensors; they need microseconds.
SETTLING_SECONDS = 0.2


def on_cpu() -> bool:
    """Whether this run uses the CPU: there is no accelerator, or the launch configuration asks for the CPU."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_state() -> PartialState:
    """
    Set up the processes of a run that shares work without training.

    Call it before any other code sets them up. On the CPU, Accelerate looks for other processes only if asked to.
    """
    return PartialState(cpu=on_cpu(), timeout=SHARED_WORK_TIMEOUT)


def from_main_process(value: Any) -> Any:
    """Return the main process's value on all processes. The value is pickled. A collective."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def leave_processes() -> None:
    """
    Destroy the process group. Call it last in a script, when no models or groups are referenced any more.

    A thread of gloo may hold the tensors of a collective slightly longer than the code that waits for it, and needs the
    interpreter's lock to release them. If the interpreter exits at that moment, the process aborts after all its work
    is done (pytorch issue 190489). If the process group is destroyed at that moment, both wait for each other forever.
    So this thread sleeps first, without the lock. Then the threads of gloo end with the process group, and that ends
    with the last reference to it. Some references are in cycles, so garbage is collected.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(SETTLING_SECONDS)
        torch.distributed.destroy_process_group()
    gc.collect()


def build_accelerator(
    *,
    gradient_accumulation_steps: int,
    train_batch_size: int,
    log_with: list[str],
    output_dir: Path,
    find_unused_parameters: bool = False,
) -> Accelerator:
    """
    Build the Accelerator for training, for any launch configuration: one process, DDP or DeepSpeed.

    Args:
        gradient_accumulation_steps (`int`):
            Backward passes per update.
        train_batch_size (`int`):
            Samples per process and micro-batch. DeepSpeed needs both numbers; its JSON has "auto" for them.
        log_with (`list[str]`):
            Names of trackers.
        find_unused_parameters (`bool`, defaults to `False`):
            Let DDP search for unused parameters in every forward pass.
    """
    # On the CPU, Accelerate looks for several processes only if a backend (DeepSpeed) or `cpu` (otherwise) is given.
    is_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    needs_backend = is_deepspeed and on_cpu()
    accelerator = Accelerator(
        cpu=on_cpu() and not is_deepspeed,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=log_with or None,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        kwargs_handlers=[
            # Gradients are views of the buckets in which they are averaged. This saves a copy of all gradients.
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True),
            # With None Accelerate chooses. Its default is NCCL on every device.
            InitProcessGroupKwargs(backend="gloo" if needs_backend else None, timeout=TRAINING_TIMEOUT),
        ],
    )
    if accelerator.state.deepspeed_plugin is not None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = train_batch_size
    return accelerator


def all_finite(accelerator: Accelerator, value: torch.Tensor) -> bool:
    """Whether `value` is finite on every rank. All ranks get the same answer. A collective."""
    finite = torch.isfinite(value.detach()).all().to(torch.float32)
    return bool(accelerator.reduce(finite, reduction="sum") == accelerator.num_processes)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on at least one rank. All ranks get the same answer. A collective."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def mean_over_ranks(accelerator: Accelerator, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean of each scalar over the ranks, as Python floats. A collective: every rank must pass the same keys."""
    if not metrics:
        return {}
    stacked = torch.stack([value.detach().float() for value in metrics.values()])
    reduced = accelerator.reduce(stacked, reduction="mean").tolist()
    return dict(zip(metrics, reduced, strict=True))


def gather_records(records: list[Any]) -> list[Any]:
    """Concatenation of every rank's list, in rank order. A collective."""
    return gather_object(records)
