"""Processes: how they are set up, and what they have to agree on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, gather_object, parse_flag_from_env
from torch import nn


# How long a rank waits for the others: one may be encoding or decoding on its own.
TIMEOUT = timedelta(days=14)


def on_cpu() -> bool:
    """Whether this run is on the CPU: for want of an accelerator, or because the launch configuration says so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_state() -> PartialState:
    """
    The processes of a run that shares out work without training.

    Call it before anything else sets them up. On the CPU Accelerate has to be told to look for others.
    """
    return PartialState(cpu=on_cpu(), timeout=TIMEOUT)


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
    # On the CPU Accelerate must be told that it is not alone: DeepSpeed by a backend, all else by `cpu`.
    is_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    needs_backend = is_deepspeed and on_cpu()
    accelerator = Accelerator(
        cpu=on_cpu() and not is_deepspeed,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=log_with or None,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if needs_backend else [],
    )
    if accelerator.state.deepspeed_plugin is not None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = train_batch_size
    return accelerator


def forget_deepspeed_in_transformers() -> None:
    """
    Let transformers and diffusers treat tensors as the whole tensors that they are.

    Accelerate tells transformers that ZeRO-3 is on. Models loaded after that would come out split, and diffusers'
    `EMAModel` would want to gather the shares that it is given.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def all_finite(accelerator: Accelerator, value: torch.Tensor) -> bool:
    """Whether `value` is finite on every rank; the same answer on all of them. A collective."""
    finite = torch.isfinite(value.detach()).all().to(torch.float32)
    return bool(accelerator.reduce(finite, reduction="sum") == accelerator.num_processes)


@contextmanager
def gathered(parameter: torch.Tensor) -> Iterator[None]:
    """Make a parameter that ZeRO-3 has split over the ranks whole for the time of the context. A collective."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def full_state_dict(
    accelerator: Accelerator, model: nn.Module, *, trainable_only: bool = False
) -> dict[str, torch.Tensor]:
    """
    Weights by name, on the CPU of the main process; empty on the other ranks. A collective.

    Under DeepSpeed one parameter after the other is made whole, so no rank ever holds more than one besides its own
    share, and what trains comes as the float32 master that the optimizer keeps.
    """
    state_dict = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trainable_only and not tensor.requires_grad:
            continue
        master = float32_master(tensor)
        with gathered(tensor):
            if accelerator.is_main_process:
                state_dict[name] = (tensor if master is None else master).detach().cpu().clone()
    return state_dict


def float32_master(parameter: torch.Tensor) -> torch.Tensor | None:
    """The whole float32 master of a parameter in training under DeepSpeed, None for any other. A collective."""
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return None
    if not parameter.requires_grad:
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def local_masters(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank trains of each parameter: the parameter itself, or under ZeRO-3 its float32 share of it."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return list(parameters)
    from deepspeed.utils import safe_get_local_fp32_param

    return [nn.Parameter(safe_get_local_fp32_param(parameter)) for parameter in parameters]


def write_local(parameters: Sequence[Any], values: Sequence[torch.Tensor]) -> None:
    """Put values of the shapes of `local_masters` into the parameters, masters and working copies alike."""
    for parameter, value in zip(parameters, values, strict=True):
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(parameter, value)
            parameter.ds_tensor.data.copy_(value.view_as(parameter.ds_tensor))
        else:
            parameter.data.copy_(value)


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
