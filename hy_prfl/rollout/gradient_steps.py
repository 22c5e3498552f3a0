"""Steps of a rollout that take gradient: which latents are scored, and how the reward's gradient reaches the weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


Average = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Foresight:
    """
    Look-ahead: the clean latents that a step predicts are scored, with new noise, instead of the next latents.

    The clean latents are `x0 = x - sigma * v`. They need no additional forward pass, and the new noise can have a level at
    which the reward model is accurate. Levels are uniform in `levels`, whose ends are cut to the level of the next latents.

    Args:
        noise (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Standard normal noise, float32.
        uniform (`torch.Tensor` of shape `(batch_size,)`):
            One draw in [0, 1) for each sample.
        levels (`tuple[float, float]`):
            Lowest and highest sigma.
    """

    noise: torch.Tensor
    uniform: torch.Tensor
    levels: tuple[float, float]

    def sigmas(self, next_sigma: float) -> torch.Tensor:
        """Noise levels `(batch_size,)` for a step that leads to `next_sigma`."""
        low, high = (min(level, next_sigma) for level in self.levels)
        return low + (high - low) * self.uniform


def mean_foreseen_gain(sigmas: torch.Tensor, levels: tuple[float, float]) -> float:
    """
    Mean of `sigma * (1 - level)` over consecutive steps, see [`GradientStep`].

    Args:
        sigmas (`torch.Tensor` of shape `(num_steps + 1,)`):
            Noise levels at which the steps start, and the one at which the last step ends.
        levels (`tuple[float, float]`):
            Those of [`Foresight`].
    """
    gains = [
        float(sigma) * (1 - sum(min(level, float(next_sigma)) for level in levels) / 2)
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True)
    ]
    return sum(gains) / len(gains)


@dataclass
class GradientStep:
    """
    A step of the chain that takes gradient.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            The latents that are scored: the next noisy latents, or with a [`Foresight`] the predicted ones with new
            noise. Float32, without gradient.
        timesteps (`torch.Tensor` of shape `(batch_size,)`):
            Noise level of these latents, `1000 * sigma`.
        gain (`torch.Tensor`, scalar or of shape `(batch_size,)`):
            Factor between a change of the step's velocity and that of `latents`: the width of the step in sigma, which
            grows along a shifted chain, or with a [`Foresight`] `sigma * (1 - sigma of the new noise)`. The gradient in
            the velocity is about that in the latents times this factor.
        velocity (`torch.Tensor` of the shape of `latents`):
            The model's output at the step, or at the first of several, without gradient.
        surrogates (`Callable[[torch.Tensor], Iterator[torch.Tensor]]`):
            Given the gradient of a loss in `latents`, returns scalars whose gradients in the generator's weights add up
            to that of the loss. Each must be differentiated, scaled or not, before the next one is requested. The
            argument `velocity_grad`, if given, is the gradient of another loss in `velocity`. The gradient of that loss
            in the weights is added, from the step of `velocity` alone: not through the input of the model to the steps
            before it. `average`, if given, averages a gradient over the ranks that share a clip. Call it only once.
        base_velocity (`torch.Tensor` of the shape of `latents`, *optional*):
            The base model's output for the same input as `velocity`, without gradient, if it was requested.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    gain: torch.Tensor
    velocity: torch.Tensor
    surrogates: Callable[..., Iterator[torch.Tensor]]
    base_velocity: torch.Tensor | None = None


def surrogate(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    latents_grad: torch.Tensor,
    *,
    velocity_grad: torch.Tensor | None = None,
    average: Average | None = None,
) -> Iterator[torch.Tensor]:
    """The only surrogate of latents and a velocity that still have their graph, see [`GradientStep`]."""
    total = (latents * latents_grad).sum()
    yield total if velocity_grad is None else total + (velocity * velocity_grad).sum()
