import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from hy_prfl.formats.layout import EXPERT_FOLDERS, LORA_FILES
from hy_prfl.formats.lora import read_adapter
from hy_prfl.formats.lora_metadata import lora_metadata
from hy_prfl.models.loading import load_reward_model
from hy_prfl.scripts.convert import main
from tests.formats.native_layout import run


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
    assert "do not store task=physics_quality, vae_fingerprint=None, num_query_heads=8" in out
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
    assert "pytorch_lora_kohya_weights.safetensors is for `--lora_path` of upstream's inference" in out
    assert "such as checkpoint-0, with `lora_rank: 4` and `target_modules: [cross_attn.o]`" in out
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


def write_lora(file: Path, seed: int, **metadata: str) -> Path:
    generator = torch.Generator().manual_seed(seed)
    file.parent.mkdir(exist_ok=True)
    weights = {}
    for name in ("blocks.0.attn1.to_q", "blocks.2.attn2.to_out.0"):
        weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, 24, generator=generator)
        weights[f"transformer.{name}.lora_B.weight"] = torch.randn(24, 2, generator=generator)
    save_file(weights, file, metadata=lora_metadata(base_model="Wan-AI/two", step=1, **metadata))  # type: ignore[arg-type]
    return file


def add_lora(weights: dict[str, torch.Tensor], file: Path, scale: float) -> dict[str, torch.Tensor]:
    lora = load_file(file)
    for key in lora:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            name = f"{stem.removeprefix('transformer.')}.weight"
            weights[name] = weights[name] + scale * (lora[f"{stem}.lora_B.weight"] @ lora[key])
    return weights


class TestMergeLora:
    FILE = "diffusion_pytorch_model.safetensors"

    def check(self, found: Path, base: Path, loras: list[tuple[Path, float]]) -> None:
        expected = load_file(base / self.FILE)
        for file, scale in loras:
            add_lora(expected, file, scale)
        weights = load_file(found / self.FILE)
        assert set(weights) == set(expected)
        for name, tensor in expected.items():
            assert weights[name].dtype == tensor.dtype
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)

    def test_several_into_one_transformer(self, tmp_path: Path, pipeline_dir: Path) -> None:
        loras = [write_lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
        base = pipeline_dir / "transformer"
        words = ["--merge_lora", *map(str, loras), "--merge_lora_scale", "0.5", "2"]
        main([*options(transformer=base, output_dir=tmp_path / "out"), *words])
        self.check(tmp_path / "out", base, list(zip(loras, (0.5, 2.0), strict=True)))
        # A model that diffusers loads, and computes with as with the LoRAs.
        merged = WanTransformer3DModel.from_pretrained(tmp_path / "out")
        pipeline = WanPipeline.from_pretrained(pipeline_dir)
        for index, file in enumerate(loras):
            pipeline.load_lora_weights(tmp_path, weight_name=file.name, adapter_name=f"lora{index}")
        pipeline.set_adapters(["lora0", "lora1"], [0.5, 2.0])
        torch.testing.assert_close(run(merged), run(pipeline.transformer), rtol=1e-4, atol=1e-4)

    def test_both_experts_of_a_pipeline(
        self, tmp_path: Path, expert_pipeline_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for expert, name in LORA_FILES.items():
            write_lora(tmp_path / "run" / name, len(expert), expert=expert)
        main(options(transformer=expert_pipeline_dir, merge_lora=tmp_path / "run", output_dir=tmp_path / "out"))
        for expert, folder in EXPERT_FOLDERS.items():
            lora = tmp_path / "run" / LORA_FILES[expert]
            self.check(tmp_path / "out" / folder, expert_pipeline_dir / folder, [(lora, 1.0)])
        # As Wan's repositories have them, and one of them only if there is a LoRA for one only.
        low = tmp_path / "run" / LORA_FILES["low_noise"]
        native = {"output_format": "native", "output_dir": tmp_path / "native"}
        main(options(transformer=expert_pipeline_dir, merge_lora=low, **native))
        assert [path.name for path in (tmp_path / "native").iterdir()] == ["low_noise_model"]
        assert (
            f"There is no LoRA for {expert_pipeline_dir}/transformer, so it is not written." in capsys.readouterr().out
        )
        main(options(transformer=tmp_path / "native" / "low_noise_model", output_dir=tmp_path / "back"))
        self.check(tmp_path / "back", expert_pipeline_dir / "transformer_2", [(low, 1.0)])

    def test_a_lora_that_names_no_expert(
        self, tmp_path: Path, expert_pipeline_dir: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        lora = tmp_path / "lora.safetensors"
        write_lora(lora, 0)
        # A transformer by itself leaves no choice.
        for transformer, is_warned in ((expert_pipeline_dir, True), (expert_pipeline_dir / "transformer_2", False)):
            caplog.clear()
            output = tmp_path / transformer.name
            main(options(transformer=transformer, merge_lora=lora, output_dir=output))
            warned = f"'{lora}' does not say which expert it is for" in caplog.text
            assert warned is is_warned

    def test_what_does_not_fit(self, tmp_path: Path, pipeline_dir: Path) -> None:
        base, lora = pipeline_dir / "transformer", tmp_path / "lora.safetensors"
        write_lora(lora, 0)
        out = {"transformer": base, "output_dir": tmp_path / "out"}
        with pytest.raises(FileNotFoundError, match="`merge_lora`: there is no file or folder '.*missing'"):
            main(options(**out, merge_lora=tmp_path / "missing"))
        with pytest.raises(ValueError, match="`merge_lora_scale` must be one number, or 1, one for each"):
            main([*options(**out, merge_lora=lora), "--merge_lora_scale", "1", "2"])
        with pytest.raises(ValueError, match="`merge_lora_scale` must be left out without `merge_lora`"):
            main(options(**out, merge_lora_scale=1))
        with pytest.raises(ValueError, match="`merge_lora` must be left out without `transformer`"):
            main(options(lora=lora, merge_lora=lora, output_dir=tmp_path / "out"))
        for expert, name in LORA_FILES.items():
            write_lora(tmp_path / "run" / name, 0, expert=expert)
        with pytest.raises(
            ValueError, match="has LoRAs for two experts, but there is one transformer. Give the pipeline's folder"
        ):
            main(options(**out, merge_lora=tmp_path / "run"))
        weights = {key.replace("blocks.2", "blocks.7"): tensor for key, tensor in load_file(lora).items()}
        save_file(weights, lora)
        with pytest.raises(ValueError, match="tensors have no place in the model: .*blocks.7"):
            main(options(**out, merge_lora=lora))
        assert not (tmp_path / "out").exists()


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
