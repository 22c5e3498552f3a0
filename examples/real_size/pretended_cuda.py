"""
A pretended CUDA device: torch's fake tensors with device "cuda", in a CPU build of torch.

Fake tensors have a shape, a type and a device, but no data, and nothing is computed. Everything else is real: modules,
autograd, autocast with CUDA's rules, activation checkpointing. So a 14B training step at 720P runs in a minute on one
core, and what is an error on CUDA (types that do not match, tensors on another device) is an error here.

Not included: NCCL, cuDNN's workspaces, the fragmentation of the allocator, and the values of tensors.
"""

import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hy_prfl.planning.simulation import MemoryMeter


FLASH = torch.ops.aten._scaled_dot_product_flash_attention
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
DEVICE_MAX_HEAD_DIM = 256
ALLOCATION_UNIT = 512


def start() -> None:
    """
    Pretend until the end of this process that it has a CUDA device. Call [`library.load_library`] first.

    Raises:
        RuntimeError: If torch has been built with CUDA.
    """
    if torch.version.cuda is not None:
        raise RuntimeError("A build of torch with CUDA cannot pretend; use a CPU build.")
    torch.cuda.is_available = lambda: True
    torch.cuda.is_initialized = lambda: True
    torch.cuda._lazy_init = lambda: None
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.Stream = _Stream  # type: ignore[misc]
    torch.cuda.current_stream = lambda device=None: _Stream()
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment]
    torch.cuda.cudart = lambda: _Runtime
    torch.cuda.check_error = lambda result: None
    F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    nn.RMSNorm.forward = _rms_norm  # type: ignore[method-assign]
    FakeTensor.data = property(torch.Tensor.data.__get__, _set_data)  # type: ignore[attr-defined, assignment]


def _set_data(self: FakeTensor, value: torch.Tensor) -> None:
    """A fake tensor keeps its old device when its data is replaced. A real one has the device of its data."""
    torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
    if isinstance(value, FakeTensor):
        self.fake_device = value.fake_device


class _Stream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass


class _Runtime:
    """The used part of CUDA's runtime. Memory is not really page-locked."""

    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:  # noqa: N802
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:  # noqa: N802
        return 0


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that torch would choose on a GPU. As on CUDA, operands of different types are an error."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        types = f"{query.dtype}, {key.dtype} and {value.dtype}"
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {types}.")
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and is_half and query.shape[-1] <= DEVICE_MAX_HEAD_DIM:
        return FLASH(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    takes_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    return EFFICIENT(query, key, value, attn_mask, takes_gradient, dropout_p, is_causal, scale=scale)[0]


class _FusedRMSNorm(torch.autograd.Function):
    """Allocates the same as CUDA's fused kernel."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        statistics = hidden_states.new_empty((*hidden_states.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(hidden_states, weight, statistics)
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden_states, weight, _ = ctx.saved_tensors
        wanted = zip((hidden_states, weight), ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if is_wanted else None for tensor, is_wanted in wanted)


def _rms_norm(self: nn.RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = self.weight
    # CUDA's autocast computes the norm in float32, the CPU's does not.
    if torch.is_autocast_enabled("cuda"):
        hidden_states, weight = hidden_states.float(), weight.float()
    if weight.dtype != hidden_states.dtype:
        return F.rms_norm(hidden_states, self.normalized_shape, weight, self.eps)
    return _FusedRMSNorm.apply(hidden_states, weight)


class DeviceMeter(MemoryMeter):
    """Counts bytes on the pretended device, FLOPs, and how often the host waits for the device."""

    def __init__(self) -> None:
        super().__init__([], on_gpu=True)
        self.num_syncs = 0
        self.sync_places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            (tensor,) = args
            self._note_sync(tensor.device)
            # A fake tensor has no value. A step reads values only to check that they are finite.
            return True if tensor.dtype == torch.bool else 1
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cuda":
            target = (kwargs or {}).get("device")
            if target is not None and torch.device(target).type == "cpu" and not kwargs.get("non_blocking"):
                self._note_sync(args[0].device)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._add(tensor.untyped_storage())
        workspace = 4 * args[1].numel() if func.overloadpacket is FLASH_BACKWARD else 0
        self.peak = max(self.peak, self.live + workspace)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            size = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
            self.live += size
            weakref.finalize(storage, self._release, key, size)

    def _note_sync(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        self.num_syncs += 1
        frame = sys._getframe(2)
        while frame.f_back is not None and "hy_prfl" not in frame.f_code.co_filename:
            frame = frame.f_back
        self.sync_places[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1


def put_on_device(model: nn.Module) -> None:
    """Replace the parameters and buffers of a model on the meta device by new ones on the pretended device."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
