"""
Runs the real models on fake tensors and counts the memory and the FLOPs that they would need.

Modules, sampler, autograd and activation checkpointing are those of a training run. Only the tensors are torch's fake
tensors, which have a shape and a type but no data. Bytes are counted when a storage is allocated and freed, FLOPs by
the formulas of torch's own FLOP counter. So a change of the models needs no change here.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..configs.base import Quantization
from ..runtime.quantization import quantized_names


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# FLOPs of each kernel. Fake tensors are on the CPU. torch does not count the CPU's attention kernel, so it is added
# here.
FLOPS: dict[Any, Any] = {**flop_registry, _FLASH: _attention_flops, _FLASH_BACKWARD: _attention_backward_flops}


@dataclass(frozen=True)
class Phase:
    """
    Memory and FLOPs of one phase of an update.

    Args:
        peak (`float`):
            Peak of the allocated bytes, without parameters, their gradients and what was allocated before the
            simulation.
        kept (`float`):
            Bytes that are still allocated at the end of the phase.
        flops (`float`):
            FLOPs. A multiplication with an addition counts as two.
        offloaded (`float`, defaults to 0.0):
            Bytes in host memory at the end of the phase.
    """

    peak: float
    kept: float
    flops: float
    offloaded: float = 0.0

    def extrapolate(self, other: "Phase", factor: float) -> "Phase":
        """Linear extrapolation: `self` at 0, `other` at 1, the result at `factor`."""
        pairs = zip(
            (self.peak, self.kept, self.flops, self.offloaded),
            (other.peak, other.kept, other.flops, other.offloaded),
            strict=True,
        )
        return Phase(*(first + factor * (second - first) for first, second in pairs))


class MemoryMeter(TorchDispatchMode):
    """
    Counts the bytes of all tensors that are allocated while it is active, until they are freed.

    Args:
        ignore (`list[torch.Tensor]`):
            Tensors that are not counted: parameters and inputs. They must live longer than the meter.
        on_gpu (`bool`):
            Add the float32 accumulator of the queries' gradient that flash attention's backward allocates on a GPU.
        checkpointed (`Iterable[nn.Module]`, *optional*):
            Blocks whose inputs activation checkpointing keeps. A phase counts them as offloaded.
    """

    def __init__(self, ignore: list[torch.Tensor], *, on_gpu: bool, checkpointed: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.block_inputs = 0
        for block in checkpointed:
            block.register_forward_pre_hook(self._add_input)
        self.live = 0
        self.peak = 0
        self.flops = 0
        self.phases: dict[str, Phase] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in ignore}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """
        Record the memory and FLOPs of the context as the phase `name`.

        With another phase inside, it is what follows the end of that one.
        """
        self._count_anew()
        yield
        self.phases[name] = Phase(self.peak, self.live, self.flops, self.block_inputs)
        self._count_anew()

    def _count_anew(self) -> None:
        self.peak, self.flops, self.block_inputs = self.live, 0, 0

    def _add_input(self, block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.block_inputs += args[0].nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        workspace = 4 * args[1].numel() if self.on_gpu and func.overloadpacket is _FLASH_BACKWARD else 0
        self.peak = max(self.peak, self.live + workspace)
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


class _FusedRMSNorm(torch.autograd.Function):
    """Allocates the same as the fused kernel of a GPU. The CPU's kernels make many intermediate tensors."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, weight, hidden_states.new_empty(hidden_states.shape[:-1]))
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden_states, weight, _ = ctx.saved_tensors
        needs_input, needs_weight = ctx.needs_input_grad
        return (
            torch.empty_like(hidden_states) if needs_input else None,
            torch.empty_like(weight) if needs_weight else None,
        )


def use_gpu_kernels(model: nn.Module) -> None:
    """Make each `RMSNorm` of a model on fake CPU tensors allocate the same as on a GPU, in float32 under autocast."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = partial(_rms_norm, module)  # type: ignore[method-assign]


def _rms_norm(module: nn.RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = module.weight
    if torch.is_autocast_enabled("cpu"):
        hidden_states, weight = hidden_states.float(), weight.float()
    return _FusedRMSNorm.apply(hidden_states, weight)


class _FourBitLinear(torch.autograd.Function):
    """Allocates the same as bitsandbytes' `MatMul4Bit`: a weight is dequantised for one product and then freed."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        whole = hidden_states.new_empty(weight.shape, dtype=weight.dtype)
        return nn.functional.linear(hidden_states, whole.to(hidden_states.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ grad.new_empty(ctx.shape, dtype=ctx.dtype).to(grad.dtype), None, None


def use_quantized_layers(model: nn.Module, kind: Quantization) -> None:
    """
    Make the linear layers of a model's blocks allocate the same as layers with quantised weights.

    torchao casts a weight to the type of the activations for each product, and autograd keeps the cast weight until
    the backward pass. With activation checkpointing these are the weights of one block. bitsandbytes keeps none.
    """
    for name in quantized_names(model):
        module = cast(nn.Linear, model.get_submodule(name.rpartition(".")[0]))
        dtype = torch.float8_e4m3fn if kind == "float8" else torch.int8
        module.register_buffer("quantized", torch.empty(module.weight.shape, dtype=dtype))
        module.register_buffer("scale", torch.empty(module.weight.shape[0]))
        module.forward = partial(_LINEAR[kind], module)  # type: ignore[method-assign]


def _int8_linear(module: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    quantized, scale = module.get_buffer("quantized"), module.get_buffer("scale")
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    product = torch.mm(rows, quantized.t().to(hidden_states.dtype))
    result = (product * scale.to(product.dtype)).reshape(*hidden_states.shape[:-1], -1)
    if module.bias is not None:
        result += module.bias
    return result.to(hidden_states.dtype)


def _float8_linear(module: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    quantized, scale = module.get_buffer("quantized"), module.get_buffer("scale")
    whole = (quantized.to(torch.float32) * scale[:, None]).to(module.weight.dtype)
    product = torch.matmul(hidden_states, whole.t())
    return product if module.bias is None else product + module.bias


def _nf4_linear(module: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    # `bnb_4bit_compute_dtype` is bfloat16 wherever there is a GPU.
    bias = None if module.bias is None else module.bias.to(torch.bfloat16)
    result = _FourBitLinear.apply(hidden_states.to(torch.bfloat16), module.weight, bias)
    return result.to(hidden_states.dtype)


_LINEAR: dict[str, Callable[[nn.Linear, torch.Tensor], torch.Tensor]] = {
    "int8": _int8_linear,
    "float8": _float8_linear,
    "nf4": _nf4_linear,
}


def autocast(enabled: bool) -> AbstractContextManager[Any]:
    """bfloat16 autocast, as Accelerate uses it around a model's forward."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def drop_gradients(model: nn.Module) -> None:
    """Free each parameter's gradient as soon as it is computed. The plan counts gradients separately."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def extrapolated(
    simulate: Callable[[int], Mapping[str, Phase]], num_layers: int, *, first: int = 2
) -> dict[str, Phase]:
    """
    Extrapolate the phases of a model with equal blocks from runs with `first` and `first + 1` blocks.

    Args:
        simulate (`Callable[[int], Mapping[str, Phase]]`):
            Runs the model with a number of blocks.
        num_layers (`int`):
            Number of blocks of the model. A model with at most `first + 1` blocks is run as it is.
    """
    if num_layers <= first + 1:
        return dict(simulate(num_layers))
    shorter, longer = simulate(first), simulate(first + 1)
    return {name: shorter[name].extrapolate(longer[name], num_layers - first) for name in shorter}
