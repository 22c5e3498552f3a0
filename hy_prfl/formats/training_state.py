"""Saves and restores the state of a training run. A checkpoint is complete or absent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..runtime.atomic_writes import replace_folder, temporary_folder, temporary_name
from .checkpoints import FILES_FILE, SCHEDULE_FILE, STATE_FILE, delete_old_checkpoints


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    *,
    step: int,
    state: dict[str, Any],
    write_config: Callable[[Path], None],
    total_limit: int | None,
    delete_first: bool = False,
) -> Path:
    """
    Save everything that `Accelerator.save_state` covers as `output_dir/checkpoint-<step>`. A collective.

    All ranks write into a temporary folder. It is renamed when the last rank is done, so a checkpoint is complete even
    if the run is killed at any time. Checkpoints beyond `total_limit` are deleted after that, but never this one. With
    `delete_first` they are deleted before anything is written, so that there are never more than `total_limit`.
    """
    target = output_dir / f"checkpoint-{step}"
    temporary = temporary_name(target)
    if accelerator.is_main_process:
        # A killed run may have left something under this name.
        temporary_folder(target)
        if delete_first and total_limit is not None:
            delete_old_checkpoints(output_dir, target, total_limit)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # With DeepSpeed, leave out frozen weights, such as the base model of a LoRA. Otherwise `save_model` decides.
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.save_state(str(temporary), **({"exclude_frozen_parameters": True} if is_deepspeed else {}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_config(temporary)
        sizes = {
            str(path.relative_to(temporary)): path.stat().st_size for path in temporary.rglob("*") if path.is_file()
        }
        (temporary / FILES_FILE).write_text(json.dumps(sizes, indent=2), encoding="utf-8")
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        replace_folder(temporary, target)
        if total_limit is not None:
            delete_old_checkpoints(output_dir, target, total_limit)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Restore everything that `save_checkpoint` saved except its `state`. A collective."""
    # Frozen weights are not in the checkpoint: they come from the pipeline.
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.load_state(str(checkpoint), **({"load_module_strict": False} if is_deepspeed else {}))


def read_schedule(checkpoint: Path) -> dict[str, Any]:
    """State of the learning rate schedule, the only object that the trainers register for checkpointing."""
    return torch.load(checkpoint / SCHEDULE_FILE, weights_only=True)
