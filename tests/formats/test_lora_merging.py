"""LoRAs merged into weights, compared with `W + scale * alpha / rank * B @ A` in float64, and with peft's own output."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from hy_prfl.formats.lora import Adapter, LoraLayer, read_adapter
from hy_prfl.formats.lora_merging import MergedWeights, ScaledAdapter

from .native_layout import make_transformer, run
from .test_lora import add_lora, save_lora


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter_of(weights: dict[str, torch.Tensor], seed: int = 0, rank: int = 3, alpha: float = 1.5) -> Adapter:
    layers = {}
    for name in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2", "patch_embedding"):
        shape = weights[f"{name}.weight"].shape
        layers[name] = LoraLayer(
            down=noise(rank, *shape[1:], seed=seed), up=noise(shape[0], rank, *[1] * (len(shape) - 2), seed=seed + 1),
            alpha=alpha,
        )  # fmt: skip
    norm = "blocks.0.attn1.norm_q.weight"
    return Adapter(layers, {norm: noise(*weights[norm].shape, seed=seed + 2)})


def expected(weights: dict[str, torch.Tensor], adapters: list[ScaledAdapter]) -> dict[str, torch.Tensor]:
    """All of it in float64."""
    merged = {name: tensor.double() for name, tensor in weights.items()}
    for each in adapters:
        for name, layer in each.adapter.layers.items():
            product = layer.up.flatten(1).double() @ layer.down.flatten(1).double()
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = weight + each.scale * layer.alpha / layer.rank * product.reshape(weight.shape)
        for name, difference in each.adapter.differences.items():
            merged[name] = merged[name] + each.scale * difference.double()
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_of_several(dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in make_transformer(num_layers=2).state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    adapters = [
        ScaledAdapter(adapter_of(weights), 0.7),
        ScaledAdapter(adapter_of(weights, seed=9, rank=2, alpha=4), -0.25),
    ]
    merged = MergedWeights(weights, adapters)
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor.float(), kept[name].float())}
    assert changed == merged.changed()
    assert changed == {
        "blocks.0.attn1.to_q.weight",
        "blocks.1.ffn.net.2.weight",
        "patch_embedding.weight",
        "blocks.0.attn1.norm_q.weight",
    }
    for name, tensor in expected(weights, adapters).items():
        assert merged[name].dtype == (torch.float32 if name in changed else dtype)
        torch.testing.assert_close(merged[name].double(), tensor, rtol=1e-5, atol=1e-6)
        # What it was made from stays as it is.
        assert torch.equal(weights[name], kept[name])
    # The first blocks alone, as a reward model has them.
    first = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.1.")}
    assert MergedWeights(first, adapters).changed() == changed - {"blocks.1.ffn.net.2.weight"}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_what_peft_trains(tmp_path: Path, options: dict[str, Any]) -> None:
    trained = make_transformer()
    add_lora(trained, ["to_q", "ffn.net.2"], rank_pattern={"ffn.net.2": 3}, alpha_pattern={"to_q": 1.5}, **options)
    adapter = read_adapter(save_lora(trained, tmp_path))
    merged = make_transformer()
    merged.load_state_dict(dict(MergedWeights(merged.state_dict(), [ScaledAdapter(adapter)])))
    assert (run(trained) - run(make_transformer())).abs().max() > 0.01
    torch.testing.assert_close(run(merged), run(trained), rtol=1e-4, atol=1e-5)


def test_weights_are_read_when_asked_for() -> None:
    class Counting(dict[str, torch.Tensor]):
        asked: list[str] = []

        def __getitem__(self, name: str) -> torch.Tensor:
            self.asked.append(name)
            return super().__getitem__(name)

    transformer: WanTransformer3DModel = make_transformer(num_layers=2)
    weights = Counting(transformer.state_dict())
    merged = MergedWeights(weights, [ScaledAdapter(adapter_of(transformer.state_dict()))])
    assert list(merged) == list(weights)
    assert weights.asked == []
    _ = merged["blocks.0.attn1.to_k.weight"]
    assert weights.asked == ["blocks.0.attn1.to_k.weight"]
