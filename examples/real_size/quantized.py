"""Layers of bitsandbytes on the pretended device. The real ones compute only on a GPU."""

import math
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from hy_prfl.configs.base import Quantization, check
from hy_prfl.runtime.quantization import quantized_names


# Weights that share a scale, and scales that share a scale of their own.
BLOCK, SCALE_BLOCK = 64, 256


def quantize_layers(model: nn.Module, option: str, kind: Quantization | None) -> None:
    """
    Replace the layers of a model on the meta device that a run quantises. Types of its weights must be those of a run.

    Args:
        option (`str`):
            Name of the option that quantises, for the error.
        kind (`str`, *optional*):
            Nothing is replaced if None.

    Raises:
        ValueError: If it is not nf4, which all recipes use.
    """
    if kind is None:
        return
    check(kind == "nf4", option, kind, "nf4 or left out on the pretended device")
    for name in quantized_names(model):
        layer_name = name.removesuffix(".weight")
        linear = cast(nn.Linear, model.get_submodule(layer_name))
        model.set_submodule(layer_name, FourBitLinear(linear, has_adapter=layer_name.endswith(".base_layer")))


class FourBitLinear(nn.Module):
    """
    Has the tensors of bitsandbytes' `Linear4bit` with nf4 and double quantisation, and allocates what it allocates.

    Written after bitsandbytes 0.50, for inputs with more than 1,536 tokens. For fewer it has a fused kernel on some
    GPUs, which dequantises nothing.

    Args:
        linear (`nn.Linear`):
            The layer to replace.
        has_adapter (`bool`):
            Whether an adapter is added to its output. peft copies the output of such a layer.
    """

    def __init__(self, linear: nn.Linear, *, has_adapter: bool) -> None:
        super().__init__()
        self.has_adapter = has_adapter
        # Autograd's backward dequantises to the type that the weight had.
        self.shape, self.dtype = linear.weight.shape, linear.weight.dtype
        numel = self.shape.numel()
        num_scales = math.ceil(numel / BLOCK)
        # bitsandbytes casts the bias to the type of products the first time, and keeps it.
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.to(torch.bfloat16), requires_grad=False)
        with torch.device("meta"):
            self.register_buffer("packed", torch.empty(math.ceil(numel / 2), 1, dtype=torch.uint8))
            self.register_buffer("scales", torch.empty(num_scales, dtype=torch.uint8))
            self.register_buffer("scales_of_scales", torch.empty(math.ceil(num_scales / SCALE_BLOCK)))
            self.register_buffer("mean_scale", torch.empty(()))
            self.register_buffer("values", torch.empty(16))
            self.register_buffer("scale_values", torch.empty(256))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Products are computed in bfloat16, also where autocast leaves inputs in float32.
        product = _Product.apply(hidden_states.to(torch.bfloat16), self.bias, self).to(hidden_states.dtype)
        return product.clone() if self.has_adapter else product

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, in new memory."""
        scales = self.get_buffer("scales")
        # The scales are computed first.
        scales = torch.empty_like(scales, dtype=torch.float32) + self.get_buffer("mean_scale")
        return torch.empty(self.shape, dtype=dtype, device=scales.device)


class _Product(torch.autograd.Function):
    """Keeps no weight for the backward pass: it dequantises again."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, bias: torch.Tensor | None, layer: FourBitLinear
    ) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(hidden_states, layer.dequantized(hidden_states.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch.matmul(grad, ctx.layer.dequantized(ctx.layer.dtype).to(grad.dtype)), None, None
