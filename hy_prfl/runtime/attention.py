"""Attention kernels by diffusers' names: which of them can do what is asked for, and putting one into a model."""

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


# Those whose call, as diffusers makes it, is known to autograd. `_flash_3` is an operator without a backward pass,
# SageAttention has none, and of the others nothing is known.
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
    Refuse a kernel that is unknown, not installed, or cannot do what is asked of it; needs no model.

    It is tried on a few tokens by one of Wan's attentions: under autocast, weights in float32 make queries and keys in
    float32 beside values in half precision, which torch's kernels take and others do not. A kernel from the Hub is
    fetched.

    Args:
        name (`str`):
            The kernel's name in `diffusers.models.attention_dispatch.AttentionBackendName`.
        option (`str`):
            Name of the option, for the error.
        trains (`bool`):
            Whether a backward pass will follow.
        device (`torch.device`), dtype (`torch.dtype`):
            Where the model's weights are, and their type.
        autocast (`ContextManager`, *optional*):
            Context in which the model computes.

    Raises:
        ValueError: If it is refused, with the reason and the names that would do.
    """
    known = sorted(backend.value for backend in _AttentionBackendRegistry.list_backends())
    if name not in known:
        raise ValueError(f"`{option}` must be one of {', '.join(known)}, got '{name}'.")
    if trains and name not in TRAINABLE_BACKENDS:
        raise ValueError(
            f"`{option}` must have a backward pass, which '{name}' has not (it may serve the rollout); these have: "
            f"{', '.join(TRAINABLE_BACKENDS)}."
        )
    with torch.device("meta"):
        attention = WanAttention(dim=256, heads=2, dim_head=128, processor=WanAttnProcessor()).requires_grad_(trains)
    # Nothing random: what the run draws later must not depend on this option.
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
    Let every attention of the model use a kernel that [`check_attention_backend`] has let through.

    Unlike `ModelMixin.set_attention_backend` it also takes a model in its engine's wrapping, and leaves alone what
    other models of the process use.
    """
    for processor in _processors(model):
        processor._attention_backend = AttentionBackendName(name)


@contextmanager
def use_attention_backend(model: nn.Module, name: str | None) -> Iterator[None]:
    """Let the model use another kernel for the time of the context; `None` leaves it what it has."""
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
