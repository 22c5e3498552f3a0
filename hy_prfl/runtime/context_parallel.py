"""Context parallelism (Ulysses, ring): the tokens of a clip are split over several ranks."""

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ModelMixin, ParallelConfig
from diffusers.hooks import apply_context_parallel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh


class ContextParallelGroup:
    """
    The ranks that share a clip: `degree` consecutive ranks. All of them get the same sample, noise, step and prompt.

    Each rank computes the gradient of its own tokens, and data-parallel engines average gradients over all ranks. So
    the generator's loss must be multiplied by `degree`. The reward model scales the gradient itself, at the input of
    its pooling: pooling and head see all tokens on every rank.

    Args:
        degree (`int`):
            Number of ranks in a group. Must divide the world size.
        timeout (`timedelta`, *optional*):
            How long a rank waits for the others of its group; torch's default (10 minutes with NCCL) if left out.
        ring_degree (`int`, defaults to 1):
            Number of ranks in a ring. With diffusers' ring attention each rank gets the keys and values of the others
            in turn; the remaining factor `degree / ring_degree` divides the heads (Ulysses). Needs a kernel that
            returns the log-sum-exp. For inference only: the backward pass of ring attention is not supported here.

    Raises:
        ValueError: If `degree` does not divide the world size, or `ring_degree` does not divide `degree`.
    """

    def __init__(self, degree: int, timeout: timedelta | None = None, ring_degree: int = 1) -> None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size % degree:
            raise ValueError(
                f"`context_parallel_degree` {degree} does not divide the number of processes, {world_size}."
            )
        if degree % ring_degree:
            raise ValueError(f"`ring_degree` {ring_degree} does not divide `context_parallel_degree` {degree}.")
        self.degree = degree
        # Index of this group among the groups of the run.
        self.index, self.num_groups = dist.get_rank() // degree, world_size // degree
        self.is_first_rank = dist.get_rank() % degree == 0
        first = self.index * degree
        # Each rank creates only its own group. A mesh over all ranks would create hundreds of groups.
        self.process_group = dist.new_group(
            list(range(first, first + degree)), timeout=timeout, use_local_synchronization=True
        )
        # Not from `torch.cuda.is_available()`: a run may use the CPU on a machine with GPUs.
        device_type = "cpu" if dist.get_backend() == "gloo" else "cuda"
        ulysses_degree = degree // ring_degree
        self.config = ContextParallelConfig(ulysses_degree=ulysses_degree, ring_degree=ring_degree)
        # The cuDNN kernel of ring attention reads it.
        self.config._world_size = degree
        # diffusers' hooks read only this attribute.
        self.mesh = self.config._flattened_mesh = DeviceMesh.from_group(self.process_group, device_type)
        if ring_degree > 1:
            # diffusers' attention reads these. As in diffusers' own mesh, consecutive ranks form a Ulysses group.
            ring, ulysses = divmod(dist.get_rank() - first, ulysses_degree)
            parts = {
                "ring": [first + other * ulysses_degree + ulysses for other in range(ring_degree)],
                "ulysses": [first + ring * ulysses_degree + other for other in range(ulysses_degree)],
            }
            meshes = {
                name: DeviceMesh.from_group(
                    dist.new_group(ranks, timeout=timeout, use_local_synchronization=True), device_type
                )
                for name, ranks in parts.items()
            }
            self.config._ring_mesh, self.config._ulysses_mesh = meshes["ring"], meshes["ulysses"]
            self.config._ring_local_rank, self.config._ulysses_local_rank = ring, ulysses

    def split(self, model: ModelMixin) -> None:
        """
        Make the model's forward split its tokens over the group, and gather them at its end.

        Used instead of `ModelMixin.enable_parallelism`, which does not work without an accelerator. Its attention
        would also run its forward again in the backward pass, in addition to activation checkpointing.
        """
        for module in model.modules():
            if isinstance(module, WanAttention) and self.config.ring_degree > 1:
                module.processor._parallel_config = ParallelConfig(context_parallel_config=self.config)
            elif isinstance(module, WanAttention):
                processor = UlyssesAttnProcessor(self.process_group)
                processor._attention_backend = module.processor._attention_backend
                module.set_processor(processor)
            if isinstance(module, TokenGather):
                module.grad_scale = float(self.degree)
        apply_context_parallel(model, self.config, model._cp_plan)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one rank of the group. A collective."""
        found = torch.tensor(float(flag), device=self.mesh.device_type)
        dist.all_reduce(found, group=self.process_group)
        return bool(found > 0)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over the group; `tensor` may be overwritten. A collective."""
        # NCCL refuses a view with gaps, and gloo reduces it to something else.
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.process_group)
        return tensor.div_(self.degree)


class UlyssesAttnProcessor(WanAttnProcessor):
    """
    Wan's attention for tokens that are split over a group. Each rank attends over all tokens for its share of the
    heads.

    The exchanges are autograd operators around the usual call of the kernel. So the kernel keeps its output and
    log-sum-exp for its backward pass, and every kernel that can be trained in one process can be trained here.
    Cross-attention needs no exchange: every rank has the whole text.

    Args:
        group (`ProcessGroup`):
            The ranks that share a clip. Their number must divide the number of heads.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention from and to `hidden_states` `(batch_size, num_tokens / group_size, dim)`."""
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attention_mask is not None or rotary_emb is None:
            raise ValueError("Self-attention over split tokens needs `rotary_emb` and takes no `attention_mask`.")
        value = attn.to_v(hidden_states)
        heads = (attn.heads, -1)
        query = rotate(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads), rotary_emb)
        key = rotate(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads), rotary_emb)
        # CUDA's autocast computes norms in float32 and projections in half precision. Kernels need one type.
        query, key = query.to(value.dtype), key.to(value.dtype)
        query, key, value = (tokens_to_heads(states, self.group) for states in (query, key, value.unflatten(2, heads)))
        output = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        output = heads_to_tokens(output, self.group).flatten(2, 3).type_as(hidden_states)
        for layer in attn.to_out:
            output = layer(output)
        return output


def rotate(states: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """
    Rotary position embedding: rotate each pair of neighbouring channels.

    Args:
        states (`torch.Tensor` of shape `(batch_size, num_tokens, num_heads, head_dim)`):
            Queries or keys.
        rotary_emb (`tuple[torch.Tensor, torch.Tensor]`):
            Cosines and sines `(1, num_tokens, 1, head_dim)`. Each value appears twice, as in `WanRotaryPosEmbed`.
    """
    cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
    real, imaginary = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-2).type_as(states)


def tokens_to_heads(states: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-to-all from `(batch_size, tokens / n, heads, head_dim)` to `(batch_size, tokens, heads / n, head_dim)`."""
    degree = dist.get_world_size(group)
    # The dimension of the ranks, which is exchanged, comes first.
    by_rank = states.unflatten(2, (degree, -1)).permute(2, 0, 1, 3, 4)
    return _exchange(by_rank, group).transpose(0, 1).flatten(1, 2)


def heads_to_tokens(states: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The inverse of [`tokens_to_heads`]."""
    degree = dist.get_world_size(group)
    by_rank = states.unflatten(1, (degree, -1)).transpose(0, 1)
    return _exchange(by_rank, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchange(by_rank: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send part `r` to rank `r` of the group, and receive part `r` of the result from it. Differentiable."""
    flat = by_rank.contiguous().flatten()
    return collectives.all_to_all_single_autograd(flat, None, None, group).view(by_rank.shape)


class TokenGather(nn.Module):
    """
    Marks where a model gathers all tokens on every rank. In a single process it is the identity.

    Layers after it compute the same on all ranks of a group. Layers before it compute only their own tokens. So the
    backward pass multiplies the gradient by the size of the group.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grad_scale = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `hidden_states` `(batch_size, num_tokens, dim)` unchanged."""
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
    degree: int,
    *,
    num_heads: int,
    patch_size: Sequence[int],
    shapes: Iterable[Sequence[int]],
    source: str,
    ring_degree: int = 1,
) -> None:
    """
    Check that heads and tokens of all clips are divisible by the degree, before anything large is loaded.

    Args:
        ring_degree (`int`, defaults to 1):
            Number of ranks in a ring. The heads need not be divisible by it.
        shapes (`Iterable[Sequence[int]]`):
            Latent shapes `(num_channels, num_frames, height, width)`.

    Raises:
        ValueError: If they are not; names the shape, its number of tokens, the heads, and the degrees that fit.
    """
    for shape in sorted({tuple(shape) for shape in shapes}):
        num_tokens = math.prod(size // patch for size, patch in zip(shape[1:], patch_size, strict=True))
        if num_tokens % degree or num_heads % (degree // ring_degree):
            degrees = range(ring_degree, num_heads * ring_degree + 1, ring_degree)
            fitting = [n for n in degrees if num_heads % (n // ring_degree) == 0 and num_tokens % n == 0]
            raise ValueError(
                f"`context_parallel_degree` {degree} does not divide the {num_heads} heads and the {num_tokens} tokens "
                f"of latents {list(shape)} in {source}; these do: {fitting}."
            )
