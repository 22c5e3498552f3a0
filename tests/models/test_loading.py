import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from hy_prfl.models.loading import WeightFiles, load_reward_model, load_transformer, make_reward_model
from hy_prfl.models.reward_model import WanRewardModel


def no_shard(module: torch.nn.Module) -> None:
    """Shards nothing, as with a single rank."""


def assert_equal(own: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = other.state_dict()
    assert set(own.state_dict()) == set(expected)
    for name, value in own.state_dict().items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_are_read_one_by_one_from_any_files(
    pipeline_dir: Path, tmp_path: Path, max_shard_size: str, variant: str | None
) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    transformer.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size, variant=variant)
    weights = WeightFiles(tmp_path, subfolder="model", variant=variant)
    expected = transformer.state_dict()
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    assert set(weights) == set(expected)
    assert len(weights) == len(expected)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    chosen = weights.select(["proj_out.bias"])
    assert list(chosen) == ["proj_out.bias"]
    with pytest.raises(ValueError, match="1 weights are missing, such as 'nothing'"):
        weights.select(["proj_out.bias", "nothing"])


def test_a_folder_without_weights(tmp_path: Path, pipeline_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither 'diffusion_pytorch_model.fp16.safetensors' nor"):
        WeightFiles(pipeline_dir, subfolder="transformer", variant="fp16")
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError, match="model: there is neither"):
        WeightFiles(tmp_path / "model")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_is_named(tmp_path: Path, pipeline_dir: Path, sharded: bool) -> None:
    model = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB" if sharded else "10GB")
    file = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{file.name}: not a safetensors file"):
        WeightFiles(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_generator_filled_block_by_block_is_the_one_diffusers_loads(pipeline_dir: Path, dtype: torch.dtype) -> None:
    own = load_transformer(str(pipeline_dir), dtype=dtype, shard=no_shard)
    expected = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer").to(dtype)
    assert_equal(own, expected)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 32, dtype=dtype),
    }
    # The rotary buffers are not in the file, but must be correct too.
    with torch.no_grad():
        whole = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
        for name, buffer in whole.named_buffers():
            assert torch.equal(own.get_buffer(name), buffer), name
        if dtype == torch.float32:
            torch.testing.assert_close(own(**inputs).sample, whole(**inputs).sample)
    assert not own.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_model_filled_block_by_block(pipeline_dir: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=2).save_pretrained(tmp_path / "reward")
    own = load_reward_model(str(tmp_path / "reward"), dtype=dtype, shard=no_shard)
    # The same parts stay in float32.
    assert_equal(own, load_reward_model(str(tmp_path / "reward"), dtype=dtype))
    uniform = load_reward_model(str(tmp_path / "reward"), dtype=dtype, shard=no_shard, keep_in_fp32=False)
    assert {value.dtype for value in uniform.parameters()} == {dtype}


def test_a_reward_model_is_made_from_the_blocks_it_keeps(pipeline_dir: Path, tmp_path: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    torch.manual_seed(5)
    expected = WanRewardModel.from_transformer(transformer, num_layers=2, task="blur_quality", pooling="query")
    # Only the blocks that are kept are read: the other weights may be missing.
    shutil.copytree(pipeline_dir / "transformer", tmp_path / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if not name.startswith(("blocks.2", "proj_out", "scale"))}
    assert len(kept) < len(weights)
    save_file(kept, file)
    model = make_reward_model(str(tmp_path), num_layers=2, task="blur_quality", pooling="query")
    assert dict(model.config) | {"_name_or_path": ""} == dict(expected.config) | {"_name_or_path": ""}
    own, other = model.state_dict(), expected.state_dict()
    for name in own:
        if not name.startswith(("pooler", "head")):
            assert torch.equal(own[name], other[name]), name
    assert own["pooler.query"].std() > 0
    with pytest.raises(ValueError, match="`num_layers` is 9, but the transformer has only 3 blocks"):
        make_reward_model(str(pipeline_dir), num_layers=9)
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["num_layers"] == 3


LOADERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "reward model": ("reward", load_reward_model),
    "reward model of the class": ("reward", WanRewardModel.from_pretrained),
    "sharded reward model": ("reward", partial(load_reward_model, shard=no_shard)),
    "generator": ("pipeline/transformer", lambda root: load_transformer(root.replace("/transformer", ""))),
    "sharded generator": (
        "pipeline/transformer",
        lambda root: load_transformer(root.replace("/transformer", ""), shard=no_shard),
    ),
    "reward model to be": (
        "pipeline/transformer",
        lambda root: make_reward_model(root.replace("/transformer", ""), num_layers=2),
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(pipeline_dir: Path, tmp_path: Path, loader: str, bad: float) -> None:
    """NaNs are found at loading, also where softmax would hide them and rewards would be finite."""
    folder, load = LOADERS[loader]
    shutil.copytree(pipeline_dir, tmp_path / "pipeline")
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=2).save_pretrained(tmp_path / "reward")
    file = tmp_path / folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["blocks.1.attn2.to_k.bias"][3] = bad
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'blocks\.1\.attn2\.to_k\.bias' holds a NaN or an infinity"):
        load(str(tmp_path / folder))


def test_a_reward_model_too_large_for_its_type(pipeline_dir: Path, tmp_path: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    transformer.blocks[0].attn1.to_q.weight.data[0, 0] = 1e6
    WanRewardModel.from_transformer(transformer, num_layers=1).save_pretrained(tmp_path)
    load_reward_model(str(tmp_path), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn1\.to_q\.weight' holds a NaN or an infinity"):
        load_reward_model(str(tmp_path), dtype=torch.float16)
