"""Rectified flow as pure tensor functions, without models, processes or global random state."""

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

    All random numbers in training come from such generators. A draw depends on its key and not on earlier draws, so a
    resumed run makes the same draws. Without `rank` in the key, all ranks make the same draw.
    """
    words = np.random.SeedSequence(key).generate_state(2, dtype=np.uint32)
    return torch.Generator().manual_seed((int(words[0]) << 31) ^ int(words[1]))


def sample_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard normal noise `(len(generators), *shape)`, float32 on the CPU. Each sample has its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def row_noise(row_id: str, shape: Sequence[int], *, seed: int, draw: int = 0) -> torch.Tensor:
    """
    Standard normal noise for one row of a dataset, float32 on the CPU.

    It depends only on `(row_id, seed, draw)`. So the score of a row does not depend on its batch, its rank, or the
    number of rows that are scored.
    """
    digest = hashlib.sha256(row_id.encode()).digest()
    return torch.randn(tuple(shape), generator=make_generator(int.from_bytes(digest[:8], "big"), seed, draw))


def row_timesteps(row_id: str, num_ranges: int, *, seed: int) -> torch.Tensor:
    """
    One timestep from each range `(1000 k / n, 1000 (k + 1) / n]`, `k = 0 .. n - 1`, for one row of a dataset.

    Each is uniform within its range and, like [`row_noise`], depends only on `(row_id, seed)` and the range. The paper
    evaluates its reward models at one random timestep in each of five ranges.

    Returns:
        `torch.Tensor` of shape `(num_ranges,)`: timesteps in (0, 1000], float32 on the CPU.
    """
    digest = hashlib.sha256(b"timesteps " + row_id.encode()).digest()
    generator = make_generator(int.from_bytes(digest[:8], "big"), seed)
    # 1 - U[0, 1) is in (0, 1].
    offsets = 1 - torch.rand(num_ranges, generator=generator)
    return NUM_TRAIN_TIMESTEPS * (torch.arange(num_ranges) + offsets) / max(1, num_ranges)


def shift_sigmas(sigmas: torch.Tensor, flow_shift: float) -> torch.Tensor:
    """Shifted noise levels `shift * u / (1 + (shift - 1) * u)`. A shift above 1 means more noise; Wan uses 3 or 5."""
    return flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)


@dataclass(frozen=True)
class NoiseLevels(ABC):
    """
    Distribution of the noise levels in training.

    Args:
        flow_shift (`float`):
            Shift of the noise levels, see [`shift_sigmas`]. 1 means no shift.
    """

    flow_shift: float

    @abstractmethod
    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        """Draw one noise level before the shift, of shape `(1,)` and in (0, 1]."""

    @abstractmethod
    def probability_from(self, timestep: float) -> float:
        """Probability that the timestep of a noise level is at least `timestep`, which is in [0, 1000)."""

    def sample(
        self, generators: Sequence[torch.Generator], timestep_range: tuple[float, float] = (-math.inf, math.inf)
    ) -> torch.Tensor:
        """
        Draw one noise level per sample.

        Args:
            generators (`Sequence[torch.Generator]`):
                One generator per sample.
            timestep_range (`tuple[float, float]`):
                Range `[low, high)` of the timesteps `1000 * sigma`. Levels outside it are drawn again, so it must have
                a positive probability.

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
    """Uniform over 1000 levels in (0, 1], as in upstream's code. Without a shift it is the paper's U(0, 1]."""

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(NUM_TRAIN_TIMESTEPS, (1,), generator=generator)
        return 1 - index.float() / NUM_TRAIN_TIMESTEPS

    def probability_from(self, timestep: float) -> float:
        levels = shift_sigmas(torch.arange(1, NUM_TRAIN_TIMESTEPS + 1) / NUM_TRAIN_TIMESTEPS, self.flow_shift)
        return float((sigmas_to_timesteps(levels) >= timestep).double().mean())


@dataclass(frozen=True)
class LogitNormalLevels(NoiseLevels):
    """
    Sigmoid of a normal variable (SD3, https://arxiv.org/abs/2403.03206, section 3.1).

    Args:
        mean, std (`float`):
            Mean and standard deviation of the normal variable.
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
    """The distribution of noise levels that a run's options select."""
    if config.weighting_scheme == "uniform":
        return UniformLevels(config.flow_shift)
    return LogitNormalLevels(config.flow_shift, mean=config.logit_mean, std=config.logit_std)


def sigmas_to_timesteps(sigmas: torch.Tensor) -> torch.Tensor:
    """Timesteps that the models take, `1000 * sigma`, in [0, 1000]."""
    return NUM_TRAIN_TIMESTEPS * sigmas


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """
    Noisy latents on the straight path from data to noise, `(1 - sigma) * latents + sigma * noise`.

    Args:
        latents, noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Clean latents and standard normal noise.
        sigmas (`torch.Tensor` of shape `(batch_size,)`):
            Noise levels in [0, 1]; 1 is pure noise.
    """
    sigmas = sigmas.to(latents).view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Target of the generator: the velocity of the path, `noise - latents` (paper, equation 2)."""
    return noise - latents
