"""Rectified-flow arithmetic as pure tensor functions: no models, no processes, no global random state."""

import hashlib
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from .configs.base import TrainingConfig


NUM_TRAIN_TIMESTEPS = 1000


def make_generator(*key: int) -> torch.Generator:
    """
    CPU generator seeded by a tuple of non-negative integers, such as `(seed, global_step, micro_step, rank)`.

    All random numbers in training come from such generators, so a draw depends on its key and not on earlier draws: a
    resumed run makes the same draws, and without `rank` in the key all ranks make the same one.
    """
    words = np.random.SeedSequence(key).generate_state(2, dtype=np.uint32)
    return torch.Generator().manual_seed((int(words[0]) << 31) ^ int(words[1]))


def sample_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard normal noise `(len(generators), *shape)`, each sample from its own generator, float32 on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def row_noise(row_id: str, shape: Sequence[int], *, seed: int, draw: int = 0) -> torch.Tensor:
    """
    Standard normal noise that belongs to one row of a dataset, float32 on the CPU.

    A function of `(row_id, seed, draw)` only, so a row's score does not depend on its batch, its rank, or on how many
    other rows are scored.
    """
    digest = hashlib.sha256(row_id.encode()).digest()
    return torch.randn(tuple(shape), generator=make_generator(int.from_bytes(digest[:8], "big"), seed, draw))


def row_timesteps(row_id: str, num_ranges: int, *, seed: int) -> torch.Tensor:
    """
    One timestep out of each range `(1000 k / n, 1000 (k + 1) / n]`, `k = 0 .. n - 1`, for one row of a dataset.

    Uniform within its range, and, as [`row_noise`], a function of `(row_id, seed)` and the range only. The paper evaluates
    its reward models at one random timestep in each of five ranges.

    Returns:
        `torch.Tensor` of shape `(num_ranges,)`: timesteps in (0, 1000], float32 on the CPU.
    """
    digest = hashlib.sha256(b"timesteps " + row_id.encode()).digest()
    generator = make_generator(int.from_bytes(digest[:8], "big"), seed)
    # 1 - U[0, 1) is in (0, 1].
    offsets = 1 - torch.rand(num_ranges, generator=generator)
    return NUM_TRAIN_TIMESTEPS * (torch.arange(num_ranges) + offsets) / max(1, num_ranges)


def shift_sigmas(sigmas: torch.Tensor, flow_shift: float) -> torch.Tensor:
    """Shifted noise levels `shift * u / (1 + (shift - 1) * u)`; a shift above 1 favours high noise (Wan uses 3 or 5)."""
    return flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)


@dataclass(frozen=True)
class NoiseLevels(ABC):
    """
    Distribution of the noise levels that clean clips are trained at.

    Args:
        flow_shift (`float`):
            Shift of the noise levels, see [`shift_sigmas`]; 1 leaves them as they are drawn.
    """

    flow_shift: float

    @abstractmethod
    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        """One noise level before the shift, `(1,)`, in (0, 1]."""

    @abstractmethod
    def probability_from(self, timestep: float) -> float:
        """How often a noise level is drawn whose timestep is not below this one, in [0, 1000)."""

    def sample(
        self, generators: Sequence[torch.Generator], timestep_range: tuple[float, float] = (-math.inf, math.inf)
    ) -> torch.Tensor:
        """
        Draw the noise level of each sample.

        Args:
            generators (`Sequence[torch.Generator]`):
                One for each sample.
            timestep_range (`tuple[float, float]`):
                Draw on condition that `1000 * sigma` is not below the first and is below the second number, by drawing
                again until it is. It must have a positive probability.

        Returns:
            `torch.Tensor` of shape `(len(generators),)`: sigmas in (0, 1], float32 on the CPU.
        """
        low, high = timestep_range
        sigmas = []
        for generator in generators:
            sigma = shift_sigmas(self._draw(generator), self.flow_shift)
            while not low <= sigmas_to_timesteps(sigma) < high:
                sigma = shift_sigmas(self._draw(generator), self.flow_shift)
            sigmas.append(sigma)
        return torch.cat(sigmas)


@dataclass(frozen=True)
class UniformLevels(NoiseLevels):
    """An index of the schedule of 1000 levels, as upstream draws it; without a shift the paper's U(0, 1]."""

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(NUM_TRAIN_TIMESTEPS, (1,), generator=generator)
        return 1 - index.float() / NUM_TRAIN_TIMESTEPS

    def probability_from(self, timestep: float) -> float:
        levels = shift_sigmas(torch.arange(1, NUM_TRAIN_TIMESTEPS + 1) / NUM_TRAIN_TIMESTEPS, self.flow_shift)
        return float((sigmas_to_timesteps(levels) >= timestep).double().mean())


@dataclass(frozen=True)
class LogitNormalLevels(NoiseLevels):
    """
    The sigmoid of a normal variable (SD3, https://arxiv.org/abs/2403.03206, section 3.1).

    Args:
        mean, std (`float`):
            Of that variable.
    """

    mean: float
    std: float

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        draw = compute_density_for_timestep_sampling(
            "logit_normal", 1, logit_mean=self.mean, logit_std=self.std, generator=generator
        )
        return draw.clamp(min=1 / NUM_TRAIN_TIMESTEPS)

    def probability_from(self, timestep: float) -> float:
        sigma = timestep / NUM_TRAIN_TIMESTEPS
        unshifted = sigma / (self.flow_shift - (self.flow_shift - 1) * sigma)
        if unshifted <= 1 / NUM_TRAIN_TIMESTEPS:
            return 1.0
        return 1 - statistics.NormalDist(self.mean, self.std).cdf(math.log(unshifted / (1 - unshifted)))


def noise_levels(config: TrainingConfig) -> NoiseLevels:
    """The distribution that a run's options ask for."""
    if config.weighting_scheme == "uniform":
        return UniformLevels(config.flow_shift)
    return LogitNormalLevels(config.flow_shift, mean=config.logit_mean, std=config.logit_std)


def sigmas_to_timesteps(sigmas: torch.Tensor) -> torch.Tensor:
    """The model's time, `1000 * sigma`."""
    return NUM_TRAIN_TIMESTEPS * sigmas


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """
    Point on the straight path from data to noise, `(1 - sigma) * latents + sigma * noise`.

    Args:
        latents, noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Clean latents and standard normal noise.
        sigmas (`torch.Tensor` of shape `(batch_size,)`):
            Noise levels in [0, 1]; 1 is pure noise.
    """
    sigmas = sigmas.to(latents).view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the generator should predict: the path's velocity, `noise - latents` (paper, equation 2)."""
    return noise - latents
