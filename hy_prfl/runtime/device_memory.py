"""How much memory a process has taken on its accelerator."""

import torch


def peak_device_memory(device: torch.device) -> int | None:
    """
    Most bytes that tensors took on an accelerator since the process began; None on the CPU.

    What the driver, kernels and the allocator's unused blocks take is not in it.
    """
    if device.type == "cpu":
        return None
    torch.accelerator.synchronize()
    return int(torch.accelerator.max_memory_allocated())
