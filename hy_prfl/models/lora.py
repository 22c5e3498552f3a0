"""Gives a model a LoRA adapter to train."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from ..configs.base import check


def add_lora(
    model: Any,
    *,
    rank: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: Sequence[str],
    dtype: torch.dtype,
    exclude_modules: str | None = None,
) -> None:
    """
    Freeze a model and give it a LoRA adapter, which at first changes nothing.

    Args:
        model (`ModelMixin`):
            The model.
        rank (`int`), lora_alpha (`float`), lora_dropout (`float`):
            Rank, scale and dropout of the adapter.
        target_modules (`Sequence[str]`):
            Ends of the names of the layers that get one.
        dtype (`torch.dtype`):
            Type of the adapter's weights.
        exclude_modules (`str`, *optional*):
            Regular expression of the names of layers that get none.

    Raises:
        ValueError: If one of `target_modules` names no layer.
    """
    names = [name for name, _ in model.named_modules()]
    for target in target_modules:
        found = any(name == target or name.endswith(f".{target}") for name in names)
        check(found, "lora_target_modules", target, "the end of a layer's name in the model, such as `attn1.to_q`")
    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=list(target_modules),
            exclude_modules=exclude_modules,
            init_lora_weights=True,
        )
    )
    cast_training_params(model, dtype=dtype)
