"""Chains that serve several reward updates: their states on the host, and which of them an update starts from."""

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .models.conditioning import Conditioning


# Latents are about standard normal: float16 keeps more digits of them than bfloat16.
STORAGE_DTYPE = torch.float16


@dataclass(frozen=True)
class Rollout:
    """
    States of one chain that was walked without gradient, in host memory.

    Args:
        ids (`tuple[str, ...]`):
            Rows of the prompts, for messages.
        conditioning (`Conditioning`):
            What the chain was given.
        indices (`tuple[int, ...]`):
            Steps of the chain that can be taken from here, ascending.
        latents, velocities (`torch.Tensor` of shape `(len(indices), batch_size, num_channels, num_frames, height, width)`):
            Noisy latents before each of these steps, and the generator's output there at that time, float16.
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
        """Gather what [`~hy_prfl.rollout.record_states`] yields, each state as soon as it is there."""
        indices, latents, velocities = [], [], []
        for index, state, velocity in states:
            indices.append(index)
            latents.append(state.to("cpu", STORAGE_DTYPE))
            velocities.append(velocity.to("cpu", STORAGE_DTYPE))
        host = conditioning.to("cpu", conditioning.prompt_embeds.dtype)
        return cls(tuple(ids), host, tuple(indices), torch.stack(latents), torch.stack(velocities))


class StoredState(NamedTuple):
    """
    Where an update starts.

    Args:
        rollout (`Rollout`):
            The chain that it is of.
        step_index (`int`):
            The step that is taken from here.
        latents, velocity (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            The state, float16 in host memory.
    """

    rollout: Rollout
    step_index: int
    latents: torch.Tensor
    velocity: torch.Tensor


class RolloutBuffer:
    """
    The last rollouts. The gradient of a reward update passes through few steps only, so a state of a chain that was
    walked some updates ago does, and most of the forwards of an update are saved.

    Args:
        size (`int`):
            Rollouts to keep.
    """

    def __init__(self, size: int) -> None:
        self.rollouts: deque[Rollout] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self.rollouts)

    def add(self, rollout: Rollout) -> None:
        """Keep a rollout, in the place of the oldest if there are enough."""
        self.rollouts.append(rollout)

    def clear(self) -> None:
        """Forget all of them."""
        self.rollouts.clear()

    def draw(self, generator: torch.Generator) -> StoredState:
        """
        Any state of any rollout.

        Args:
            generator (`torch.Generator`):
                The same on all ranks: they hold different clips, but must take the same step.
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
    """How far a velocity is from the stored one, `|now - stored| / |stored|` over the whole batch, float32 scalar."""
    before = stored.to(now.device, torch.float32)
    return (now - before).norm() / before.norm()
