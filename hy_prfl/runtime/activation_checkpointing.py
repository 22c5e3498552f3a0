"""Blocks that are recomputed in the backward pass, their inputs kept on the device or in host memory."""

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recompute_blocks(
    model: Any, *, num_blocks: int | None = None, offload: bool = False, buffers: "HostBuffers | None" = None
) -> None:
    """
    Make the model keep only the inputs of its first blocks for the backward pass, and compute the rest again there.

    The first ones, because the last ones go first in the backward pass: what they have kept is gone when the others
    are computed again.

    Args:
        model (`ModelMixin`):
            A model with `blocks` that diffusers' `enable_gradient_checkpointing` knows.
        num_blocks (`int`, *optional*):
            How many blocks; all if left out.
        offload (`bool`, defaults to `False`):
            Keep these inputs in host memory, see [`InputOffload`].
        buffers (`HostBuffers`, *optional*):
            Where; buffers of the model's own if left out.

    Raises:
        ValueError: If the model has fewer blocks.
    """
    if num_blocks is not None and not 0 <= num_blocks <= len(model.blocks):
        raise ValueError(
            f"Blocks to recompute must be in [0, {len(model.blocks)}], the {type(model).__name__}'s, got {num_blocks}."
        )
    recomputed = frozenset(list(model.blocks)[:num_blocks])
    input_offload = InputOffload(buffers or HostBuffers()) if offload else None

    def run(block: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        if block not in recomputed:
            return block(hidden_states, *args)
        with nullcontext() if input_offload is None else input_offload.of(hidden_states):
            # Not reentrant: the reentrant kind fails with adapters and when losses are summed.
            return checkpoint(block, hidden_states, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(run)


class InputOffload:
    """
    Keeps the inputs of recomputed blocks in host memory between forward and backward pass.

    At 75,600 tokens of width 5,120 an input has 0.77 GB in bfloat16, and a model of 40 blocks keeps 31 GB of them. Only
    the hidden states move; what all blocks share (text, time and rotary embeddings) stays.

    With CUDA the host memory is pinned and a stream of its own copies while the blocks compute: an input leaves during
    its block, and comes back during the backward pass of the block after it. That part has not been run yet: it was
    written without a GPU at hand. Without CUDA plain copies are made.

    All device memory belongs to the stream that computes, which waits for a copy before it goes on without the tensor.
    Were it handed over with `record_stream`, it would be free only when the device gets there, and the host, which is
    many blocks ahead of the device, would take new memory for every input.
    """

    def __init__(self, buffers: "HostBuffers") -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[_HostTensor] | None = None
        self._buffers = buffers

    def of(self, hidden_states: torch.Tensor) -> saved_tensors_hooks:
        """Context in which autograd, if it saves these hidden states, keeps them in host memory."""
        # Autograd keeps the functions below, and they must not keep the tensor.
        address, shape = hidden_states.data_ptr(), hidden_states.shape

        def pack(tensor: torch.Tensor) -> "torch.Tensor | _HostTensor":
            is_input = tensor.data_ptr() == address and tensor.shape == shape
            return self._store(tensor) if is_input else tensor

        def unpack(packed: "torch.Tensor | _HostTensor") -> torch.Tensor:
            return packed.take_back() if isinstance(packed, _HostTensor) else packed

        return saved_tensors_hooks(pack, unpack)

    def _store(self, tensor: torch.Tensor) -> "_HostTensor":
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        before = None if self._last is None else self._last()
        if before is not None:
            before.let_go()
        stored = _HostTensor(tensor.detach(), self._stream, self._last, self._buffers)
        # Weak: what is kept belongs to its graph, and is gone with it.
        self._last = weakref.ref(stored)
        return stored


class HostBuffers:
    """
    Buffers in host memory that serve one update after the other, page-locked for tensors of a GPU.

    They are registered with CUDA at their own size. torch's allocator of pinned memory would round each of them up to a
    power of two, 43 GB instead of 31 at 14B 720P.
    """

    def __init__(self) -> None:
        # By shape and type.
        self.free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that are free."""
        return sum(buffer.nbytes for free in self.free.values() for buffer in free)

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A buffer of the shape and type of a tensor, page-locked if that is on a GPU. Its content is anything."""
        free = self.free[like.shape, like.dtype]
        if free:
            return free.pop()
        buffer = torch.empty(like.shape, dtype=like.dtype)
        if like.is_cuda:
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
            weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Let a buffer from `take` be used again."""
        self.free[buffer.shape, buffer.dtype].append(buffer)


class _HostTensor:
    """A tensor in host memory that knows which one will be wanted after it: the one that was stored before."""

    def __init__(
        self,
        tensor: torch.Tensor,
        stream: torch.cuda.Stream | None,
        before: "weakref.ref[_HostTensor] | None",
        buffers: HostBuffers,
    ) -> None:
        self.device, self.stream, self.before, self.buffers = tensor.device, stream, before, buffers
        self.leaving: torch.Tensor | None = None
        self.fetched: torch.Tensor | None = None
        self.host = buffers.take(tensor)
        if stream is None:
            self.host.copy_(tensor)
            return
        self.leaving = tensor
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)

    def let_go(self) -> None:
        """Give the device memory back, after the copy; once the block is computed that it has been made beside."""
        if self.leaving is not None:
            self._wait()
            self.leaving = None

    def fetch(self) -> None:
        """Start the copy back to the device, unless it has been started."""
        if self.stream is not None and self.fetched is None:
            self.fetched = torch.empty_like(self.host, device=self.device, pin_memory=False)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.fetched.copy_(self.host, non_blocking=True)

    def take_back(self) -> torch.Tensor:
        """The tensor on its device; starts fetching the one that will be wanted next."""
        if self.stream is None:
            return self.host.clone()
        self.let_go()
        self.fetch()
        self._wait()
        tensor, self.fetched = self.fetched, None
        assert tensor is not None
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return tensor

    def _wait(self) -> None:
        """Let the stream that computes wait for the copies."""
        assert self.stream is not None
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def __del__(self) -> None:
        # A copy that nobody took is still on its way into memory that somebody else may get now.
        if self.fetched is not None:
            self._wait()
        # Whoever gets it next writes into it on the same stream, after the copies that are still under way.
        self.buffers.give_back(self.host)
