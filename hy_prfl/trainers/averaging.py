"""A moving average of the weights in training, whichever engine holds them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from ..runtime.sharding import Masters


class WeightAverage:
    """
    Exponential moving average of the float32 weights in training; each rank averages the share it holds.

    Args:
        masters (`Masters`):
            The weights.
        decay (`float`):
            Share of the average that an update leaves, once there were enough of them; see diffusers' `EMAModel`.
    """

    def __init__(self, masters: Masters, *, decay: float) -> None:
        self.masters = masters
        # One tensor after the other: all at once would need a temporary copy of them.
        self.ema = EMAModel(masters.values(), decay=decay, foreach=False)

    def step(self) -> None:
        """Take the weights as they are now into the average."""
        self.ema.step(self.masters.values())

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the average into the model for the time of the context."""
        kept = [value.detach().clone() for value in self.masters.values()]
        self.masters.write(self.ema.shadow_params)
        try:
            yield
        finally:
            self.masters.write(kept)

    def restart(self) -> None:
        """Begin with the weights as they are now."""
        self.ema.shadow_params = [value.detach().clone() for value in self.masters.values()]
        self.num_averaged = 0

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the average by these weights, whole and by the names of the parameters; each rank takes its share."""
        self.ema.shadow_params = self.masters.share_of(weights)

    @property
    def num_averaged(self) -> int:
        """Number of updates in the average, which its decay depends on."""
        return self.ema.optimization_step

    @num_averaged.setter
    def num_averaged(self, value: int) -> None:
        self.ema.optimization_step = value
