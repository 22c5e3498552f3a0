"""Rollouts that are reused by several reward updates: their states in host memory, and the choice of a state."""

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..models.conditioning import Conditioning


# Latents are roughly standard normal, so float16 is more precise for them than bfloat16.
STORAGE_DTYPE = torch.float16


@dataclass(frozen=True)
class Rollout:
    """
    States of one denoising chain that was computed without gradient, in host memory.

    Args:
        ids (`tuple[str, ...]`):
            Ids of the rows that the prompts are from, for messages.
        conditioning (`Conditioning`):
            Conditioning of the chain.
        indices (`tuple[int, ...]`):
            Steps of the chain whose states are stored, ascending.
        latents, velocities (`torch.Tensor` of shape `(len(indices), batch_size, num_channels, num_frames, height, width)`):
            Noisy latents before each of these steps, and the velocity that the generator predicted there, float16.
    """

    ids: tuple[str, ...]
    conditioning: Conditioning
    indices: tuple[int, ...]
    latents: torch.Tensor
    velocities: torch.Tensor

    @classmethod
    def of(
        cls,
        states: Iterable[tuple[int, torch.Tensor, torch.Tensor]],
        *,
        ids: Iterable[str],
        conditioning: Conditioning,
    ) -> "Rollout":
        """Collect the states that [`~hy_prfl.rollout.chain.record_states`] yields. Each goes to the host at once."""
        indices, latents, velocities = [], [], []
        for index, state, velocity in states:
            indices.append(index)
            latents.append(state.to("cpu", STORAGE_DTYPE))
            velocities.append(velocity.to("cpu", STORAGE_DTYPE))
        host = conditioning.to("cpu", conditioning.prompt_embeds.dtype)
        return cls(tuple(ids), host, tuple(indices), torch.stack(latents), torch.stack(velocities))


class StoredState(NamedTuple):
    """
    The state that an update starts from.

    Args:
        rollout (`Rollout`):
            Chain of the state.
        step_index (`int`):
            Step of the chain that starts at this state.
        latents, velocity (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Noisy latents and predicted velocity, float16 in host memory.
    """

    rollout: Rollout
    step_index: int
    latents: torch.Tensor
    velocity: torch.Tensor


class RolloutBuffer:
    """
    The most recent rollouts.

    The gradient of a reward update passes through a few steps only. So an update can start from a state of an earlier
    update's chain, which saves most of its forwards.

    Args:
        size (`int`):
            Maximum number of rollouts.
    """

    def __init__(self, size: int) -> None:
        self.rollouts: deque[Rollout] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self.rollouts)

    def add(self, rollout: Rollout) -> None:
        """Add a rollout. If the buffer is full, the oldest is removed."""
        self.rollouts.append(rollout)

    def clear(self) -> None:
        """Remove all rollouts."""
        self.rollouts.clear()

    def draw(self, generator: torch.Generator) -> StoredState:
        """
        Draw a random rollout, and a random one of its states.

        Args:
            generator (`torch.Generator`):
                Must be the same on all ranks: they have different clips, but must take the same step.
        """
        rollout = self.rollouts[int(torch.randint(len(self.rollouts), (), generator=generator))]
        place = int(torch.randint(len(rollout.indices), (), generator=generator))
        return StoredState(rollout, rollout.indices[place], rollout.latents[place], rollout.velocities[place])

    def save(self, path: Path) -> None:
        """Write all rollouts to one safetensors file."""
        tensors: dict[str, torch.Tensor] = {}
        header = []
        for number, rollout in enumerate(self.rollouts):
            given = rollout.conditioning
            named = {"latents": rollout.latents, "velocities": rollout.velocities} | vars(given)
            tensors |= {f"{number}.{name}": tensor for name, tensor in named.items() if tensor is not None}
            header.append({"ids": rollout.ids, "indices": rollout.indices})
        save_file(tensors, path, metadata={"rollouts": json.dumps(header)})

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        self.clear()
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            header = json.loads(file.metadata()["rollouts"])
        for number, entry in enumerate(header):
            conditioning = Conditioning(
                tensors[f"{number}.prompt_embeds"],
                tensors.get(f"{number}.image_embeds"),
                tensors.get(f"{number}.condition"),
            )
            self.add(
                Rollout(
                    tuple(entry["ids"]),
                    conditioning,
                    tuple(entry["indices"]),
                    tensors[f"{number}.latents"],
                    tensors[f"{number}.velocities"],
                )
            )


def relative_change(now: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Relative change of the velocity, `|now - stored| / |stored|` over the whole batch, as a float32 scalar."""
    before = stored.to(now.device, torch.float32)
    return (now - before).norm() / before.norm()
