"""The random draws of an update, from given generators."""

from collections.abc import Sequence

import torch

from ..data.collators import LatentBatch
from ..flow_matching import sample_noise
from ..models.conditioning import Conditioning
from ..rollout.gradient_steps import Foresight


def draw_step_indices(generator: torch.Generator, step_range: tuple[int, int], count: int) -> list[int]:
    """
    Distinct steps of a chain that take gradient, ascending; every step of the range is equally likely.

    Args:
        step_range (`tuple[int, int]`):
            First and last step that may take gradient.
        count (`int`):
            How many.
    """
    first, last = step_range
    left = list(range(first, last + 1))
    draws = [torch.randint(n, (), generator=generator) for n in range(len(left), 0, -1)[:count]]
    return sorted(left.pop(int(draw)) for draw in draws)


def draw_states(generator: torch.Generator, index_range: tuple[int, int], count: int | None) -> list[int]:
    """
    Steps of a chain whose starting state is stored, ascending.

    Args:
        index_range (`tuple[int, int]`):
            First and last step to choose from.
        count (`int`, *optional*):
            How many; all if left out.
    """
    first, last = index_range
    order = torch.randperm(last - first + 1, generator=generator)[: count or last - first + 1]
    return sorted(first + int(index) for index in order)


def draw_foresight(
    generators: Sequence[torch.Generator], shape: Sequence[int], levels: Sequence[float], device: torch.device
) -> Foresight:
    """
    New noise and its level for each sample, see [`~hy_prfl.rollout.gradient_steps.Foresight`].

    Args:
        generators (`Sequence[torch.Generator]`):
            One for each sample.
        shape (`Sequence[int]`):
            Shape of the latents of a sample.
        levels (`Sequence[float]`):
            Lowest and highest sigma.
    """
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    noise = sample_noise(shape, generators)
    low, high = levels
    return Foresight(noise.to(device), uniform.to(device), (low, high))


def choose_prompts(
    batch: LatentBatch, generators: Sequence[torch.Generator], *, long_probability: float, null_probability: float
) -> Conditioning:
    """
    Images of the batch, and for each clip its caption, its long caption or the empty prompt.

    Args:
        generators (`Sequence[torch.Generator]`):
            One for each clip.
        long_probability, null_probability (`float`):
            Probability of the long caption, and of the empty prompt instead of either caption.
    """
    draws = torch.stack([torch.rand(2, generator=generator) for generator in generators], dim=1)
    draws = draws.to(batch.prompt_embeds.device)
    is_long, is_null = draws[0] < long_probability, draws[1] < null_probability
    embeds = torch.where(is_long[:, None, None], batch.long_prompt_embeds, batch.prompt_embeds)
    embeds = torch.where(is_null[:, None, None], batch.null_prompt_embeds, embeds)
    return Conditioning.of(batch).with_prompts(embeds)
