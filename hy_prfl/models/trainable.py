"""Selects the trained parameters: all (of a reward model all but the embeddings), or those of a LoRA adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..configs.base import TrainingConfig, check
from ..configs.reward import RewardTrainingConfig
from .reward_model import WanRewardModel


def select_trainable(model: Any, training: TrainingConfig, *, dtype: torch.dtype) -> None:
    """
    Freeze what is not trained, and add a LoRA adapter if the options ask for one. A new adapter has no effect at first.

    Args:
        model (`WanTransformer3DModel` or `WanRewardModel`):
            The model. Pooling and head of a reward model are always trained.
        training (`TrainingConfig`):
            Options of the run.
        dtype (`torch.dtype`):
            Type of the adapter's weights.

    Raises:
        ValueError: If an entry of `lora_target_modules` matches no layer.
    """
    is_reward_model = isinstance(model, WanRewardModel)
    if training.lora_rank is not None:
        _add_lora(model, training, exclude_modules=r"(pooler|head)\..*" if is_reward_model else None)
        cast_training_params(model, dtype=dtype)
    elif is_reward_model:
        model.requires_grad_(True).freeze_embeddings()
    if is_reward_model:
        for part in (model.pooler, model.head):
            part.requires_grad_(True)
        if isinstance(training, RewardTrainingConfig) and training.freeze_blocks:
            model.blocks.requires_grad_(False)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """
    Context in which all LoRA adapters of a model are off, so that it computes what its base computes.

    Use it without gradient. peft's own switch also changes `requires_grad` of the adapters; this is undone.

    Raises:
        ValueError: If there is no adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter that could be turned off.")
    trains = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)


def _add_lora(model: Any, training: TrainingConfig, *, exclude_modules: str | None) -> None:
    assert training.lora_rank is not None
    names = [name for name, _ in model.named_modules()]
    for target in training.lora_target_modules:
        found = any(name == target or name.endswith(f".{target}") for name in names)
        check(found, "lora_target_modules", target, "the end of a layer's name in the model, such as `attn1.to_q`")
    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(
            r=training.lora_rank,
            lora_alpha=training.lora_rank if training.lora_alpha is None else training.lora_alpha,
            lora_dropout=training.lora_dropout,
            target_modules=list(training.lora_target_modules),
            exclude_modules=exclude_modules,
            init_lora_weights=True,
        )
    )
    if training.base_quantization is not None:
        # Autocast casts an adapter's input in any case. peft would first make a float32 copy of it, and autograd would
        # keep that copy for each layer, besides the activations that it keeps already.
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False
