import pytest
import torch
from torch import nn

from hy_prfl.models.reward_head import MaxPooling, MeanPooling, QueryAttentionPooling, RewardHead, build_pooling


@pytest.mark.parametrize("residual", [True, False])
def test_query_attention_equals_torchs_multihead_attention(residual: bool) -> None:
    torch.manual_seed(0)
    pooling = QueryAttentionPooling(24, num_heads=4, residual=residual)
    reference = nn.MultiheadAttention(24, 4, batch_first=True)
    layers = (pooling.to_q, pooling.to_k, pooling.to_v)
    with torch.no_grad():
        for layer in (*layers, pooling.to_out):
            layer.bias.normal_()
        reference.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        reference.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        reference.out_proj.load_state_dict(pooling.to_out.state_dict())
    tokens = torch.randn(3, 10, 24)
    query = pooling.query.expand(3, 1, 24)
    expected = reference(query, tokens, tokens)[0].squeeze(1) + (pooling.query if residual else 0)
    torch.testing.assert_close(pooling(tokens), expected)


def test_mean_and_max() -> None:
    tokens = torch.tensor([[[1.0, 5.0], [3.0, -1.0]]])
    assert MeanPooling()(tokens).tolist() == [[2.0, 2.0]]
    assert MaxPooling()(tokens).tolist() == [[3.0, 5.0]]


def test_pooling_by_name() -> None:
    assert isinstance(build_pooling("mean", 8, 8, True), MeanPooling)
    assert isinstance(build_pooling("max", 8, 8, True), MaxPooling)
    assert isinstance(build_pooling("query", 8, 2, True), QueryAttentionPooling)
    with pytest.raises(ValueError, match="`pooling`"):
        build_pooling("sum", 8, 8, True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`num_query_heads` \(5\) must divide"):
        QueryAttentionPooling(24, num_heads=5)


def test_head_is_three_layers_with_relu() -> None:
    head = RewardHead(6, hidden_dims=(5, 4))
    pooled = torch.randn(3, 6)
    hidden = (pooled @ head.linear_1.weight.T + head.linear_1.bias).clamp(min=0)
    hidden = (hidden @ head.linear_2.weight.T + head.linear_2.bias).clamp(min=0)
    torch.testing.assert_close(head(pooled), hidden @ head.linear_3.weight[0] + head.linear_3.bias)
    assert head(pooled).shape == (3,)
