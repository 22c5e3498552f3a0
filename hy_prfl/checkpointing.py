"""Checkpoints that are complete or absent, and model files that diffusers loads. No training policy."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType
from diffusers import ModelMixin, WanPipeline, WanTransformer3DModel
from huggingface_hub import save_torch_state_dict
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from .folders import recover_folder, replace_folder, temporary_folder
from .models.adapters import parse_adapter
from .models.experts import LORA_FILES
from .models.lora_metadata import lora_header


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
BEST_FOLDER, MODEL_FOLDER, AVERAGE_FOLDER = "best", "reward_model", "ema"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Folders still under their temporary name do not count."""
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Number of updates that a checkpoint folder's name tells."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint}: a checkpoint folder is called 'checkpoint-<step>'.")
    return int(match.group(1))


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    The checkpoint to continue from, or None to start afresh.

    Args:
        resume_from_checkpoint (`str`, *optional*):
            `"latest"` for the newest checkpoint in `output_dir`, if there is one; or the path of a checkpoint.

    Raises:
        FileNotFoundError: If the path is not a complete checkpoint.
        ValueError: If nothing is to be resumed but `output_dir` already holds checkpoints.
    """
    # Of a run that was killed while it gave a finished folder its name.
    for outdated in output_dir.glob(".*.old"):
        recover_folder(output_dir / outdated.name.removeprefix(".").removesuffix(".old"))
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if checkpoints:
            raise ValueError(
                f"`output_dir`: {output_dir} already holds {checkpoints[-1].name}. Continue with "
                "`--resume_from_checkpoint latest` or choose another folder."
            )
        return None
    if resume_from_checkpoint == "latest":
        return checkpoints[-1] if checkpoints else None
    checkpoint = Path(resume_from_checkpoint)
    if not (checkpoint / STATE_FILE).is_file():
        raise FileNotFoundError(f"`resume_from_checkpoint`: {checkpoint} is not a complete checkpoint.")
    return checkpoint


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    *,
    step: int,
    state: dict[str, Any],
    write_config: Callable[[Path], None],
    total_limit: int | None,
) -> Path:
    """
    Save everything that `Accelerator.save_state` covers as `output_dir/checkpoint-<step>`. A collective.

    All ranks write into a temporary folder, which gets its name only when the last one is done, so a run killed at
    any moment leaves a good `latest`. Older checkpoints beyond `total_limit` are deleted after that.
    """
    target = output_dir / f"checkpoint-{step}"
    temporary = target.with_name(f".{target.name}.tmp")
    if accelerator.is_main_process:
        temporary_folder(target).mkdir(parents=True)
    accelerator.wait_for_everyone()
    # The base model under an adapter is not saved again by DeepSpeed; everywhere else `save_model` decides.
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.save_state(str(temporary), **({"exclude_frozen_parameters": True} if is_deepspeed else {}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_config(temporary)
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        replace_folder(temporary, target)
        for old in list_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
            logger.info("Deleting %s.", old)
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Restore what `save_checkpoint` saved, but for its `state`. A collective."""
    # Frozen weights, which the checkpoint leaves out, have come from the pipeline; the others must all be there.
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.load_state(str(checkpoint), **({"load_module_strict": False} if is_deepspeed else {}))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that `save_checkpoint` was given."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def read_schedule(checkpoint: Path) -> dict[str, Any]:
    """The state of the learning rate's schedule, the only object that the trainers register with Accelerate."""
    return torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)


def save_pretrained(
    model: ModelMixin,
    state_dict: dict[str, torch.Tensor],
    directory: Path,
    extra: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """
    Write weights and the configuration of `model` as `ModelMixin.save_pretrained` does, but in one move.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            All weights, whole; those of `model` itself may be split over ranks.
        extra (`Mapping[str, str]`):
            Text files to put beside them, by name.
    """
    temporary = temporary_folder(directory)
    model.save_config(temporary)
    save_torch_state_dict(
        state_dict, temporary, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size="10GB"
    )
    for name, text in extra.items():
        (temporary / name).write_text(text, encoding="utf-8")
    replace_folder(temporary, directory)


def save_lora(
    transformer: WanTransformer3DModel,
    state_dict: dict[str, torch.Tensor],
    file: Path,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """
    Write a transformer's adapter as diffusers reads it.

    Rank, alpha and targets go into the file's metadata; without it diffusers takes alpha for the rank.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Weights of the adapter, whole, by their names in `transformer`.
        file (`Path`):
            `<folder>/pytorch_lora_weights.safetensors`, or another of `LORA_FILES`.
        metadata (`Mapping[str, str]`):
            Where it comes from, see [`~hy_prfl.models.lora_metadata.lora_metadata`].

    Raises:
        ValueError: If a weight is empty or half of a pair is missing; nothing is written then.
    """
    layers = get_peft_model_state_dict(transformer, state_dict=state_dict)
    header = lora_header(transformer.peft_config["default"].to_dict(), metadata)
    parse_adapter({f"transformer.{name}": weight for name, weight in layers.items()}, header, source=str(file))
    temporary = file.with_name(".lora.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    WanPipeline.save_lora_weights(
        temporary,
        transformer_lora_layers=layers,
        save_function=lambda weights, filename: save_file(weights, filename, metadata=header),
    )
    (temporary / LORA_FILES["high_noise"]).replace(file)
    temporary.rmdir()


def read_lora(path: Path) -> dict[str, torch.Tensor]:
    """Weights of an adapter written by `save_lora`, by their names in the transformer that it was saved from."""
    with safe_open(path, framework="pt") as file:
        return {_parameter_name(key): file.get_tensor(key) for key in file.keys()}


def _parameter_name(key: str) -> str:
    layer, part = key.removeprefix("transformer.").rsplit(".", 1)
    return f"{layer}.default.{part}"


def merge_adapter(model: ModelMixin, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Weights of a model with its LoRA adapter added to them, so that they load where there is no adapter.

    Args:
        model (`ModelMixin`):
            A model with an adapter. Only its configuration is looked at.
        state_dict (`Mapping[str, torch.Tensor]`):
            All its weights, whole. The result is float32.
    """
    with init_empty_weights(include_buffers=False):
        merged = type(model).from_config(model.config)
        merged.add_adapter(model.peft_config["default"])
    # Copies: fusing writes into them.
    weights = {name: tensor.to(torch.float32, copy=True) for name, tensor in state_dict.items()}
    merged.load_state_dict(weights, assign=True)
    merged.fuse_lora()
    merged.unload_lora()
    return merged.state_dict()
