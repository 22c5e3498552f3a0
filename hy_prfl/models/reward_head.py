"""The head of a reward model: a pooling and an MLP that turn the tokens of any video transformer into one logit."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


PoolingType = Literal["query", "mean", "max"]


class QueryAttentionPooling(nn.Module):
    r"""
    One learnable query that attends over all tokens (paper, equation 5).

    `pooled = to_out(attention(to_q(query), to_k(tokens), to_v(tokens))) + query`. The paper has one
    attention head and no output projection. Here, as in upstream's code, there are 8 heads, biases and an output
    projection, so that upstream's checkpoints can be loaded.

    Args:
        dim (`int`):
            Width of a token.
        num_heads (`int`, defaults to 8):
            Attention heads. Must divide `dim`.
        residual (`bool`, defaults to `True`):
            Add the query to the result. It acts as a prior that does not depend on the video.
    """

    def __init__(self, dim: int, num_heads: int = 8, residual: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"`num_query_heads` ({num_heads}) must divide the width of a token ({dim}).")
        self.num_heads = num_heads
        self.residual = residual
        self.query = nn.Parameter(torch.empty(1, dim))
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        nn.init.xavier_uniform_(self.query)
        for layer in (self.to_q, self.to_k, self.to_v, self.to_out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pool `tokens` `(batch_size, num_tokens, dim)` to `(batch_size, dim)`."""
        query = self.query.to(tokens.dtype)
        q = self.to_q(query).expand(tokens.shape[0], 1, -1).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k = self.to_k(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        v = self.to_v(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).squeeze(1)
        pooled = self.to_out(pooled)
        return pooled + query if self.residual else pooled


class MeanPooling(nn.Module):
    """Mean over the tokens."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pool `tokens` `(batch_size, num_tokens, dim)` to `(batch_size, dim)`."""
        return tokens.mean(dim=1)


class MaxPooling(nn.Module):
    """Maximum over the tokens, channel by channel."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pool `tokens` `(batch_size, num_tokens, dim)` to `(batch_size, dim)`."""
        return tokens.amax(dim=1)


def build_pooling(pooling: PoolingType, dim: int, num_heads: int, residual: bool) -> nn.Module:
    """Build a pooling by name. `num_heads` and `residual` are for `"query"` only."""
    if pooling == "query":
        return QueryAttentionPooling(dim, num_heads=num_heads, residual=residual)
    if pooling == "mean":
        return MeanPooling()
    if pooling == "max":
        return MaxPooling()
    raise ValueError(f"`pooling` must be 'query', 'mean' or 'max', got {pooling!r}.")


class RewardHead(nn.Module):
    """Three linear layers with ReLU between them, `dim -> 1024 -> 512 -> 1` by default, as in upstream's code."""

    def __init__(self, dim: int, hidden_dims: tuple[int, int] = (1024, 512)) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, hidden_dims[0])
        self.linear_2 = nn.Linear(hidden_dims[0], hidden_dims[1])
        self.linear_3 = nn.Linear(hidden_dims[1], 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        for layer in (self.linear_1, self.linear_2, self.linear_3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map `pooled` `(batch_size, dim)` to logits `(batch_size,)`."""
        hidden = F.relu(self.linear_1(pooled))
        hidden = F.relu(self.linear_2(hidden))
        return self.linear_3(hidden).squeeze(-1)
