"""A moving average of the trained weights, under any engine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from ..runtime.sharding import Masters


class WeightAverage:
    """
    Exponential moving average of the trained float32 weights; each rank averages the share that it holds.

    Args:
        masters (`Masters`):
            The weights.
        decay (`float`):
            Share of the old average that an update keeps, after a warm-up; see diffusers' `EMAModel`.
    """

    def __init__(self, masters: Masters, *, decay: float) -> None:
        self.masters = masters
        # Tensor by tensor: all at once would need a temporary copy of all weights.
        self.ema = EMAModel(masters.values(), decay=decay, foreach=False)

    def step(self) -> None:
        """Update the average with the current weights."""
        self.ema.step(self.masters.values())

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Context in which the model has the averaged weights."""
        kept = [value.detach().clone() for value in self.masters.values()]
        self.masters.write(self.ema.shadow_params)
        try:
            yield
        finally:
            self.masters.write(kept)

    def restart(self) -> None:
        """Restart the average from the current weights."""
        self.ema.shadow_params = [value.detach().clone() for value in self.masters.values()]
        self.num_averaged = 0

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the average by these full weights, by parameter name; each rank takes its share."""
        self.ema.shadow_params = self.masters.share_of(weights)

    @property
    def num_averaged(self) -> int:
        """Number of updates in the average, which its decay depends on."""
        return self.ema.optimization_step

    @num_averaged.setter
    def num_averaged(self, value: int) -> None:
        self.ema.optimization_step = value
