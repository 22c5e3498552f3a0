"""Splits the tokens of one clip over several ranks (Ulysses), in the generator and in the reward model."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ModelMixin
from diffusers.hooks import apply_context_parallel
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.attention import AttentionModuleMixin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh


class ContextParallelGroup:
    """
    The ranks that share a clip: `degree` neighbours. All of them get the same sample, noise, step and prompt.

    A rank's gradient is what its own tokens contribute, and data-parallel engines average over all ranks: the
    generator's loss must be multiplied by `degree`. The reward model does that itself, below its pooling, whose weights
    see all tokens on every rank.

    Args:
        degree (`int`):
            Ranks in a group. Must divide the world size.

    Raises:
        ValueError: If it does not.
    """

    def __init__(self, degree: int) -> None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size % degree:
            raise ValueError(
                f"`context_parallel_degree` {degree} does not divide the number of processes, {world_size}."
            )
        self.degree = degree
        # A run may be kept to the CPU where there are GPUs.
        is_on_cpu = dist.get_backend() == "gloo"
        device = torch.device("cpu") if is_on_cpu else torch.device("cuda", torch.cuda.current_device())
        mesh = init_device_mesh(
            device.type, (world_size // degree, 1, degree), mesh_dim_names=("data", "ring", "ulysses")
        )
        self.config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))
        self.config.setup(dist.get_rank(), world_size, device, mesh=mesh)
        self.process_group = mesh["ulysses"].get_group()

    def split(self, model: ModelMixin) -> None:
        """
        Make the model's forward split its tokens over the group and gather them at its end.

        What `ModelMixin.enable_parallelism` does, which refuses to work without an accelerator.
        """
        for module in model.modules():
            if isinstance(module, AttentionModuleMixin):
                module.processor._parallel_config = self.config
            if isinstance(module, TokenGather):
                module.grad_scale = float(self.degree)
        apply_context_parallel(model, self.config.context_parallel_config, model._cp_plan)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over the group, in place. A collective."""
        dist.all_reduce(tensor, group=self.process_group)
        return tensor.div_(self.degree)


class TokenGather(nn.Module):
    """
    The place of a model where all tokens are on every rank again; the identity in a single process.

    Everything after it computes the same on all ranks of a group, everything before it only its own tokens' share, so the
    gradient is multiplied by the size of the group on its way down.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grad_scale = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `hidden_states` `(batch_size, num_tokens, dim)` as it is."""
        return hidden_states if self.grad_scale == 1.0 else _ScaleGradient.apply(hidden_states, self.grad_scale)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.scale, None


def check_divisible(
    degree: int, *, num_heads: int, patch_size: Sequence[int], shapes: Iterable[Sequence[int]], source: str
) -> None:
    """
    Refuse clips that do not divide over the group, before anything large is loaded.

    Args:
        shapes (`Iterable[Sequence[int]]`):
            Latent shapes `(num_channels, num_frames, height, width)`.

    Raises:
        ValueError: Naming the shape, its number of tokens or the heads, and the degrees that would fit.
    """
    for shape in sorted({tuple(shape) for shape in shapes}):
        num_tokens = math.prod(size // patch for size, patch in zip(shape[1:], patch_size, strict=True))
        if num_tokens % degree or num_heads % degree:
            fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0 and num_tokens % n == 0]
            raise ValueError(
                f"`context_parallel_degree` {degree} does not divide the {num_heads} heads and the {num_tokens} tokens "
                f"of latents {list(shape)} in {source}; these do: {fitting}."
            )
