"""Which steps of a rollout call the generator, and the velocity of those that do not."""

from collections import deque
from collections.abc import Sequence

import torch


def forward_steps(timesteps: Sequence[float], interval: int, *, boundary: float = 0.0) -> list[int]:
    """
    Steps of a chain that call the generator: the first two, then one in `interval`. With two experts, so for each.

    Args:
        timesteps (`Sequence[float]`):
            Timesteps of the sampler, one per step, descending.
        interval (`int`):
            With 1 they are all steps.
        boundary (`float`, defaults to 0.0):
            Timestep below which the second expert is called, see [`~hy_prfl.models.experts.Experts`].
    """
    num_first = sum(timestep >= boundary for timestep in timesteps)
    places = [*range(num_first), *range(len(timesteps) - num_first)]
    return [index for index, place in enumerate(places) if place < 2 or (place - 1) % interval == 0]


class StepCache:
    """
    Velocities of one chain, from which those of skipped steps are extrapolated, linearly in the index of the step.

    This is TaylorSeer (arXiv 2503.06923) of first order on the model's output: diffusers' `TaylorSeerCacheConfig` in its
    lite mode. diffusers' hooks are not used, because a step that is skipped here calls nothing: ZeRO-3 gathers no
    weights, and engines, adapters and compiled blocks do not see it.

    Which steps are skipped depends only on their index, so all ranks take the same branch. ZeRO-3 and context
    parallelism need that. Where to skip could also depend on what the first block returns (diffusers'
    `FirstBlockCacheConfig`); ranks would then have to agree in each step. That was also less precise, see
    `docs/prfl.md`.

    Args:
        forward_steps (`Sequence[int]`):
            Steps that call the model, see [`forward_steps`].
    """

    def __init__(self, forward_steps: Sequence[int]) -> None:
        self.forward_steps = frozenset(forward_steps)
        self.known: deque[tuple[int, torch.Tensor]] = deque(maxlen=2)

    def add(self, index: int, velocity: torch.Tensor) -> None:
        """Remember what the model returned at a step, without its graph. Steps ascend."""
        self.known.append((index, velocity.detach()))

    def velocity_at(self, index: int) -> torch.Tensor | None:
        """The velocity at a step that is skipped; None at one that calls the model."""
        if index in self.forward_steps:
            return None
        (before, earlier), (last, velocity) = self.known
        return velocity + (index - last) / (last - before) * (velocity - earlier)
