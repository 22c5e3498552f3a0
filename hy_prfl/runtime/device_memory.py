"""How much memory a process has taken on its accelerator."""

import torch


def peak_device_memory(device: torch.device) -> int | None:
    """
    Most bytes that tensors took on an accelerator since the process began; None on the CPU.

    The memory of the driver, of kernels and of the allocator's unused blocks is not included.
    """
    if device.type == "cpu":
        return None
    torch.accelerator.synchronize()
    return int(torch.accelerator.max_memory_allocated())
