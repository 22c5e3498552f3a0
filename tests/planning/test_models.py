"""Counts of parameters against those of the real models."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.formats.pipeline_info import PUBLISHED, PipelineInfo
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.models.trainable import select_trainable
from hy_prfl.planning.models import (
    build_reward_model,
    build_transformer,
    count_parameters,
    reward_model_config,
    set_dtypes,
)
from hy_prfl.planning.plan import plan
from tests.planning.recipes import prfl_recipe, reward_recipe


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_are_counted_exactly(name: str) -> None:
    config = PipelineInfo.known(name).transformer
    with init_empty_weights():
        real = WanTransformer3DModel(**config)
    counted = count_parameters(build_transformer(config, prfl_recipe()))
    assert counted.total == counted.trained == sum(parameter.numel() for parameter in real.parameters())
    assert counted.total == counted.rest + config["num_layers"] * counted.block
    # The names give the size. Image-to-video models have image keys and values in addition to "14B".
    billions = counted.total / 1e9
    least, most = {"1.3B": (1.3, 1.5), "5B": (4.9, 5.1)}.get(name.split("-")[3], (14, 16.5))
    assert least < billions < most


def test_configuration_of_a_folder_is_read(pipeline_dir: Path, i2v_pipeline_dir: Path) -> None:
    for folder in (pipeline_dir, i2v_pipeline_dir):
        real = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
        config = PipelineInfo.known(str(folder)).transformer
        assert {name: real.config[name] for name in config} == config
        counted = count_parameters(build_transformer(config, prfl_recipe()))
        assert counted.total == sum(parameter.numel() for parameter in real.parameters())


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}, {"freeze_blocks": True}, {"pooling": "mean"}])
def test_reward_model_is_counted_as_trained(pipeline_dir: Path, options: dict[str, object]) -> None:
    training = reward_recipe(num_layers=2, num_query_heads=2, **options)
    config = reward_model_config(PipelineInfo.known(str(pipeline_dir)).transformer, training)
    counted = count_parameters(build_reward_model(config, training))

    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    real = WanRewardModel.from_transformer(
        transformer, num_layers=2, num_query_heads=2, pooling=training.pooling
    ).requires_grad_(False)
    select_trainable(real, training, dtype=torch.float32)
    assert counted.total == sum(parameter.numel() for parameter in real.parameters())
    assert counted.trained == sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    embeddings = [*real.patch_embedding.parameters(), *real.condition_embedder.parameters()]
    assert not any(parameter.requires_grad for parameter in embeddings)


def test_bytes_follow_what_stays_in_float32(pipeline_dir: Path) -> None:
    """The same types as after loading in bfloat16, with the adapter in float32."""
    model = build_transformer(PipelineInfo.known(str(pipeline_dir)).transformer, prfl_recipe(lora_rank=4))
    set_dtypes(model, frozen=torch.bfloat16, trained=torch.float32, keep_in_fp32=True)
    loaded = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer", dtype=torch.bfloat16)
    frozen = sum(parameter.nbytes for parameter in loaded.parameters())
    counted = count_parameters(model)
    assert counted.num_bytes == frozen + 4 * counted.trained
    assert counted.trained_bytes == 4 * counted.trained


def test_default_reward_model_is_the_papers() -> None:
    config = PipelineInfo.known("Wan-AI/Wan2.1-T2V-14B-Diffusers").transformer
    assert reward_model_config(config)["num_layers"] == RewardTrainingConfig.num_layers == 8


def test_unknown_size_is_refused() -> None:
    for options in ({"num_frames": 80}, {"height": 470}, {"utilization": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            plan(prfl_recipe(), **{"height": 480, "width": 832, "num_frames": 81, **options})
