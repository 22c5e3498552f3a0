from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from hy_prfl.configs.base import TrainingConfig
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.models.trainable import select_trainable
from tests.planning.recipes import prfl_recipe, reward_recipe


@pytest.fixture
def transformer(pipeline_dir: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")


@pytest.fixture
def reward_model(transformer: WanTransformer3DModel) -> WanRewardModel:
    """A frozen transformer."""
    return WanRewardModel.from_transformer(transformer, num_layers=2, num_query_heads=2).requires_grad_(False)


def trained(model: Any) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def test_all_of_a_generator_trains(transformer: WanTransformer3DModel) -> None:
    select_trainable(transformer, prfl_recipe(), dtype=torch.float32)
    assert trained(transformer) == {name for name, _ in transformer.named_parameters()}


@pytest.mark.parametrize(
    ("options", "rooms"),
    [
        ({}, {"blocks", "pooler", "head"}),
        ({"freeze_blocks": True}, {"pooler", "head"}),
    ],
)
def test_embeddings_of_a_reward_model_stay(
    reward_model: WanRewardModel, options: dict[str, Any], rooms: set[str]
) -> None:
    select_trainable(reward_model, reward_recipe(num_layers=2, **options), dtype=torch.float32)
    assert trained(reward_model) == {
        name for name, _ in reward_model.named_parameters() if name.split(".")[0] in rooms
    }
    assert len(trained(reward_model)) > 6


@pytest.mark.parametrize("recipe", [prfl_recipe, reward_recipe])
def test_an_adapter_trains_in_its_type_and_changes_nothing_at_first(
    transformer: WanTransformer3DModel, reward_model: WanRewardModel, recipe: Callable[..., TrainingConfig]
) -> None:
    model: Any = (transformer if recipe is prfl_recipe else reward_model).to(torch.bfloat16).eval()
    inputs = torch.randn(1, 16, 2, 4, 4).bfloat16(), torch.tensor([500.0]), torch.randn(1, 16, 32).bfloat16()
    with torch.no_grad():
        before = model(*inputs)[0]
    select_trainable(model, recipe(lora_rank=2, lora_target_modules=["attn1.to_q", "to_v"]), dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(*inputs)[0], before, rtol=0.02, atol=0.02)
    adapter = {name for name in trained(model) if "lora_" in name}
    # A and B of attn1.to_q, attn1.to_v and attn2.to_v. The pooling also has layers with these names, but no adapter.
    assert len(adapter) == 2 * 3 * len(model.blocks)
    assert all(name.startswith("blocks.") for name in adapter)
    assert {name.split(".")[0] for name in trained(model) - adapter} <= {"pooler", "head"}
    assert {model.get_parameter(name).dtype for name in adapter} == {torch.float32}


def test_a_target_that_names_no_layer_is_an_error(transformer: WanTransformer3DModel) -> None:
    recipe = prfl_recipe(lora_rank=2, lora_target_modules=["to_q", "to_query"])
    with pytest.raises(ValueError, match="`lora_target_modules` must be the end of a layer's name.*got 'to_query'"):
        select_trainable(transformer, recipe, dtype=torch.float32)
