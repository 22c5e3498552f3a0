"""Processes: how they are set up, and what they have to agree on."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, gather_object


def build_accelerator(
    *, gradient_accumulation_steps: int, train_batch_size: int, log_with: list[str], output_dir: Path
) -> Accelerator:
    """
    Accelerator for training, whatever the launch configuration says: one process, DDP or DeepSpeed.

    Args:
        gradient_accumulation_steps (`int`):
            Backward passes that add up to one update.
        train_batch_size (`int`):
            Samples per process and micro-batch. DeepSpeed wants to know; its JSON says "auto" for both.
        log_with (`list[str]`):
            Names of trackers.
    """
    # Without a GPU, and without being told, Accelerate would think that every DeepSpeed process is alone.
    is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    needs_backend = is_deepspeed and not torch.cuda.is_available()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if needs_backend else []
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=log_with or None,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        kwargs_handlers=handlers,
    )
    if accelerator.state.deepspeed_plugin is not None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = train_batch_size
    return accelerator


def all_finite(accelerator: Accelerator, value: torch.Tensor) -> bool:
    """Whether `value` is finite on every rank; the same answer on all of them. A collective."""
    finite = torch.isfinite(value.detach()).all().to(torch.float32)
    return bool(accelerator.reduce(finite, reduction="sum") == accelerator.num_processes)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on at least one rank; the same answer on all of them. A collective."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def mean_over_ranks(accelerator: Accelerator, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean of each scalar over the ranks, as Python floats. A collective; every rank passes the same keys."""
    if not metrics:
        return {}
    stacked = torch.stack([value.detach().float() for value in metrics.values()])
    reduced = accelerator.reduce(stacked, reduction="mean").tolist()
    return dict(zip(metrics, reduced, strict=True))


def gather_records(records: list[Any]) -> list[Any]:
    """Concatenation of every rank's list, in rank order. A collective."""
    return gather_object(records)
