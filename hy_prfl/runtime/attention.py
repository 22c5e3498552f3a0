"""Attention kernels by diffusers' names: check that a kernel works on this machine, and set it in a model."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn


# Kernels that have a backward pass when diffusers calls them. `_flash_3` and SageAttention have none; others were not
# checked.
TRAINABLE_BACKENDS = (
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "flash",
    "flash_hub",
    "flash_varlen",
    "flash_varlen_hub",
    "_flash_3_hub",
    "_flash_3_varlen_hub",
    "flex",
    "xformers",
)


def check_attention_backend(
    name: str,
    *,
    option: str,
    trains: bool,
    device: torch.device,
    dtype: torch.dtype,
    autocast: AbstractContextManager[Any] | None = None,
) -> None:
    """
    Check that a kernel is known, installed, and works for this device and type. Needs no model.

    It is tried on a few tokens in one of Wan's attention layers. Under autocast with float32 weights, queries and keys
    are float32 and values half precision: torch's kernels accept that, others do not. A kernel from the Hub is
    downloaded.

    Args:
        name (`str`):
            The kernel's name in `diffusers.models.attention_dispatch.AttentionBackendName`.
        option (`str`):
            Name of the option, for error messages.
        trains (`bool`):
            Whether a backward pass will follow.
        device (`torch.device`), dtype (`torch.dtype`):
            Device and type of the model's weights.
        autocast (`ContextManager`, *optional*):
            Context in which the model runs.

    Raises:
        ValueError: If the kernel cannot be used, with the reason or the possible names.
    """
    known = sorted(backend.value for backend in _AttentionBackendRegistry.list_backends())
    if name not in known:
        raise ValueError(f"`{option}` must be one of {', '.join(known)}, got '{name}'.")
    if trains and name not in TRAINABLE_BACKENDS:
        raise ValueError(
            f"`{option}` must have a backward pass, and '{name}' has none (the rollout can use it); these have one: "
            f"{', '.join(TRAINABLE_BACKENDS)}."
        )
    with torch.device("meta"):
        attention = WanAttention(dim=256, heads=2, dim_head=128, processor=WanAttnProcessor()).requires_grad_(trains)
    # Constant weights: random ones would change the random numbers of the run.
    attention.to_empty(device=device).to(dtype)
    for parameter in attention.parameters():
        nn.init.constant_(parameter, 0.01)
    try:
        with attention_backend(name), torch.set_grad_enabled(trains), autocast or nullcontext():
            output = attention(torch.ones(1, 128, 256, device=device, dtype=dtype))
            if trains:
                output.sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"`{option}` '{name}' does not work here, on {device.type} in {dtype}: {error}") from error


def set_attention_backend(model: nn.Module, name: str) -> None:
    """
    Set the kernel of every attention layer of a model. Check it with [`check_attention_backend`] first.

    Unlike `ModelMixin.set_attention_backend` it also accepts a model that is wrapped by its engine, and does not
    change the kernel of other models in the process.
    """
    for processor in _processors(model):
        processor._attention_backend = AttentionBackendName(name)


@contextmanager
def use_attention_backend(model: nn.Module, name: str | None) -> Iterator[None]:
    """Use another kernel in the model inside the context. `None` changes nothing."""
    if name is None:
        yield
        return
    kept = [(processor, processor._attention_backend) for processor in _processors(model)]
    set_attention_backend(model, name)
    try:
        yield
    finally:
        for processor, backend in kept:
            processor._attention_backend = backend


def _processors(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if isinstance(module, AttentionModuleMixin)]
