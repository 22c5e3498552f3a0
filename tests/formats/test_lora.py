"""
LoRA files of every format, loaded by diffusers itself or applied here by the rule of the program they are for.

What a file must do is computed from peft's own layers: `weight + scaling * B @ A`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from hy_prfl.formats.layout import LORA_FILES
from hy_prfl.formats.lora import Adapter, find_lora_files, parse_adapter, read_adapter, read_adapters
from hy_prfl.formats.lora_metadata import lora_header, lora_metadata, read_lora_metadata
from hy_prfl.formats.lora_writing import save_adapters
from hy_prfl.formats.weight_files import read_header
from hy_prfl.models.conversion import convert_transformer

from .native_layout import assert_equal_weights, native_name, native_weights, run, write_native


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "t2v": [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"],
    "i2v": [*ATTENTION, "ffn.net.0.proj", "ffn.net.2", "add_k_proj", "add_v_proj"],
}
# One layer of another rank, and a layer in each block with another alpha.
PATTERNS: dict[str, Any] = {"rank_pattern": {"blocks.1.attn1.to_q": 3}, "alpha_pattern": {"ffn.net.2": 1.5}}
METADATA = lora_metadata(base_model="Wan-AI/tiny", reward_model="me/reward", step=40, run="demo", config={"seed": 0})
LORA_FILE = LORA_FILES["high_noise"]
PIPELINES = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline}


@pytest.fixture(params=["t2v", "i2v"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, pipeline_dir: Path, i2v_pipeline_dir: Path) -> Path:
    """The pipeline of that kind."""
    return {"t2v": pipeline_dir, "i2v": i2v_pipeline_dir}[kind]


def load_transformer(folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").eval()


def add_lora(model: WanTransformer3DModel, targets: list[str], seed: int = 0, **options: Any) -> None:
    """An adapter that changes the output a lot, in every layer by another amount."""
    model.add_adapter(LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets, **options}))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)


def save_lora(model: WanTransformer3DModel, path: Path, metadata: Mapping[str, str] = METADATA) -> Path:
    """As the trainer does: diffusers writes the file, with peft's configuration and ours in the header."""
    header = lora_header(_collate_lora_metadata({"transformer": model})["transformer_lora_adapter_metadata"], metadata)
    WanPipeline.save_lora_weights(
        path,
        transformer_lora_layers=get_peft_model_state_dict(model),
        save_function=lambda weights, filename: save_file(weights, filename, metadata=header),
    )
    return path / LORA_FILE


def deltas(model: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight of the model, from peft's own layers."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
            product = (up.flatten(1) @ down.flatten(1)).reshape(module.base_layer.weight.shape)
            found[f"{name}.weight"] = (product * module.scaling["default"]).detach()
    return found


def add_to(model: WanTransformer3DModel, added: Mapping[str, torch.Tensor], scale: float = 1.0) -> None:
    state_dict = model.state_dict()
    for name, delta in added.items():
        state_dict[name] += scale * delta


class Example:
    """A LoRA as it was trained, its file, and the output of the model with it."""

    def __init__(self, folder: Path, tmp_path: Path, targets: list[str], **options: Any) -> None:
        self.base = load_transformer(folder)
        trained = load_transformer(folder)
        add_lora(trained, targets, **options)
        self.file = save_lora(trained, tmp_path / "prfl")
        self.deltas = deltas(trained)
        with_lora = load_transformer(folder)
        add_to(with_lora, self.deltas)
        self.output = run(with_lora)
        assert (self.output - run(self.base)).abs().max() > 0.01

    def check(self, output: torch.Tensor) -> None:
        torch.testing.assert_close(output, self.output, rtol=1e-4, atol=1e-4)


@pytest.fixture
def example(kind: str, folder: Path, tmp_path: Path) -> Example:
    return Example(folder, tmp_path, TARGETS[kind], **PATTERNS)


def upstream_example(folder: Path, tmp_path: Path) -> Example:
    """The same without the layers for an image, which upstream's loader dies of."""
    return Example(folder, tmp_path / "upstream", TARGETS["t2v"], **PATTERNS)


def apply_native(
    base: WanTransformer3DModel, file: Path, tmp_path: Path, name_of: Callable[[str], str]
) -> WanTransformer3DModel:
    """
    Add a LoRA file to native weights, by the rule of ComfyUI, of upstream and of kohya's scripts.

    A layer is looked up by `name_of(its native name)`. The update is `alpha / rank * up @ down`, or `up @ down` where
    there is no alpha. Every weight of the file must be used.
    """
    lora, weights = load_file(file), native_weights(base)
    for key in list(weights):
        name = name_of(key.removesuffix(".weight"))
        for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if f"{name}.{up}.weight" in lora:
                a, b = lora.pop(f"{name}.{down}.weight"), lora.pop(f"{name}.{up}.weight")
                alpha = lora.pop(f"{name}.alpha", torch.tensor(float(len(a)))).item()
                weights[key] += alpha / len(a) * (b.flatten(1) @ a.flatten(1)).reshape(weights[key].shape)
        if f"{name}.diff_b" in lora:
            weights[key.removesuffix("weight") + "bias"] += lora.pop(f"{name}.diff_b")
    assert not lora
    config = base.config
    entries = {"in_dim": config.in_channels, "num_layers": config.num_layers}
    model_type = "i2v" if config.image_dim else "t2v"
    return convert_transformer(write_native(tmp_path / f"with_{file.stem}", weights, model_type=model_type, **entries))


RULES: dict[tuple[str, str], Callable[[str], str]] = {
    ("comfyui", "lora_comfyui.safetensors"): lambda name: f"diffusion_model.{name}",
    ("kohya", "lora_kohya.safetensors"): lambda name: f"lora_unet_{name.replace('.', '_')}",
    ("upstream", "pytorch_lora_transformers_weights.safetensors"): lambda name: f"base_model.model.{name}",
    ("upstream", "pytorch_lora_kohya_weights.safetensors"): lambda name: f"lora_{name.replace('.', '_')}",
    ("upstream", "pytorch_lora_diffusers_weights.safetensors"): lambda name: f"diffusion_model.{name}",
}


class TestInDiffusers:
    """What PRFL saves, in diffusers' pipelines."""

    def pipeline(self, kind: str, folder: Path) -> Any:
        pipeline = PIPELINES[kind].from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def test_load_scale_fuse_and_unfuse(self, kind: str, folder: Path, example: Example) -> None:
        pipeline = self.pipeline(kind, folder)
        pipeline.load_lora_weights(example.file.parent, weight_name=LORA_FILE, adapter_name="prfl")
        example.check(run(pipeline.transformer))

        pipeline.set_adapters(["prfl"], [0.25])
        quarter = load_transformer(folder)
        add_to(quarter, example.deltas, 0.25)
        torch.testing.assert_close(run(pipeline.transformer), run(quarter), rtol=1e-4, atol=1e-4)

        pipeline.set_adapters(["prfl"], [1.0])
        pipeline.fuse_lora()
        example.check(run(pipeline.transformer))
        pipeline.unfuse_lora()
        pipeline.disable_lora()
        torch.testing.assert_close(run(pipeline.transformer), run(example.base), rtol=1e-4, atol=1e-4)

        pipeline.enable_lora()
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        example.check(run(pipeline.transformer))

    def test_two_adapters_at_once(self, kind: str, folder: Path, example: Example, tmp_path: Path) -> None:
        other = load_transformer(folder)
        add_lora(other, ["to_v", "ffn.net.2"], seed=1, r=4, lora_alpha=2)
        save_lora(other, tmp_path / "other")
        pipeline = self.pipeline(kind, folder)
        for name, path in (("prfl", example.file.parent), ("other", tmp_path / "other")):
            pipeline.load_lora_weights(path, weight_name=LORA_FILE, adapter_name=name)
        pipeline.set_adapters(["prfl", "other"], [0.7, -0.4])
        expected = load_transformer(folder)
        add_to(expected, example.deltas, 0.7)
        add_to(expected, deltas(other), -0.4)
        torch.testing.assert_close(run(pipeline.transformer), run(expected), rtol=1e-4, atol=1e-4)

    def test_generated_video(self, kind: str, folder: Path, example: Example) -> None:
        options: dict[str, Any] = {
            "prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2,
            "guidance_scale": 2.0, "max_sequence_length": 16, "output_type": "pt",
        }  # fmt: skip
        if kind == "i2v":
            options["image"] = Image.new("RGB", (32, 32), (200, 30, 30))
        videos = []
        for with_lora in (True, False):
            pipeline = self.pipeline(kind, folder)
            if with_lora:
                pipeline.load_lora_weights(example.file.parent, weight_name=LORA_FILE)
            else:
                add_to(pipeline.transformer, example.deltas)
            videos.append(pipeline(**options, generator=torch.Generator().manual_seed(0)).frames)
        torch.testing.assert_close(*videos, rtol=1e-3, atol=1e-3)

    def test_text_to_video_lora_in_an_image_to_video_pipeline(self, i2v_pipeline_dir: Path, tmp_path: Path) -> None:
        example = Example(i2v_pipeline_dir, tmp_path, TARGETS["t2v"], **PATTERNS)
        pipeline = self.pipeline("i2v", i2v_pipeline_dir)
        pipeline.load_lora_weights(example.file.parent, weight_name=LORA_FILE)
        example.check(run(pipeline.transformer))

    @pytest.mark.parametrize("lora_format", ["comfyui", "kohya"])
    def test_diffusers_reads_the_other_formats_alike(
        self, kind: str, folder: Path, example: Example, tmp_path: Path, lora_format: Any
    ) -> None:
        # Two independent readers of the same file: were the alpha lost or counted twice, outputs would differ.
        (name,) = save_adapters([read_adapter(example.file)], tmp_path / "out", lora_format)
        pipeline = self.pipeline(kind, folder)
        pipeline.load_lora_weights(tmp_path / "out", weight_name=name)
        example.check(run(pipeline.transformer))


class TestFormats:
    @pytest.mark.parametrize(("lora_format", "name"), RULES)
    def test_applied_by_the_rule_of_the_program(
        self, folder: Path, example: Example, tmp_path: Path, lora_format: Any, name: str
    ) -> None:
        if lora_format == "upstream":
            example = upstream_example(folder, tmp_path)
        files = save_adapters([read_adapter(example.file)], tmp_path / "out", lora_format)
        assert files == [file for written, file in RULES if written == lora_format]
        example.check(run(apply_native(example.base, tmp_path / "out" / name, tmp_path, RULES[lora_format, name])))

    @pytest.mark.parametrize(("lora_format", "name"), RULES)
    def test_read_back_and_loaded_by_diffusers(
        self, kind: str, folder: Path, example: Example, tmp_path: Path, lora_format: Any, name: str
    ) -> None:
        if lora_format == "upstream":
            example = upstream_example(folder, tmp_path)
        save_adapters([read_adapter(example.file)], tmp_path / "out", lora_format)
        assert save_adapters([read_adapter(tmp_path / "out" / name)], tmp_path / "back", "diffusers") == [LORA_FILE]
        pipeline = PIPELINES[kind].from_pretrained(folder)
        pipeline.load_lora_weights(tmp_path / "back", weight_name=LORA_FILE)
        example.check(run(pipeline.transformer))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("chain", [("comfyui",), ("kohya",), ("comfyui", "kohya"), ("kohya", "comfyui")])
    def test_round_trip_is_bit_exact(
        self, example: Example, tmp_path: Path, dtype: torch.dtype, chain: tuple[Any, ...]
    ) -> None:
        weights = {key: tensor.to(dtype) for key, tensor in load_file(example.file).items()}
        save_file(weights, tmp_path / "start.safetensors", metadata=read_header(example.file))
        path = tmp_path / "start.safetensors"
        for index, lora_format in enumerate((*chain, "diffusers")):
            output_dir = tmp_path / str(index)
            (name,) = save_adapters([read_adapter(path)], output_dir, lora_format)
            path = output_dir / name
        assert_equal_weights(load_file(path), weights)
        first, last = read_adapter(example.file), read_adapter(path)
        assert {name: (layer.rank, layer.alpha) for name, layer in last.layers.items()} == {
            name: (layer.rank, layer.alpha) for name, layer in first.layers.items()
        }
        assert {layer.rank for layer in last.layers.values()} == {2, 3}
        assert {layer.alpha for layer in last.layers.values()} == {6, 1.5}
        assert read_lora_metadata(path) == read_lora_metadata(tmp_path / "start.safetensors")

    @pytest.mark.parametrize("lora_format", ["comfyui", "kohya"])
    def test_round_trip_from_the_other_side(self, example: Example, tmp_path: Path, lora_format: Any) -> None:
        (name,) = save_adapters([read_adapter(example.file)], tmp_path / "first", lora_format)
        save_adapters([read_adapter(tmp_path / "first" / name)], tmp_path / "diffusers", "diffusers")
        save_adapters([read_adapter(tmp_path / "diffusers" / LORA_FILE)], tmp_path / "again", lora_format)
        assert_equal_weights(load_file(tmp_path / "again" / name), load_file(tmp_path / "first" / name))
        assert read_header(tmp_path / "again" / name) == read_header(tmp_path / "first" / name)

    def test_upstream_round_trip(self, folder: Path, tmp_path: Path) -> None:
        example = upstream_example(folder, tmp_path)
        save_adapters([read_adapter(example.file)], tmp_path / "first", "upstream")
        save_adapters(read_adapters(tmp_path / "first"), tmp_path / "diffusers", "diffusers")
        save_adapters(read_adapters(tmp_path / "diffusers"), tmp_path / "again", "upstream")
        for file in (tmp_path / "first").iterdir():
            assert_equal_weights(load_file(tmp_path / "again" / file.name), load_file(file))
            assert all(tensor.dtype == torch.float32 for tensor in load_file(file).values())
        keys = sorted(load_file(tmp_path / "first" / "pytorch_lora_kohya_weights.safetensors"))
        assert keys[0] == "lora_blocks_0_cross_attn_k.lora_down.weight"
        assert not any("alpha" in key for key in keys)

    def test_layers_outside_of_the_blocks(self, i2v_pipeline_dir: Path, tmp_path: Path) -> None:
        base = load_transformer(i2v_pipeline_dir)
        linear = [
            name
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv3d) and not name.startswith("blocks.")
        ]
        assert len(linear) == 9
        for (lora_format, name), rule in RULES.items():
            kept = [target for target in linear if lora_format != "upstream" or target != "patch_embedding"]
            example = Example(i2v_pipeline_dir, tmp_path / f"to_{lora_format}", kept)
            output_dir = tmp_path / lora_format
            if not output_dir.exists():
                save_adapters([read_adapter(example.file)], output_dir, lora_format)  # type: ignore[arg-type]
            example.check(run(apply_native(base, output_dir / name, tmp_path, rule)))

    def test_partial_targets(self, pipeline_dir: Path, tmp_path: Path) -> None:
        # diffusers' own reader of kohya's format needs all layers of all blocks from 0 on.
        example = Example(pipeline_dir, tmp_path, ["blocks.1.attn1.to_q", "blocks.2.ffn.net.2"], r=8, lora_alpha=8)
        (name,) = save_adapters([read_adapter(example.file)], tmp_path / "out", "kohya")
        assert len(load_file(tmp_path / "out" / name)) == 6
        save_adapters([read_adapter(tmp_path / "out" / name)], tmp_path / "back", "diffusers")
        pipeline = WanPipeline.from_pretrained(pipeline_dir)
        pipeline.load_lora_weights(tmp_path / "back", weight_name=LORA_FILE)
        example.check(run(pipeline.transformer))

    def test_down_and_up_behind_comfyuis_prefix(self, example: Example, tmp_path: Path) -> None:
        (name,) = save_adapters([read_adapter(example.file)], tmp_path / "out", "comfyui")
        weights = load_file(tmp_path / "out" / name)
        renamed = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in weights.items()}
        adapter, expected = parse_adapter(renamed, {}, source="x"), parse_adapter(weights, {}, source="x")
        assert set(adapter.layers) == set(expected.layers)
        for layer_name, layer in adapter.layers.items():
            assert torch.equal(layer.up, expected.layers[layer_name].up)
            assert layer.alpha == expected.layers[layer_name].alpha

    def test_without_an_alpha_it_is_the_rank(self, example: Example) -> None:
        weights = load_file(example.file)
        assert all(layer.scale == 1 for layer in parse_adapter(weights, {}, source="x").layers.values())
        native = {
            native_name(key).replace("transformer.", "diffusion_model."): tensor for key, tensor in weights.items()
        }
        adapter = parse_adapter(native, {}, source="x")
        assert all(layer.scale == 1 for layer in adapter.layers.values())
        converted = _convert_non_diffusers_wan_lora_to_diffusers(native)
        assert_equal_weights(converted, weights)

    def test_alpha_that_is_no_float32(self, pipeline_dir: Path, tmp_path: Path) -> None:
        example = Example(pipeline_dir, tmp_path, ["to_q"], r=1, lora_alpha=0.1, seed=3)
        (name,) = save_adapters([read_adapter(example.file)], tmp_path / "out", "kohya")
        assert {layer.alpha for layer in read_adapter(tmp_path / "out" / name).layers.values()} == {0.1}


def layer_weights(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    """One layer of ComfyUI's format, with rank 2 and alpha 4."""
    name = "diffusion_model.blocks.0.self_attn.q"
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_down.weight": torch.randn(2, 24, generator=generator),
        f"{name}.lora_up.weight": torch.randn(24, 2, generator=generator),
        f"{name}.alpha": torch.tensor(4.0),
        **{f"diffusion_model.blocks.0.{key}": tensor for key, tensor in extra.items()},
    }


class TestBiases:
    """Distilled models come with `diff_b`, which ComfyUI does not scale and peft does."""

    def test_output(self, pipeline_dir: Path, tmp_path: Path) -> None:
        base = load_transformer(pipeline_dir)
        bias = torch.randn(24, generator=torch.Generator().manual_seed(1))
        (tmp_path / "lora").mkdir()
        other = {key.replace("self_attn", "cross_attn"): tensor for key, tensor in layer_weights().items()}
        weights = {**layer_weights(**{"self_attn.q.diff_b": bias}), **other}
        save_file(weights, tmp_path / "lora" / "a.safetensors")
        expected = run(
            apply_native(base, tmp_path / "lora" / "a.safetensors", tmp_path, lambda name: f"diffusion_model.{name}")
        )
        save_adapters(read_adapters(tmp_path / "lora"), tmp_path / "out", "diffusers")
        pipeline = WanPipeline.from_pretrained(pipeline_dir)
        pipeline.load_lora_weights(tmp_path / "out", weight_name=LORA_FILE)
        torch.testing.assert_close(run(pipeline.transformer), expected, rtol=1e-4, atol=1e-4)

        (name,) = save_adapters(read_adapters(tmp_path / "out"), tmp_path / "back", "comfyui")
        back = load_file(tmp_path / "back" / name)
        assert torch.equal(back["diffusion_model.blocks.0.self_attn.q.diff_b"], bias)
        for lora_format in ("kohya", "upstream"):
            with pytest.raises(ValueError, match=f"'blocks.0.attn1.to_q' has a bias .* format of {lora_format}"):
                save_adapters(read_adapters(tmp_path / "out"), tmp_path / lora_format, lora_format)  # type: ignore[arg-type]

    def test_differences_that_are_zero_are_left_out(self) -> None:
        zeros = {"norm3.diff": torch.zeros(24), "self_attn.q.diff_b": torch.zeros(24)}
        adapter = parse_adapter(layer_weights(**zeros), {}, source="x")
        assert list(adapter.layers) == ["blocks.0.attn1.to_q"]
        assert adapter.layers["blocks.0.attn1.to_q"].bias is None

    @pytest.mark.parametrize(
        ("key", "parameter"),
        [
            ("norm3.diff", "blocks.0.norm2.weight"),
            ("norm3.diff_b", "blocks.0.norm2.bias"),
            ("self_attn.norm_q.diff", "blocks.0.attn1.norm_q.weight"),
            ("ffn.0.diff_b", "blocks.0.ffn.net.0.proj.bias"),
            ("self_attn.q.diff", "blocks.0.attn1.to_q.weight"),
            ("modulation.diff", "blocks.0.scale_shift_table"),
            ("diff_m", "blocks.0.scale_shift_table"),
        ],
    )
    def test_differences_of_weights_without_factors(self, tmp_path: Path, key: str, parameter: str) -> None:
        weights = layer_weights(**{key: torch.ones(24)})
        adapter = parse_adapter(weights, {}, source="x")
        assert list(adapter.differences) == [parameter]
        assert adapter.keys[parameter] == [f"diffusion_model.blocks.0.{key}"]
        (name,) = save_adapters([adapter], tmp_path / "back", "comfyui")
        written = load_file(tmp_path / "back" / name)
        # ComfyUI, which knows no `diff_m`, finds a modulation by its own name.
        key = "modulation.diff" if key == "diff_m" else key
        assert torch.equal(written[f"diffusion_model.blocks.0.{key}"], torch.ones(24))
        assert len(written) == 4
        for lora_format in ("diffusers", "kohya", "upstream"):
            with pytest.raises(
                ValueError, match=rf"{lora_format} has no place .*'diffusion_model.blocks.0.*--lora_path"
            ):
                save_adapters([adapter], tmp_path / lora_format, lora_format)  # type: ignore[arg-type]

    def test_shape_of_a_bias(self) -> None:
        with pytest.raises(ValueError, match=r"x: .*q': the bias must be \(24,\), got \(3,\)"):
            parse_adapter(layer_weights(**{"self_attn.q.diff_b": torch.ones(3)}), {}, source="x")

    def test_float8(self) -> None:
        zeros = {"norm3.diff": torch.zeros(24).to(torch.float8_e4m3fn)}
        assert not parse_adapter(layer_weights(**zeros), {}, source="x").differences


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "tensor", "message"),
        [
            ("blocks.0.self_attn.q.dora_scale", torch.ones(24), r"q\.dora_scale' belongs to DoRA"),
            ("blocks.0.self_attn.k.hada_w1_a", torch.ones(2, 2), r"k\.hada_w1_a' belongs to LoHa"),
            ("blocks.0.self_attn.k.lokr_w1", torch.ones(2, 2), r"k\.lokr_w1' belongs to LoKr"),
            ("blocks.0.self_attn.q.lora_mid.weight", torch.ones(2, 2), r"belongs to a LoRA with a third factor"),
            ("blocks.0.self_attn.q.lora_C.weight", torch.ones(2, 2), r"unknown key 'diffusion_model\.blocks\.0\..*lora_C"),
            ("blocks.0.self_attn.x.lora_up.weight", torch.ones(24, 2), r"there is no layer 'blocks\.0\.self_attn\.x'"),
            ("blocks.0.self_attn.k.lora_up.weight", torch.ones(24, 2), r"k' has no lora_A \(lora_down\), only up"),
            ("blocks.0.self_attn.k.lora_down.weight", torch.ones(2, 24), r"k' has no lora_B \(lora_up\), only down"),
            ("blocks.0.self_attn.k.alpha", torch.ones(()), r"k' has no lora_A \(lora_down\), only alpha"),
            ("blocks.0.self_attn.q.lora_up.weight", torch.ones(0), r"q\.lora_up\.weight' is empty"),
            ("blocks.0.self_attn.q.lora_up.weight", torch.ones(24, 3), r"ranks of \(2, 24\) \(down\) and \(24, 3\) \(up\)"),
            ("blocks.0.self_attn.q.lora_down.weight", torch.ones(2), r"ranks of \(2,\) \(down\)"),
            ("blocks.0.self_attn.q.lora_B.weight", torch.ones(24, 2), r"q\.lora_(up|B)\.weight' appears twice"),
            ("blocks.0.self_attn.q.alpha", torch.ones(2), r"alpha must be one number, got \(2,\)"),
            ("blocks.0.self_attn.q.alpha", torch.tensor(0.0), r"alpha must be a number other than 0, got 0\.0"),
            ("blocks.0.self_attn.q.alpha", torch.tensor(float("nan")), r"other than 0, got nan"),
        ],
    )  # fmt: skip
    def test_weights(self, tmp_path: Path, key: str, tensor: torch.Tensor, message: str) -> None:
        weights = {**layer_weights(), f"diffusion_model.{key}": tensor}
        save_file(weights, tmp_path / "lora.safetensors")
        with pytest.raises(ValueError, match=rf"lora\.safetensors: .*{message}"):
            read_adapter(tmp_path / "lora.safetensors")

    @pytest.mark.parametrize(
        ("prefix", "end"),
        [
            ("diffusion_model.blocks.0.self_attn.q", "lora_A.weight"),
            ("transformer.blocks.0.attn1.to_q", "lora_B.weight"),
            ("lora_unet_blocks_0_self_attn_q", "lora_down.weight"),
            ("base_model.model.blocks.0.attn1.to_q", "lora_B.bias"),
            ("base_model.model.blocks.0.attn1.to_q", "lora_magnitude_vector"),
            ("diffusion_model.blocks.0.self_attn.q", "diff_b"),
            ("diffusion_model.blocks.0.norm3", "diff"),
        ],
    )
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_numbers_that_are_not_finite(self, tmp_path: Path, prefix: str, end: str, bad: float) -> None:
        layer = prefix.replace("norm3", "self_attn.q")
        down, up = ("lora_down", "lora_up") if "lora_unet" in layer else ("lora_A", "lora_B")
        weights = {f"{layer}.{down}.weight": torch.ones(2, 24), f"{layer}.{up}.weight": torch.ones(24, 2)}
        weights[f"{prefix}.{end}"] = torch.full_like(weights.get(f"{prefix}.{end}", torch.ones(24)), bad)
        save_file(weights, tmp_path / "lora.safetensors")
        # Before it is converted or loaded.
        with pytest.raises(ValueError, match=rf"lora\.safetensors: '{prefix}\.{end}' holds a NaN or an infinity"):
            read_adapter(tmp_path / "lora.safetensors")

    @pytest.mark.parametrize("pattern", ["(", "to_q)", "*", "a{99999999999999999999}", "[z-a]"])
    @pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
    @pytest.mark.parametrize("place", ["header", "beside"])
    def test_patterns_that_are_no_regular_expressions(
        self, tmp_path: Path, pattern: str, name: str, place: str
    ) -> None:
        entries = {"r": 2, "lora_alpha": 2, name: {pattern: 2}}
        weights = {
            "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24),
            "blocks.0.attn1.to_q.lora_B.weight": torch.ones(24, 2),
        }
        if place == "header":
            file = source = tmp_path / "lora.safetensors"
            header = {
                "lora_adapter_metadata": json.dumps({f"transformer.{key}": each for key, each in entries.items()})
            }
            save_file({f"transformer.{key}": each for key, each in weights.items()}, file, metadata=header)
        else:
            file, source = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
            save_file({f"base_model.model.{key}": each for key, each in weights.items()}, file)
            source.write_text(json.dumps({"peft_type": "LORA", **entries}))
        expected = f"{source}: peft's `{name}` must have regular expressions as keys, got '{pattern}': "
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}.*$"):
            read_adapter(file)

    def test_mixed_formats(self) -> None:
        for key in ("lora_unet_blocks_0_ffn_0.lora_up.weight", "blocks.0.lora_A.weight"):
            with pytest.raises(ValueError, match=rf"x: .*'{key}'"):
                parse_adapter({**layer_weights(), key: torch.ones(2, 2)}, {}, source="x")
        with pytest.raises(ValueError, match=r"x: no layer has weights other than 0"):
            parse_adapter({"diffusion_model.blocks.0.norm3.diff": torch.zeros(2)}, {}, source="x")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"transformer.use_dora": True},
                r"0 of \d+ layers have a lora_magnitude_vector; with peft's `use_dora` all",
            ),
            (
                {"transformer.use_bdlora": True},
                "peft's metadata has `transformer.use_bdlora` = True: not a plain LoRA",
            ),
            (
                {"transformer.alpha": 8, "transformer.peft_type": "LOHA"},
                "`transformer.peft_type` is 'LOHA', which is not a plain LoRA. Merge it",
            ),
            ({"transformer.modules_to_save": ["x"]}, "`transformer.modules_to_save`"),
            ({"text_encoder.r": 4}, "`text_encoder.r` = 4"),
            (
                {"transformer.init_lora_weights": "pissa"},
                "this LoRA belongs to a base model whose weights peft changed",
            ),
            ({"transformer.lora_alpha": None}, "peft's `lora_alpha` must be a number, got None for `lora_alpha`"),
            ({"transformer.alpha_pattern": {"to_q": "1"}}, "`lora_alpha` must be a number, got '1' for `to_q`"),
            ({"transformer.rank_pattern": [3]}, r"peft's `rank_pattern` must be a mapping, got \[3\]"),
            ({"transformer.r": 4}, r"'transformer\..*' has rank 2, but peft's configuration says 4"),
        ],
    )
    def test_headers(self, example: Example, changes: dict[str, object], message: str) -> None:
        weights = load_file(example.file)
        header = read_header(example.file)
        entries = json.loads(header["lora_adapter_metadata"])
        header["lora_adapter_metadata"] = json.dumps({**entries, **changes})
        with pytest.raises(ValueError, match=f"x: .*{message}"):
            parse_adapter(weights, header, source="x")

    @pytest.mark.parametrize(
        ("option", "tensor"), [("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")]
    )
    @pytest.mark.parametrize("told", [False, None])
    def test_what_pefts_configuration_says_is_off(
        self, tmp_path: Path, option: str, tensor: str, told: bool | None
    ) -> None:
        """peft would leave these tensors out without a word."""
        layer = "base_model.model.blocks.0.attn1.to_q"
        weights = {
            f"{layer}.lora_A.weight": torch.ones(2, 24),
            f"{layer}.lora_B.weight": torch.ones(24, 2),
            f"{layer}.{tensor}": torch.ones(24),
        }
        save_file(weights, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        place = tmp_path / "adapter_config.json"
        place.write_text(json.dumps(config if told is None else {**config, option: told}))
        with pytest.raises(
            ValueError, match=rf"peft's `{option}` is False, but the file has '{layer}\.{tensor}' \(1 "
        ):
            read_adapter(tmp_path / "adapter_model.safetensors")
        place.write_text(json.dumps({**config, option: True}))
        (read,) = read_adapter(tmp_path / "adapter_model.safetensors").layers.values()
        assert (read.bias is None) != (read.magnitude is None)

    def peft_folder(self, folder: Path, name: str) -> Path:
        """Weights of rank 2 under any name, beside a configuration of peft with alpha 6."""
        layer = "base_model.model.blocks.0.attn1.to_q"
        weights = {f"{layer}.lora_A.weight": torch.ones(2, 24), f"{layer}.lora_B.weight": torch.ones(24, 2)}
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
        path = folder / name
        torch.save(weights, path) if path.suffix == ".bin" else save_file(weights, path)
        return path

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
    def test_alpha_of_either_file_of_peft(self, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
        (layer,) = read_adapter(self.peft_folder(tmp_path, name)).layers.values()
        assert layer.scale == 3
        assert "no alpha" not in caplog.text

    def test_pefts_file_under_another_name(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Its scale of 3 was lost, and the log said that there was no configuration."""
        path = self.peft_folder(tmp_path, "mine.safetensors")
        with pytest.raises(
            ValueError, match=r"mine\.safetensors: it has no alpha, .*name it adapter_model\.safetensors, as"
        ):
            read_adapter(path)
        # Weights with peft's own name are what the configuration is of.
        self.peft_folder(tmp_path, "adapter_model.safetensors")
        (layer,) = read_adapter(path).layers.values()
        assert layer.scale == 1
        assert "mine.safetensors: there is no alpha in the file" in caplog.text
        # A file with alphas needs none.
        (tmp_path / "adapter_model.safetensors").unlink()
        alpha = {"base_model.model.blocks.0.attn1.to_q.alpha": torch.tensor(4)}
        save_file({**load_file(path), **alpha}, path)
        (layer,) = read_adapter(path).layers.values()
        assert layer.scale == 2

    @pytest.mark.parametrize("alpha", [torch.tensor(True), torch.tensor(2 + 0j)])
    def test_an_alpha_that_is_no_number(self, alpha: torch.Tensor) -> None:
        weights = {**layer_weights(), "diffusion_model.blocks.0.self_attn.q.alpha": alpha}
        with pytest.raises(
            ValueError, match=r"x: '.*alpha' must have floating-point numbers, got torch\.(bool|complex64)"
        ):
            parse_adapter(weights, {}, source="x")

    @pytest.mark.parametrize("told", ["1", "0.5", "2", "2.0", "None"])
    @pytest.mark.parametrize("has_alpha", [False, True])
    def test_an_alpha_that_is_in_kohyas_header_alone(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, told: str, has_alpha: bool
    ) -> None:
        """To kohya's loaders and ComfyUI a layer without an alpha has that of its rank."""
        weights = {
            f"lora_unet_blocks_0_self_attn_q.{name}": tensor
            for name, tensor in {"lora_down.weight": torch.ones(2, 24), "lora_up.weight": torch.ones(24, 2)}.items()
        }
        if has_alpha:
            weights["lora_unet_blocks_0_self_attn_q.alpha"] = torch.tensor(1.0)
        save_file(weights, tmp_path / "lora.safetensors", metadata={"ss_network_alpha": told, "ss_network_dim": "2"})
        (layer,) = read_adapter(tmp_path / "lora.safetensors").layers.values()
        assert layer.alpha == (1 if has_alpha else 2)
        says = f"lora.safetensors: the header has `ss_network_alpha` {told}, but the file has no alpha" in caplog.text
        assert says == (not has_alpha and told in ("1", "0.5"))

    def test_two_alphas(self, example: Example) -> None:
        header = read_header(example.file)
        with pytest.raises(ValueError, match=r"has `lora_adapter_metadata` but its keys are those of comfyui"):
            parse_adapter(layer_weights(), header, source="x")
        weights = {**load_file(example.file), "transformer.blocks.0.attn1.to_q.alpha": torch.tensor(1.0)}
        with pytest.raises(ValueError, match="has an alpha, but so has peft's configuration"):
            parse_adapter(weights, header, source="x")
        with pytest.raises(ValueError, match="`lora_adapter_metadata` is not valid JSON"):
            parse_adapter(load_file(example.file), {"lora_adapter_metadata": "{"}, source="x")

    def test_output_folder_in_use(self, example: Example, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            save_adapters([read_adapter(example.file)], tmp_path, "comfyui")


class TestFindLoraFiles:
    def test_folders(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="or one safetensors file, found 0"):
            find_lora_files(tmp_path)
        for name in ("a", "pytorch_lora_diffusers_weights", "pytorch_lora_transformers_weights", LORA_FILE[:-12]):
            (tmp_path / f"{name}.safetensors").touch()
            assert find_lora_files(tmp_path) == [tmp_path / f"{name}.safetensors"]
        assert find_lora_files(tmp_path / "a.safetensors") == [tmp_path / "a.safetensors"]

    def test_unclear(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / f"{name}.safetensors").touch()
        with pytest.raises(FileNotFoundError, match="found 2"):
            find_lora_files(tmp_path)
        with pytest.raises(FileNotFoundError, match="no file"):
            read_adapter(tmp_path / "c.safetensors")


class TestTwoExperts:
    """What a run with `--expert both` leaves: a file for each expert, whose header says which."""

    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        (tmp_path / "run").mkdir()
        for seed, (expert, name) in enumerate(LORA_FILES.items()):
            generator = torch.Generator().manual_seed(seed)
            layer = "transformer.blocks.0.attn1.to_q"
            weights = {
                f"{layer}.lora_A.weight": torch.randn(2, 24, generator=generator),
                f"{layer}.lora_B.weight": torch.randn(24, 2, generator=generator),
            }
            metadata = lora_metadata(base_model="Wan-AI/two", step=1, expert=expert)
            config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"])
            save_file(weights, tmp_path / "run" / name, metadata=lora_header(config.to_dict(), metadata))
        return tmp_path / "run"

    @pytest.mark.parametrize("lora_format", ["comfyui", "kohya", "diffusers"])
    def test_there_and_back(self, run_dir: Path, tmp_path: Path, lora_format: Any) -> None:
        files = save_adapters(read_adapters(run_dir), tmp_path / "out", lora_format)
        assert len(files) == 2
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(files)
        for expert, file in zip(LORA_FILES, files, strict=True):
            assert read_lora_metadata(tmp_path / "out" / file)["expert"] == expert
        assert save_adapters(read_adapters(tmp_path / "out"), tmp_path / "back", "diffusers") == [*LORA_FILES.values()]
        for name in LORA_FILES.values():
            assert_equal_weights(load_file(tmp_path / "back" / name), load_file(run_dir / name))

    def test_the_low_noise_expert_alone(self, run_dir: Path, tmp_path: Path) -> None:
        low_noise = run_dir / LORA_FILES["low_noise"]
        (name,) = save_adapters(read_adapters(low_noise), tmp_path / "out", "comfyui")
        assert name == "lora_comfyui_2.safetensors"
        (run_dir / LORA_FILES["high_noise"]).unlink()
        (adapter,) = read_adapters(run_dir)
        assert adapter.expert == "low_noise"
        assert save_adapters([adapter], tmp_path / "back", "diffusers") == [LORA_FILES["low_noise"]]

    def test_unclear(self, run_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="upstream's files are for one transformer"):
            save_adapters(read_adapters(run_dir), tmp_path / "out", "upstream")
        assert not (tmp_path / "out").exists()
        save_file(load_file(run_dir / LORA_FILES["low_noise"]), run_dir / LORA_FILES["low_noise"])
        with pytest.raises(ValueError, match=r"must name different experts, both have `hy_prfl.expert` 'high_noise'"):
            read_adapters(run_dir)


class TestMetadata:
    def test_what_a_file_tells(self, example: Example, tmp_path: Path) -> None:
        expected = {
            "base_model": "Wan-AI/tiny", "reward_model": "me/reward", "step": "40", "run": "demo", "rank": "2,3",
            "alpha": "1.5,6", "format": "diffusers",
        }  # fmt: skip
        found = read_lora_metadata(example.file)
        assert expected.items() <= found.items()
        assert set(found) - set(expected) == {"version", "config_hash"}
        for lora_format in ("comfyui", "kohya"):
            (name,) = save_adapters([read_adapter(example.file)], tmp_path / lora_format, lora_format)  # type: ignore[arg-type]
            assert read_lora_metadata(tmp_path / lora_format / name) == found | {"format": lora_format}
        if any("add_k_proj" in name for name in read_adapter(example.file).layers):
            return  # upstream's loader could not apply it
        save_adapters([read_adapter(example.file)], tmp_path / "upstream", "upstream")
        for file in (tmp_path / "upstream").iterdir():
            # There the rank stands for the alpha.
            assert read_lora_metadata(file) == found | {"format": "upstream", "alpha": "2,3"}

    def test_only_diffusers_files_have_pefts_configuration(self, folder: Path, tmp_path: Path) -> None:
        example = upstream_example(folder, tmp_path / "trained")
        # In another format diffusers would apply it on top of the alpha that is in the weights.
        assert json.loads(read_header(example.file)["lora_adapter_metadata"])["transformer.lora_alpha"] == 6
        for lora_format in ("comfyui", "kohya", "upstream"):
            save_adapters([read_adapter(example.file)], tmp_path / lora_format, lora_format)  # type: ignore[arg-type]
            for path in (tmp_path / lora_format).iterdir():
                assert "lora_adapter_metadata" not in read_header(path)

    def test_entries_of_other_programs_are_kept(self, example: Example, tmp_path: Path) -> None:
        weights = load_file(example.file)
        save_file(weights, tmp_path / "a.safetensors", metadata={"format": "pt", "modelspec.title": "Mine"})
        assert read_lora_metadata(tmp_path / "a.safetensors") == {}
        adapter = read_adapter(tmp_path / "a.safetensors")
        assert adapter.metadata == {"modelspec.title": "Mine"}
        (name,) = save_adapters([adapter], tmp_path / "out", "comfyui")
        assert read_header(tmp_path / "out" / name)["modelspec.title"] == "Mine"

    def test_hash_of_the_recipe(self) -> None:
        def config_hash(config: dict[str, Any]) -> str:
            return lora_metadata(base_model="b", step=1, config=config)["hy_prfl.config_hash"]

        assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
        assert config_hash({"a": 1}) != config_hash({"a": 2})
        assert set(lora_metadata(base_model="b", step=1)) == {"hy_prfl.version", "hy_prfl.base_model", "hy_prfl.step"}

    def test_an_adapter_made_by_hand(self, example: Example, tmp_path: Path) -> None:
        adapter = Adapter(layers=read_adapter(example.file).layers)
        save_adapters([adapter], tmp_path / "out", "diffusers")
        assert_equal_weights(load_file(tmp_path / "out" / LORA_FILE), load_file(example.file))
