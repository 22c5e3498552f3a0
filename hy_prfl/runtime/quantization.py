"""
Frozen weights in 8 or 4 bits, by diffusers' own quantisation: those of the linear layers in a model's blocks.

Only weights are quantised: products are computed in the type of the activations. Norms, embeddings, modulation, the last
projection and a reward model's pooling and head keep their type: they are small (2 % of 14B) and sensitive to rounding.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..configs.base import Quantization, check


# Package that each kind needs; the extra `quantization` has both.
PACKAGES: dict[str, str] = {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes"}
# Weights that share a scale, and scales that share a scale of their own (QLoRA, https://arxiv.org/abs/2305.14314).
NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256
# Bytes that bitsandbytes keeps with each weight, in float32: the tables of the 4- and 8-bit codes, and the mean scale.
NF4_TABLES = 4 * (16 + 256 + 1)


def check_quantization(option: str, kind: Quantization | None, *, device: torch.device) -> None:
    """
    Refuse a quantisation that cannot be made here.

    Args:
        option (`str`):
            Name of the option, for the error.
        kind (`str`, *optional*):
            `int8`, `float8` or `nf4`; None is always fine.
        device (`torch.device`):
            Where the model will compute.

    Raises:
        ImportError: If the package that makes it is not installed.
        ValueError: If it needs a GPU and there is none.
    """
    if kind is None:
        return
    on_gpu = device.type == "cuda"
    check(kind != "nf4" or on_gpu, option, kind, f"int8 or float8 on {device.type}; nf4 needs a CUDA GPU")
    if find_spec(PACKAGES[kind]) is None:
        raise ImportError(f"`{option}` {kind} needs {PACKAGES[kind]}: pip install 'hy-prfl[quantization]'.")


class Quantizer:
    """
    Quantises weights of linear layers in blocks while a model is filled, one weight at a time.

    The result is that of diffusers' `from_pretrained(quantization_config=...)`. But at most one weight is in memory
    unquantised, and each weight can be checked before.

    Args:
        kind (`str`):
            `int8` and `float8`: torchao, one scale for each row of a weight. `nf4`: bitsandbytes, as in QLoRA.
        device (`torch.device`):
            Where weights are quantised, and stay.
        dtype (`torch.dtype`):
            Type that products are computed in.
    """

    def __init__(self, kind: Quantization, *, device: torch.device, dtype: torch.dtype) -> None:
        self.kind, self.device, self.dtype = kind, device, dtype

    def start(self, model: Any) -> None:
        """Prepare a model that is on the meta device."""
        from diffusers.quantizers.auto import DiffusersAutoQuantizer

        kept = [name for name, _ in model.named_children() if name != "blocks"]
        self.quantizer = DiffusersAutoQuantizer.from_config(self._config(kept), pre_quantized=False)
        self.quantizer.validate_environment()
        self.quantizer.preprocess_model(model, device_map=None, keep_in_fp32_modules=[])
        self.model = model

    def place(self, name: str, weight: torch.Tensor) -> bool:
        """Quantise a weight into the model. Returns False, and does nothing, if this weight is not quantised."""
        if not self.quantizer.check_if_quantized_param(self.model, weight, name, {}):
            return False
        self.quantizer.create_quantized_param(self.model, weight, name, self.device, {}, [])
        return True

    def finish(self) -> None:
        """Finish the model. peft reads `hf_quantizer` to find out the kind of its layers."""
        self.quantizer.postprocess_model(self.model)
        self.model.hf_quantizer = self.quantizer

    def _config(self, kept: list[str]) -> Any:
        if self.kind == "nf4":
            from diffusers import BitsAndBytesConfig

            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
                llm_int8_skip_modules=kept,
            )
        from diffusers import TorchAoConfig
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        # Inductor's settings are global: torchao must not change them.
        make: Callable[..., Any] = Int8WeightOnlyConfig if self.kind == "int8" else Float8WeightOnlyConfig
        return TorchAoConfig(make(set_inductor_config=False), modules_to_not_convert=kept)


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a [`Quantizer`] made this parameter."""
    # Attributes of torchao and bitsandbytes, because neither package has to be installed.
    return hasattr(tensor, "tensor_data_names") or getattr(tensor, "quant_state", None) is not None


def dequantized(tensor: torch.Tensor) -> torch.Tensor:
    """A quantised parameter as an ordinary tensor; any other tensor unchanged."""
    quant_state = getattr(tensor, "quant_state", None)
    if quant_state is not None:
        from diffusers.quantizers.bitsandbytes.utils import dequantize_bnb_weight

        return dequantize_bnb_weight(tensor, quant_state)
    return tensor.dequantize() if is_quantized(tensor) else tensor


def keep_out_of_ddp(model: nn.Module) -> None:
    """
    Make DDP ignore the quantised weights of a model.

    DDP would broadcast them from the first process, but collectives do not support their type. It is not needed: all
    processes read the same files and round in the same way.
    """
    names = [name for name, parameter in model.named_parameters() if is_quantized(parameter)]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def quantized_names(model: nn.Module) -> list[str]:
    """Names of the weights that a [`Quantizer`] would quantise in this model, which may already have an adapter."""
    return [
        f"{name}.weight"
        for name, module in model.get_submodule("blocks").named_modules(prefix="blocks")
        if isinstance(module, nn.Linear) and ".lora_" not in name
    ]


def quantized_bytes(kind: Quantization, shape: tuple[int, ...]) -> int:
    """Bytes of a quantised weight of this shape `(out_features, in_features)`, with its scales."""
    rows, columns = shape
    numel = rows * columns
    if kind == "nf4":
        num_scales = math.ceil(numel / NF4_BLOCK)
        return math.ceil(numel / 2) + num_scales + 4 * math.ceil(num_scales / NF4_SCALE_BLOCK) + NF4_TABLES
    # Each row has a float32 scale and, with int8, a zero point of one byte.
    return numel + rows * (5 if kind == "int8" else 4)
