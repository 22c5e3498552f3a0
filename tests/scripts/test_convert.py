import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from hy_prfl.formats.layout import LORA_FILES
from hy_prfl.formats.lora import read_adapter
from hy_prfl.formats.lora_metadata import lora_metadata
from hy_prfl.models.loading import load_reward_model
from hy_prfl.scripts.convert import main


GOLDEN = Path(__file__).parents[1] / "golden" / "t2v"
REWARD_PARTS = {
    "reward_transformer": GOLDEN / "reward" / "checkpoint-100",
    "mlp": GOLDEN / "reward" / "mlp_step_100.ckpt",
    "query_attention": GOLDEN / "reward" / "query_attention_step_100.ckpt",
}


def options(**values: object) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def test_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(options(**REWARD_PARTS, output_dir=tmp_path / "reward"))
    reward_model = load_reward_model(str(tmp_path / "reward"))
    native = load_file(REWARD_PARTS["reward_transformer"] / "diffusion_pytorch_model.safetensors")
    num_layers = len({name.split(".")[1] for name in native if name.startswith("blocks.")})
    assert (reward_model.config.num_layers, reward_model.config.base_num_layers) == (num_layers, 4)
    assert torch.equal(reward_model.blocks[0].attn1.to_q.weight, native["blocks.0.self_attn.q.weight"])
    mlp = torch.load(REWARD_PARTS["mlp"], weights_only=True)
    assert torch.equal(reward_model.head.linear_3.weight, mlp["fc3.weight"])
    assert f"Reward model with {num_layers} of 4 blocks" in capsys.readouterr().out


def test_generator(tmp_path: Path) -> None:
    main(options(transformer=GOLDEN, output_dir=tmp_path / "transformer"))
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    native = load_file(GOLDEN / "diffusion_pytorch_model.safetensors")
    assert torch.equal(transformer.proj_out.weight, native["head.head.weight"])
    assert transformer.config.num_layers == 4


def assert_equal_files(found: Path, expected: Path) -> None:
    weights, expected_weights = load_file(found), load_file(expected)
    assert set(weights) == set(expected_weights)
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected_weights.items())


@pytest.mark.parametrize("max_shard_size", [None, "100KB"])
def test_generator_back_to_native(tmp_path: Path, capsys: pytest.CaptureFixture[str], max_shard_size: str) -> None:
    size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    main(options(transformer=GOLDEN, output_dir=tmp_path / "model", **size))
    native = {"output_format": "native", "text_len": 16}
    main(options(transformer=tmp_path / "model", output_dir=tmp_path / "native", **native, **size))
    assert f"Generator with 4 blocks, native: {tmp_path}/native" in capsys.readouterr().out
    entries = json.loads((tmp_path / "native" / "config.json").read_text())
    assert json.loads((GOLDEN / "config.json").read_text()).items() <= entries.items()
    assert (len(list((tmp_path / "native").glob("*.safetensors"))) > 1) == bool(size)
    # From shards to the one file that ComfyUI wants, without leaving the format.
    main(options(transformer=tmp_path / "native", output_dir=tmp_path / "single", output_format="native"))
    assert_equal_files(*(path / "diffusion_pytorch_model.safetensors" for path in (tmp_path / "single", GOLDEN)))


def test_generator_in_a_single_file(tmp_path: Path) -> None:
    weights = load_file(GOLDEN / "diffusion_pytorch_model.safetensors")
    torch.save(weights, tmp_path / "wan.pth")
    config = GOLDEN / "config.json"
    main(options(transformer=tmp_path / "wan.pth", transformer_config=config, output_dir=tmp_path / "model"))
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "model")
    assert torch.equal(transformer.proj_out.weight, weights["head.head.weight"])


def test_reward_model_back_to_upstream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(options(**REWARD_PARTS, output_dir=tmp_path / "reward", task="physics_quality"))
    main(options(reward_model=tmp_path / "reward", output_dir=tmp_path / "parts", output_format="upstream"))
    out = capsys.readouterr().out
    assert "do not tell task=physics_quality, vae_fingerprint=None, num_query_heads=8" in out
    name = "diffusion_pytorch_model.safetensors"
    assert_equal_files(tmp_path / "parts" / "checkpoint-0" / name, REWARD_PARTS["reward_transformer"] / name)
    for part in ("mlp", "query_attention"):
        found, expected = (
            torch.load(path, weights_only=True)
            for path in (tmp_path / "parts" / f"{part}_step_0.ckpt", REWARD_PARTS[part])
        )
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_lora_there_and_back(tmp_path: Path, pipeline_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "blocks.2.attn2.to_out.0"
    weights = {
        f"transformer.{name}.lora_A.weight": torch.randn(4, 24),
        f"transformer.{name}.lora_B.weight": torch.randn(24, 4),
    }
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    for lora_format in ("comfyui", "kohya", "upstream", "diffusers"):
        main(options(lora=path, output_dir=tmp_path / lora_format, output_format=lora_format))
        path = tmp_path / lora_format
    out = capsys.readouterr().out
    assert f"LoRA of 1 layers, diffusers to comfyui: {tmp_path}/comfyui/lora_comfyui.safetensors" in out
    assert f"LoRA of 1 layers, upstream to diffusers: {tmp_path}/diffusers/pytorch_lora_weights.safetensors" in out
    assert_equal_files(path / "pytorch_lora_weights.safetensors", tmp_path / "pytorch_lora_weights.safetensors")
    assert read_adapter(path / "pytorch_lora_weights.safetensors").layers[name].alpha == 4
    pipeline = WanPipeline.from_pretrained(pipeline_dir)
    pipeline.load_lora_weights(path)
    assert pipeline.get_active_adapters() == ["default_0"]


def test_loras_of_two_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    for expert, file in LORA_FILES.items():
        weights = {
            "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.randn(2, 24),
            "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.randn(24, 2),
        }
        metadata = lora_metadata(base_model="Wan-AI/two", step=1, expert=expert)
        save_file(weights, tmp_path / "run" / file, metadata=metadata)
    main(options(lora=tmp_path / "run", output_dir=tmp_path / "out", output_format="comfyui"))
    assert (
        "LoRA of 1 and of 1 layers, diffusers to comfyui: "
        f"{tmp_path}/out/lora_comfyui.safetensors, {tmp_path}/out/lora_comfyui_2.safetensors"
    ) in capsys.readouterr().out
    with pytest.raises(ValueError, match="a LoRA of the low-noise expert has no name there"):
        main(options(lora=tmp_path / "run", output_dir=tmp_path / "upstream", output_format="upstream"))
    assert not (tmp_path / "upstream").exists()


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hy_prfl.scripts.convert"]
    subprocess.run([*command, *options(**REWARD_PARTS, output_dir=tmp_path / "reward")], check=True, timeout=120)
    load_reward_model(str(tmp_path / "reward"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Give `transformer`, `lora`, `reward_model`, or `reward_transformer` with `mlp` and `query_attention`"),
        ({"mlp": "a"}, "`reward_transformer` must be given together with `mlp`"),
        ({"reward_transformer": "a", "mlp": "b"}, "`query_attention` must be given together"),
        ({"transformer": "a", "mlp": "b"}, "`mlp` must be left out with `transformer`"),
        ({"lora": "a", "reward_model": "b"}, "`reward_model` must be left out with `lora`"),
        ({"transformer": "a", "output_format": "comfyui"}, "must be diffusers or native with `transformer`"),
        ({"lora": "a", "output_format": "native"}, "must be diffusers or comfyui or kohya or upstream with `lora`"),
        ({"reward_model": "a"}, "`output_format` must be upstream with `reward_model`, got 'diffusers'"),
        ({**REWARD_PARTS, "output_format": "upstream"}, "must be diffusers with `reward_transformer`"),
        ({"lora": "a", "max_shard_size": "1GB"}, "`max_shard_size` must be left out without `transformer`"),
        ({"transformer": "a", "max_shard_size": "1 GB"}, "`max_shard_size` must be a number with KB, MB, GB or TB"),
        ({"transformer": "a", "text_len": 512}, "`text_len` must be .* left out unless `output_format` is native"),
        ({"transformer": "a", "output_format": "native", "text_len": 0}, "`text_len` must be at least 1"),
        ({**REWARD_PARTS, "num_query_heads": 0}, "`num_query_heads` must be at least 1"),
        ({**REWARD_PARTS, "task": "beauty"}, "task"),
    ],
)
def test_options(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(options(**values, output_dir=tmp_path / "out"))


def test_recipes_have_a_command_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("train_id: x\n")
    for more in ([], [f"--output={tmp_path / 'new.yaml'}"]):
        with pytest.raises(ValueError, match=r"is not a field of ConvertConfig.* `hy-prfl convert_recipe`"):
            main([f"--config={tmp_path / 'old.yaml'}", *more])


def test_output_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="output_dir"):
        main(options(transformer=GOLDEN, output_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.launch
def test_accelerate_launch(tmp_path: Path, accelerate_launch: Callable[..., str]) -> None:
    output = accelerate_launch("convert", *options(**REWARD_PARTS, output_dir=tmp_path / "reward"))
    assert "Reward model with" in output
    load_reward_model(str(tmp_path / "reward"))
