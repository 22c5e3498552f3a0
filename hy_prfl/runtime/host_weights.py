"""A frozen model that is on the device only while it is used."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class HostWeights:
    """
    Keeps the weights of a frozen model in host memory, and copies them to the device inside a context.

    A reward model of 8 of Wan 14B's 40 blocks has 6.4 GB in bfloat16. It is needed for less than a second of an update
    that takes minutes, and not while the generator's backward pass and the optimizer's step need the most memory.
    Nothing is copied back, because nothing has changed. With CUDA the host memory is pinned.

    Args:
        model (`nn.Module`):
            The model, anywhere. Its parameters and buffers must not be written to from here on.
        device (`torch.device`):
            Where it computes.

    Raises:
        ValueError: If one of its parameters takes gradient: what an optimizer changes on the device would be lost.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if trained:
            raise ValueError(f"Only a frozen model can be kept in host memory; {trained[0]!r} takes gradient.")
        self.device = device
        self._tensors = [*model.parameters(), *model.buffers()]
        for tensor in self._tensors:
            host = tensor.data.cpu()
            tensor.data = host.pin_memory() if torch.cuda.is_available() else host

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Context with the weights on the device. Backward passes through the model must be inside it too."""
        kept = [tensor.data for tensor in self._tensors]
        for tensor, host in zip(self._tensors, kept, strict=True):
            tensor.data = host.to(self.device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            for tensor, host in zip(self._tensors, kept, strict=True):
                tensor.data = host
