"""Writes trained models and LoRA adapters as files that diffusers loads. A file or folder is complete or absent."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin, WanPipeline, WanTransformer3DModel
from huggingface_hub import save_torch_state_dict
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from ..runtime.atomic_writes import replace_folder, temporary_folder
from .layout import LORA_FILES
from .lora import parse_adapter
from .lora_metadata import lora_header


def save_pretrained(
    model: ModelMixin,
    state_dict: dict[str, torch.Tensor],
    directory: Path,
    extra: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """
    Write weights and the configuration of `model` as `ModelMixin.save_pretrained` does, but atomically.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            All weights, gathered; those of `model` itself may be sharded.
        extra (`Mapping[str, str]`):
            Text files to write into the same folder, by name.
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

    Rank, alpha and targets go into the file's metadata. Without it, diffusers assumes that alpha equals the rank.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Weights of the adapter, gathered, by their names in `transformer`.
        file (`Path`):
            `<folder>/pytorch_lora_weights.safetensors`, or another of `LORA_FILES`.
        metadata (`Mapping[str, str]`):
            The LoRA's origin, see [`~hy_prfl.formats.lora_metadata.lora_metadata`].

    Raises:
        ValueError: If a weight is empty, or a layer has `lora_A` without `lora_B` or the reverse. Nothing is written then.
    """
    layers = get_peft_model_state_dict(transformer, state_dict=state_dict)
    header = lora_header(transformer.peft_config["default"].to_dict(), metadata)
    parse_adapter({f"transformer.{name}": weight for name, weight in layers.items()}, header, source=str(file))
    temporary = temporary_folder(file)
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
    Weights of a model with its LoRA adapter merged into them, so that they load without an adapter.

    Args:
        model (`ModelMixin`):
            A model with an adapter. Only its configuration is used.
        state_dict (`Mapping[str, torch.Tensor]`):
            All its weights, gathered. The result is float32.
    """
    with init_empty_weights(include_buffers=False):
        merged = type(model).from_config(model.config)
        merged.add_adapter(model.peft_config["default"])
    # Copies, because fusing writes into them.
    weights = {name: tensor.to(torch.float32, copy=True) for name, tensor in state_dict.items()}
    merged.load_state_dict(weights, assign=True)
    merged.fuse_lora()
    merged.unload_lora()
    return merged.state_dict()
