"""Page-locked host memory, which a GPU copies from and to while it computes."""

import math
import weakref

import torch


# Bytes of a page. Only whole pages can be locked.
PAGE = 4096


def empty_page_locked(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """
    Uninitialised host memory that is page-locked for the current GPU.

    It is registered with CUDA at its own size. torch's allocator of pinned memory would round each size up to a power of
    two: 43 GB instead of 31 for the inputs of the blocks of 14B at 720P. The memory is unlocked when the returned tensor
    itself is freed: keep it, views of it are not enough.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    # No other tensor may have memory in the same pages: they would be locked twice.
    size = -(-num_bytes // PAGE) * PAGE
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    tensor = memory[start : start + num_bytes].view(dtype).view(shape)
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(tensor.data_ptr(), size, 0))
    weakref.finalize(tensor, runtime.cudaHostUnregister, tensor.data_ptr())
    return tensor
