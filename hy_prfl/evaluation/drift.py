"""How far the samples and velocities of a generator have moved from those at the start of its run."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..flow_matching import add_noise, row_noise, sigmas_to_timesteps
from ..models.conditioning import Conditioning
from ..rollout.sampling import predict_velocity


# Latents and velocities are about standard normal: float16 keeps more digits of them than bfloat16.
STORAGE_DTYPE = torch.float16
# Noise levels at which velocities are compared, if they belong to an expert in training.
DRIFT_SIGMAS = (0.3, 0.6, 0.9)


class BaseSamples:
    """
    Samples and velocities of the generator before training, in host memory, by row.

    With a LoRA switched off the base could be sampled again; after full fine-tuning it could not. Both cases keep the
    samples. A row of Wan 14B at 720P, 81 frames, takes 9.7 MB for the sample and as much for each of its velocities.

    Args:
        sigmas (`Sequence[float]`):
            Noise levels in (0, 1) at which velocities are compared. The states there are fixed: the base's samples with
            noise that depends on row and seed only.
        seed (`int`):
            Seed of that noise.
    """

    def __init__(self, sigmas: Sequence[float], *, seed: int) -> None:
        self.sigmas = list(sigmas)
        self.seed = seed
        self.samples: dict[int, torch.Tensor] = {}
        self.velocities: dict[int, torch.Tensor] = {}

    def add(
        self,
        transformer: nn.Module,
        indices: Sequence[int],
        latents: torch.Tensor,
        conditioning: Conditioning,
        *,
        row_ids: Sequence[str],
    ) -> None:
        """
        Keep the samples of a batch, and the generator's velocities at noised states of them.

        Args:
            transformer (`nn.Module`):
                The generator, before any update.
            indices (`Sequence[int]`), row_ids (`Sequence[str]`):
                Positions of the rows in their dataset, and their ids, from which their noise is drawn.
            latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
                The clean samples of the batch.
        """
        stored = latents.to("cpu", STORAGE_DTYPE)
        self.samples.update(zip(indices, stored, strict=True))
        velocities = self._velocities(transformer, indices, conditioning, row_ids)
        self.velocities.update(zip(indices, velocities.to("cpu", STORAGE_DTYPE), strict=True))

    def distances(
        self,
        transformer: nn.Module,
        indices: Sequence[int],
        latents: torch.Tensor,
        conditioning: Conditioning,
        *,
        row_ids: Sequence[str],
    ) -> list[tuple[float, float]]:
        """
        For each row the relative distance `|now - base| / |base|` of its sample, and that of its velocities, averaged
        over the noise levels. Arguments as in [`add`].

        Raises:
            KeyError: If the base has no sample of a row.
        """
        velocities = self._velocities(transformer, indices, conditioning, row_ids)
        return [
            (
                float(_relative_distance(sample.flatten(), self.samples[index].flatten())),
                float(_relative_distance(velocity.flatten(1), self.velocities[index].flatten(1)).mean()),
            )
            for index, sample, velocity in zip(indices, latents, velocities, strict=True)
        ]

    def save(self, path: Path) -> None:
        """Write all rows to one safetensors file."""
        named = {f"{index}.sample": sample for index, sample in self.samples.items()}
        named |= {f"{index}.velocities": velocities for index, velocities in self.velocities.items()}
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)

    def load(self, paths: Iterable[Path]) -> None:
        """Read the files of all processes: with another number of processes, rows are divided differently."""
        self.samples, self.velocities = {}, {}
        for path in paths:
            for name, tensor in load_file(path).items():
                index, _, kind = name.partition(".")
                (self.samples if kind == "sample" else self.velocities)[int(index)] = tensor

    def _velocities(
        self, transformer: nn.Module, indices: Sequence[int], conditioning: Conditioning, row_ids: Sequence[str]
    ) -> torch.Tensor:
        """Velocities `(batch_size, num_levels, ...)` at the fixed states, float32."""
        device = conditioning.prompt_embeds.device
        clean = torch.stack([self.samples[index] for index in indices]).to(device, torch.float32)
        velocities = []
        for draw, level in enumerate(self.sigmas):
            noise = torch.stack([row_noise(row_id, clean.shape[1:], seed=self.seed, draw=draw) for row_id in row_ids])
            sigmas = torch.full((len(clean),), level, device=device)
            states = add_noise(clean, noise.to(device), sigmas)
            velocities.append(predict_velocity(transformer, states, sigmas_to_timesteps(sigmas), conditioning).float())
        return torch.stack(velocities, dim=1)


def _relative_distance(now: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Relative distance along the last dimension."""
    base = base.to(now.device, torch.float32)
    return (now.float() - base).norm(dim=-1) / base.norm(dim=-1)
