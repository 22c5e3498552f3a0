"""Offloads a frozen model: its weights are on the device only while it is used."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .page_locking import empty_page_locked


class HostWeights:
    """
    Keeps the weights of a frozen model in host memory, and copies them to the device inside a context.

    A reward model with 8 of Wan 14B's 40 blocks takes 6.4 GB in bfloat16. An update takes minutes and needs it for
    less than a second, and not when memory is highest: in the generator's backward pass and the optimizer's step.
    Nothing is copied back, because the weights do not change. With CUDA the host memory is page-locked.

    Args:
        model (`nn.Module`):
            The model, on any device. Its parameters and buffers must not be written to afterwards.
        device (`torch.device`):
            Device on which the model runs.

    Raises:
        ValueError: If a parameter requires a gradient: an optimizer's changes on the device would be lost.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if trained:
            raise ValueError(f"Only a frozen model can be kept in host memory; {trained[0]!r} requires a gradient.")
        self.device = device
        self._tensors = [*model.parameters(), *model.buffers()]
        # The weights stay page-locked as long as these tensors exist.
        self._host: list[torch.Tensor] = []
        for tensor in self._tensors:
            host = tensor.data.cpu()
            if torch.cuda.is_available():
                host = empty_page_locked(tensor.shape, tensor.dtype).copy_(host)
            tensor.data = host
            self._host.append(host)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in host memory."""
        return sum(host.nbytes for host in self._host)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Context with the weights on the device. Backward passes through the model must be inside it too."""
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.data = host.to(self.device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            for tensor, host in zip(self._tensors, self._host, strict=True):
                tensor.data = host
