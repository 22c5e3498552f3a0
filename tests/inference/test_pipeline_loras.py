"""
LoRA files of every program, put into a pipeline by `load_pipeline`.

What a file must do is computed here, on weights under Wan's own names, by the rule that all programs share:
`weight + scale * alpha / rank * up @ down`, and `weight + scale * difference`.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    WanTransformer3DModel,
)
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hy_prfl.formats.layout import LORA_FILES
from hy_prfl.formats.lora_metadata import lora_header
from hy_prfl.inference.pipelines import load_pipeline
from tests.formats.native_layout import native_name, native_weights, run
from tests.hub.hub_server import HubServer


LINEARS = [
    "blocks.0.self_attn.q",
    "blocks.1.cross_attn.k",
    "blocks.1.cross_attn.o",
    "blocks.2.ffn.0",
    "blocks.2.ffn.2",
]
IMAGE_LINEARS = ["blocks.0.cross_attn.k_img", "blocks.2.cross_attn.v_img", "img_emb.proj.1"]
OUTSIDE = ["text_embedding.0", "time_embedding.2", "time_projection.1", "head.head"]
NORMS = ["blocks.0.norm3", "blocks.1.self_attn.norm_q", "blocks.2.cross_attn.norm_k"]


def load_transformer(folder: Path, subfolder: str = "transformer") -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, subfolder=subfolder).eval()


def noise(*shape: int, seed: int = 0, scale: float = 0.3) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(folder: Path, layers: list[str], rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrices down and up of a LoRA for the layers, by their native names; every second layer has one rank more."""
    weights = native_weights(load_transformer(folder))
    found = {}
    for index, name in enumerate(layers):
        out_features, in_features = weights[f"{name}.weight"].flatten(1).shape
        size = rank + index % 2
        found[name] = (noise(size, in_features, seed=index), noise(out_features, size, seed=100 + index))
    return found


def expected_output(
    folder: Path,
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    scales: Mapping[str, float] | float = 1.0,
    differences: Mapping[str, torch.Tensor] | None = None,
    subfolder: str = "transformer",
) -> torch.Tensor:
    """Output of the transformer with all of it added to its weights, which have native names here."""
    transformer = load_transformer(folder, subfolder)
    names = {native_name(name): tensor for name, tensor in transformer.state_dict().items()}
    for name, (down, up) in lora.items():
        weight = names[f"{name}.weight"]
        scale = scales if isinstance(scales, float) else scales[name]
        weight += scale * (up.double() @ down.double()).reshape(weight.shape)
    for name, difference in (differences or {}).items():
        names[name] += difference
    return run(transformer)


def diffusers_name(native: str) -> str:
    """Native name -> diffusers', by a table of our own."""
    table = {
        "self_attn.": "attn1.", "cross_attn.": "attn2.", ".k_img": ".add_k_proj", ".v_img": ".add_v_proj",
        "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1", "head.head": "proj_out",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
    }  # fmt: skip
    for old, new in table.items():
        native = native.replace(old, new)
    return re.sub(r"\.([qkv])$", r".to_\1", re.sub(r"\.o$", ".to_out.0", native))


# Program -> name of a layer in its files, the ends of down and up, and whether there is an alpha.
LAYOUTS: dict[str, tuple[Callable[[str], str], str, str, bool]] = {
    "diffusion-pipe": (lambda name: f"diffusion_model.{name}", "lora_A.weight", "lora_B.weight", False),
    "comfyui": (lambda name: f"diffusion_model.{name}", "lora_down.weight", "lora_up.weight", True),
    "whole checkpoint": (lambda name: f"model.diffusion_model.{name}", "lora_down.weight", "lora_up.weight", True),
    "musubi-tuner": (lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down.weight", "lora_up.weight", True),
    "kohya without alpha": (
        lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down.weight", "lora_up.weight", False
    ),
    "VideoX-Fun": (lambda name: f"lora_unet__{name.replace('.', '_')}", "lora_down.weight", "lora_up.weight", True),
    "LyCORIS": (
        lambda name: f"lycoris_{diffusers_name(name).replace('.', '_')}", "lora_down.weight", "lora_up.weight", True
    ),
    "DiffSynth": (lambda name: name, "lora_A.default.weight", "lora_B.default.weight", False),
    "DiffSynth with its prefix": (lambda name: f"pipe.dit.{name}", "lora_A.default.weight", "lora_B.default.weight", False),
    "LightX2V": (lambda name: name, "lora_down.weight", "lora_up.weight", False),
    "diffusers": (lambda name: f"transformer.{diffusers_name(name)}", "lora_A.weight", "lora_B.weight", False),
    "peft": (lambda name: f"base_model.model.{diffusers_name(name)}", "lora_A.weight", "lora_B.weight", False),
    "peft without prefix": (diffusers_name, "lora_A.weight", "lora_B.weight", False),
    "upstream": (lambda name: f"base_model.model.{name}", "lora_A.weight", "lora_B.weight", False),
    "upstream's for kohya": (lambda name: f"lora_{name.replace('.', '_')}", "lora_down.weight", "lora_up.weight", False),
}  # fmt: skip


def write(
    path: Path, layout: str, lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float = 3.0
) -> dict[str, float]:
    """Write the LoRA as the program does; returns the scale of each layer."""
    name_of, down_end, up_end, has_alpha = LAYOUTS[layout]
    weights = {}
    for name, (down, up) in lora.items():
        weights[f"{name_of(name)}.{down_end}"] = down
        weights[f"{name_of(name)}.{up_end}"] = up
        if has_alpha:
            weights[f"{name_of(name)}.alpha"] = torch.tensor(alpha)
    save_file(weights, path)
    return {name: alpha / len(down) if has_alpha else 1.0 for name, (down, _) in lora.items()}


def load(folder: Path, path: Path, **options: Any) -> WanTransformer3DModel:
    return load_pipeline(str(folder), lora_path=str(path), dtype=torch.float32, **options).transformer


def check(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 0.01


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_text_to_video(self, pipeline_dir: Path, tmp_path: Path, layout: str) -> None:
        lora = factors(pipeline_dir, [*LINEARS, *OUTSIDE])
        scales = write(tmp_path / "a.safetensors", layout, lora)
        expected = expected_output(pipeline_dir, lora, scales)
        check(run(load(pipeline_dir, tmp_path / "a.safetensors")), expected, run(load_transformer(pipeline_dir)))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_image_to_video(self, i2v_pipeline_dir: Path, tmp_path: Path, layout: str) -> None:
        lora = factors(i2v_pipeline_dir, [*LINEARS, *IMAGE_LINEARS])
        scales = write(tmp_path / "a.safetensors", layout, lora)
        expected = expected_output(i2v_pipeline_dir, lora, scales)
        check(
            run(load(i2v_pipeline_dir, tmp_path / "a.safetensors")), expected, run(load_transformer(i2v_pipeline_dir))
        )

    def test_one_image_projection_alone(self, i2v_pipeline_dir: Path, tmp_path: Path) -> None:
        # diffusers overwrites it with zeros where its other half is missing.
        lora = factors(i2v_pipeline_dir, ["blocks.0.cross_attn.k", "blocks.0.cross_attn.k_img"])
        write(tmp_path / "a.safetensors", "diffusers", lora)
        expected = expected_output(i2v_pipeline_dir, lora)
        found = run(load(i2v_pipeline_dir, tmp_path / "a.safetensors"))
        check(
            found,
            expected,
            expected_output(i2v_pipeline_dir, {"blocks.0.cross_attn.k": lora["blocks.0.cross_attn.k"]}),
        )

    def test_strength(self, pipeline_dir: Path, tmp_path: Path) -> None:
        lora = factors(pipeline_dir, LINEARS)
        scales = write(tmp_path / "a.safetensors", "musubi-tuner", lora)
        pipeline = load_pipeline(
            str(pipeline_dir), lora_path=str(tmp_path / "a.safetensors"), dtype=torch.float32, lora_scale=0.5
        )
        half = expected_output(pipeline_dir, lora, {name: 0.5 * scale for name, scale in scales.items()})
        check(run(pipeline.transformer), half, run(load_transformer(pipeline_dir)))
        # It is an adapter of peft like any other.
        pipeline.set_adapters(["prfl"], [1.0])
        check(run(pipeline.transformer), expected_output(pipeline_dir, lora, scales), half)
        pipeline.unload_lora_weights()
        torch.testing.assert_close(run(pipeline.transformer), run(load_transformer(pipeline_dir)))

    def test_several(self, pipeline_dir: Path, tmp_path: Path) -> None:
        """`W + sum_i weight_i * alpha_i / rank_i * up_i @ down_i`, in layers that they share and in those of one alone."""
        first, second = factors(pipeline_dir, LINEARS), factors(pipeline_dir, [*LINEARS[2:], *OUTSIDE], rank=3)
        second = {name: (down.flip(0, 1), up) for name, (down, up) in second.items()}
        scales = write(tmp_path / "a.safetensors", "musubi-tuner", first)
        write(tmp_path / "b.safetensors", "diffusers", second)
        paths = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
        weights = [0.5, -1.5]
        transformer = load_transformer(pipeline_dir)
        names = {native_name(name): tensor for name, tensor in transformer.state_dict().items()}
        for weight, lora, own in zip(weights, (first, second), (scales, dict.fromkeys(second, 1.0)), strict=True):
            for name, (down, up) in lora.items():
                update = weight * own[name] * (up.double() @ down.double())
                names[f"{name}.weight"] += update.reshape(names[f"{name}.weight"].shape)
        pipeline = load_pipeline(str(pipeline_dir), lora_path=paths, lora_weights=weights, dtype=torch.float32)
        check(run(pipeline.transformer), run(transformer), run(load(pipeline_dir, tmp_path / "a.safetensors")))
        one_strength = load_pipeline(str(pipeline_dir), lora_path=paths, lora_scale=0.5, dtype=torch.float32)
        same = load_pipeline(str(pipeline_dir), lora_path=paths, lora_weights=[0.5, 0.5], dtype=torch.float32)
        assert torch.equal(run(one_strength.transformer), run(same.transformer))
        with pytest.raises(ValueError, match=r"`lora_path`: 2 LoRAs and 1 weights"):
            load_pipeline(str(pipeline_dir), lora_path=paths, lora_weights=[1.0])

    def test_several_with_differences(self, pipeline_dir: Path, tmp_path: Path) -> None:
        lora = factors(pipeline_dir, LINEARS)
        write(tmp_path / "a.safetensors", "diffusion-pipe", lora)
        shapes = {name: weight.shape for name, weight in native_weights(load_transformer(pipeline_dir)).items()}
        name = f"{LINEARS[4]}.bias"
        difference = noise(*shapes[name])
        save_file({f"diffusion_model.{LINEARS[4]}.diff_b": difference}, tmp_path / "b.safetensors")
        paths = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
        expected = expected_output(pipeline_dir, lora, 2.0, {name: 0.5 * difference})
        pipeline = load_pipeline(str(pipeline_dir), lora_path=paths, lora_weights=[2.0, 0.5], dtype=torch.float32)
        check(run(pipeline.transformer), expected, expected_output(pipeline_dir, lora, 2.0))

    def test_one_that_names_no_expert(
        self, expert_pipeline_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = str(tmp_path / "a.safetensors")
        write(Path(path), "diffusers", factors(expert_pipeline_dir, LINEARS[:1]))
        # With both options the user has said which is which.
        for options, is_warned in (({"lora_path": path}, True), ({"lora_path": path, "lora_2_path": path}, False)):
            caplog.clear()
            load_pipeline(str(expert_pipeline_dir), dtype=torch.float32, **options)
            assert (f"'{path}' does not say which expert it is for" in caplog.text) is is_warned

    def test_several_in_both_experts(self, expert_pipeline_dir: Path, tmp_path: Path) -> None:
        loras = [factors(expert_pipeline_dir, layers) for layers in (LINEARS[:3], LINEARS[1:])]
        paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
        for path, lora in zip(paths, loras, strict=True):
            write(Path(path), "diffusers", lora)
        pipeline = load_pipeline(
            str(expert_pipeline_dir),
            lora_path=paths[0],
            lora_weights=[0.5],
            lora_2_path=paths,
            lora_2_weights=[1.0, 0.25],
            dtype=torch.float32,
        )
        check(
            run(pipeline.transformer),
            expected_output(expert_pipeline_dir, loras[0], 0.5),
            run(load_transformer(expert_pipeline_dir)),
        )
        low = load_transformer(expert_pipeline_dir, "transformer_2")
        names = {native_name(name): tensor for name, tensor in low.state_dict().items()}
        for weight, lora in zip((1.0, 0.25), loras, strict=True):
            for name, (down, up) in lora.items():
                names[f"{name}.weight"] += weight * up @ down
        check(run(pipeline.transformer_2), run(low), run(load_transformer(expert_pipeline_dir, "transformer_2")))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
    def test_narrow_types(self, pipeline_dir: Path, tmp_path: Path, dtype: torch.dtype) -> None:
        lora = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in factors(pipeline_dir, LINEARS).items()}
        write(tmp_path / "a.safetensors", "DiffSynth", lora)
        expected = expected_output(pipeline_dir, lora)
        found = run(load(pipeline_dir, tmp_path / "a.safetensors"))
        # Half types are computed in half.
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.03)
        assert (expected - run(load_transformer(pipeline_dir))).abs().max() > 0.1

    def test_pickled(self, pipeline_dir: Path, tmp_path: Path) -> None:
        lora = factors(pipeline_dir, LINEARS)
        write(tmp_path / "a.safetensors", "diffusion-pipe", lora)
        torch.save(load_file(tmp_path / "a.safetensors"), tmp_path / "a.pt")
        expected = expected_output(pipeline_dir, lora)
        check(run(load(pipeline_dir, tmp_path / "a.pt")), expected, run(load_transformer(pipeline_dir)))

    def test_no_warning(self, i2v_pipeline_dir: Path, tmp_path: Path) -> None:
        write(tmp_path / "a.safetensors", "comfyui", factors(i2v_pipeline_dir, LINEARS))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            load(i2v_pipeline_dir, tmp_path / "a.safetensors")


class TestComfyUI:
    """What ComfyUI's own trainer writes: factors of all matrices, differences of all vectors, alpha 1."""

    @pytest.mark.parametrize("scale", [1.0, 0.5])
    def test_all_that_it_trains(self, i2v_pipeline_dir: Path, tmp_path: Path, scale: float) -> None:
        weights = native_weights(load_transformer(i2v_pipeline_dir))
        modules = sorted({name.rpartition(".")[0] for name in weights if name.endswith((".weight", ".bias"))})
        layers = [name for name in modules if weights[f"{name}.weight"].ndim > 1]
        # The patch embedding's factors are matrices there, though its weight is that of a convolution.
        assert "patch_embedding" in layers
        lora = factors(i2v_pipeline_dir, layers, rank=4)
        vectors = {name: tensor for name, tensor in weights.items() if tensor.ndim == 1}
        differences = {name: noise(len(vectors[name]), seed=index) for index, name in enumerate(vectors)}
        assert any("norm3.weight" in name for name in differences)
        file = {}
        for name, (down, up) in lora.items():
            file |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(1.0),
            }
        for name, difference in differences.items():
            file[name.replace(".weight", ".diff").replace(".bias", ".diff_b")] = difference
        save_file({f"diffusion_model.{name}": tensor for name, tensor in file.items()}, tmp_path / "a.safetensors")
        expected = expected_output(
            i2v_pipeline_dir,
            lora,
            {name: scale / len(down) for name, (down, _) in lora.items()},
            {name: scale * tensor for name, tensor in differences.items()},
        )
        found = run(load(i2v_pipeline_dir, tmp_path / "a.safetensors", lora_scale=scale))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert (expected - run(load_transformer(i2v_pipeline_dir))).abs().max() > 0.1

    @pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", ""])
    @pytest.mark.parametrize("name", [*NORMS, "blocks.0.self_attn.q"])
    def test_differences_alone(self, pipeline_dir: Path, tmp_path: Path, prefix: str, name: str) -> None:
        weight = native_weights(load_transformer(pipeline_dir))[f"{name}.weight"]
        difference = noise(*weight.shape, scale=2.0)
        key = name.replace(".", "_") if prefix == "lora_unet_" else name
        save_file({f"{prefix}{key}.diff": difference}, tmp_path / "a.safetensors")
        expected = expected_output(pipeline_dir, {}, differences={f"{name}.weight": difference})
        check(run(load(pipeline_dir, tmp_path / "a.safetensors")), expected, run(load_transformer(pipeline_dir)))

    @pytest.mark.parametrize(
        ("key", "name"),
        [
            ("diffusion_model.blocks.1.diff_m", "blocks.1.modulation"),
            ("diffusion_model.blocks.1.modulation.diff", "blocks.1.modulation"),
            ("diffusion_model.head.diff_m", "head.modulation"),
            ("diffusion_model.blocks.0.norm3.w_norm", "blocks.0.norm3.weight"),
            ("diffusion_model.blocks.0.norm3.b_norm", "blocks.0.norm3.bias"),
            ("diffusion_model.blocks.0.norm3.diff_b", "blocks.0.norm3.bias"),
            ("diffusion_model.blocks.2.ffn.2.diff_b", "blocks.2.ffn.2.bias"),
            ("diffusion_model.patch_embedding.diff", "patch_embedding.weight"),
        ],
    )
    def test_kinds_of_differences(self, pipeline_dir: Path, tmp_path: Path, key: str, name: str) -> None:
        lora = factors(pipeline_dir, LINEARS)
        write(tmp_path / "a.safetensors", "diffusion-pipe", lora)
        difference = noise(*native_weights(load_transformer(pipeline_dir))[name].shape, scale=1.0)
        save_file({**load_file(tmp_path / "a.safetensors"), key: difference}, tmp_path / "a.safetensors")
        expected = expected_output(pipeline_dir, lora, differences={name: difference})
        without = expected_output(pipeline_dir, lora)
        check(run(load(pipeline_dir, tmp_path / "a.safetensors")), expected, without)


class TestPeft:
    """DoRA, rsLoRA and patterns as peft has them, saved by diffusers and by peft itself."""

    OPTIONS: dict[str, dict[str, Any]] = {
        "plain": {},
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True, "rank_pattern": {"attn2.to_v": 5}, "alpha_pattern": {"ffn.net.2": 1.5}},
        "rslora and dora": {"use_rslora": True, "use_dora": True},
        "bias": {"lora_bias": True},
    }

    def trained(self, folder: Path, options: Mapping[str, Any]) -> Any:
        targets = ["to_q", "to_v", "ffn.net.2"]
        config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options)
        model = get_peft_model(load_transformer(folder), config).eval()
        for index, (name, weight) in enumerate(model.named_parameters()):
            if "magnitude" in name:
                weight.data *= 1 + noise(*weight.shape, seed=index)
            elif "lora_" in name:
                weight.data = noise(*weight.shape, seed=index)
        return model

    @pytest.mark.parametrize("kind", ["diffusers", "peft"])
    @pytest.mark.parametrize("name", OPTIONS)
    def test_output_of_peft(self, pipeline_dir: Path, tmp_path: Path, name: str, kind: str) -> None:
        model = self.trained(pipeline_dir, self.OPTIONS[name])
        if kind == "peft":
            model.save_pretrained(tmp_path / "lora")
            path = tmp_path / "lora"
        else:
            weights = get_peft_model_state_dict(model)
            weights = {key.replace("base_model.model.", "transformer."): tensor for key, tensor in weights.items()}
            path = tmp_path / "lora.safetensors"
            save_file(weights, path, metadata=lora_header(model.peft_config["default"].to_dict(), {}))
        check(run(load(pipeline_dir, path)), run(model), run(load_transformer(pipeline_dir)))

    def test_dora_without_a_header(self, pipeline_dir: Path, tmp_path: Path) -> None:
        model = self.trained(pipeline_dir, {"use_dora": True})
        weights = get_peft_model_state_dict(model)
        save_file(
            {key.replace("base_model.model.", "transformer."): t for key, t in weights.items()},
            tmp_path / "a.safetensors",
        )
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, "scaling"):
                    module.scaling["default"] = 1.0
        check(run(load(pipeline_dir, tmp_path / "a.safetensors")), run(model), run(load_transformer(pipeline_dir)))

    def test_alpha_that_no_file_tells_is_said(
        self, pipeline_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(tmp_path / "a.safetensors", "peft", factors(pipeline_dir, LINEARS))
        load(pipeline_dir, tmp_path / "a.safetensors")
        assert "no alpha in the file and no adapter_config.json for it" in caplog.text


class TestRefusals:
    """All of a file or nothing: what has no place is named, before the weights of the pipeline are read."""

    @pytest.fixture
    def config_dir(self, pipeline_dir: Path, tmp_path: Path) -> Path:
        """A pipeline without any weights."""
        folder = tmp_path / "pipeline"
        for file in pipeline_dir.rglob("*"):
            if file.is_file() and file.suffix != ".safetensors":
                target = folder / file.relative_to(pipeline_dir)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        return folder

    def refuse(self, folder: Path, path: Path, message: str, **options: str) -> None:
        with pytest.raises(ValueError, match=rf"(?s)`lora_path` .*{message}"):
            load_pipeline(str(folder), lora_path=str(path), **options)  # type: ignore[arg-type]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_image_layers_in_text_to_video(
        self, config_dir: Path, i2v_pipeline_dir: Path, tmp_path: Path, layout: str
    ) -> None:
        lora = factors(i2v_pipeline_dir, [*LINEARS, "blocks.0.cross_attn.k_img"])
        write(tmp_path / "a.safetensors", layout, lora)
        key = LAYOUTS[layout][0]("blocks.0.cross_attn.k_img")
        self.refuse(
            config_dir, tmp_path / "a.safetensors", rf"tensors have no place in the model: '{key}.*image-to-video"
        )

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_blocks_that_the_model_has_not(
        self, config_dir: Path, pipeline_dir: Path, tmp_path: Path, layout: str
    ) -> None:
        lora = factors(pipeline_dir, LINEARS)
        write(tmp_path / "a.safetensors", layout, lora)
        weights = load_file(tmp_path / "a.safetensors")
        keys = [key for key in weights if "blocks.2" in key or "blocks_2" in key]
        for key in keys:
            weights[key.replace("blocks.2", "blocks.30").replace("blocks_2", "blocks_30")] = weights.pop(key)
        save_file(weights, tmp_path / "a.safetensors")
        self.refuse(
            config_dir,
            tmp_path / "a.safetensors",
            rf"{len(keys)} tensors have no place.*blocks.30.*has 3 blocks.*block 30",
        )

    @pytest.mark.parametrize(
        ("key", "tensor", "message"),
        [
            (
                "blocks.9.norm3.diff",
                torch.ones(24),
                r"1 tensors have no place in the model: 'diffusion_model\.blocks\.9",
            ),
            ("img_emb.proj.0.diff", torch.ones(32), r"no place.*img_emb\.proj\.0\.diff'.*image-to-video"),
            ("blocks.0.norm3.diff", torch.ones(25), r"difference of 'blocks\.0\.norm2\.weight'.*\(24,\).*got \(25,\)"),
            ("blocks.0.ffn.0.diff_b", torch.ones(24), r"must be \(32,\) for this model, got \(24,\)"),
            ("blocks.0.norm3.diff", torch.full((24,), math.nan), r"norm3\.diff' holds a NaN"),
            ("blocks.0.norm3.weight", torch.ones(24), r"unknown key 'diffusion_model\.blocks\.0\.norm3\.weight'"),
            ("blocks.0.self_attn.x.diff", torch.ones(24), r"there is no layer 'blocks\.0\.self_attn\.x'"),
            ("something.else", torch.ones(24), r"unknown key 'diffusion_model\.something\.else'"),
        ],
    )
    def test_other_tensors(
        self, config_dir: Path, pipeline_dir: Path, tmp_path: Path, key: str, tensor: torch.Tensor, message: str
    ) -> None:
        write(tmp_path / "a.safetensors", "comfyui", factors(pipeline_dir, LINEARS))
        weights = load_file(tmp_path / "a.safetensors")
        save_file({**weights, f"diffusion_model.{key}": tensor}, tmp_path / "a.safetensors")
        self.refuse(config_dir, tmp_path / "a.safetensors", message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda down, up: (noise(2, 48), up), r"down of 'blocks\.0\.attn1\.to_q'.*\(2, 24\).*got \(2, 48\)"),
            (lambda down, up: (down, noise(48, 2)), r"up of 'blocks\.0\.attn1\.to_q'.*\(24, 2\).*got \(48, 2\)"),
            (lambda down, up: (down[..., None, None], up[..., None, None]), r"got \(2, 24, 1, 1\)"),
            (lambda down, up: (down * math.inf, up), r"holds a NaN or an infinity"),
            (lambda down, up: (down.to(torch.int8), up), r"must have floating-point numbers, got torch\.int8"),
        ],
    )
    def test_factors(
        self, config_dir: Path, pipeline_dir: Path, tmp_path: Path, change: Callable[..., Any], message: str
    ) -> None:
        lora = factors(pipeline_dir, LINEARS)
        lora[LINEARS[0]] = change(*lora[LINEARS[0]])
        write(tmp_path / "a.safetensors", "musubi-tuner", lora)
        self.refuse(config_dir, tmp_path / "a.safetensors", message)

    @pytest.mark.parametrize("layer", ["blocks.0.self_attn.q", "blocks.2.ffn.2"])
    @pytest.mark.parametrize("alpha", [0.0, math.nan, math.inf])
    def test_alpha(self, config_dir: Path, pipeline_dir: Path, tmp_path: Path, layer: str, alpha: float) -> None:
        write(tmp_path / "a.safetensors", "comfyui", factors(pipeline_dir, LINEARS))
        weights = {**load_file(tmp_path / "a.safetensors"), f"diffusion_model.{layer}.alpha": torch.tensor(alpha)}
        save_file(weights, tmp_path / "a.safetensors")
        self.refuse(config_dir, tmp_path / "a.safetensors", rf"{layer}': alpha must be a number other than 0")

    def test_a_lora_is_checked_against_the_tuned_transformer(
        self, config_dir: Path, pipeline_dir: Path, tmp_path: Path
    ) -> None:
        lora = factors(pipeline_dir, LINEARS)
        write(tmp_path / "a.safetensors", "comfyui", lora)
        load_transformer(pipeline_dir).save_pretrained(tmp_path / "tuned")
        config = tmp_path / "tuned" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 2}))
        self.refuse(config_dir, tmp_path / "a.safetensors", "has 2 blocks", transformer_path=str(tmp_path / "tuned"))

    def test_empty_file(self, config_dir: Path, tmp_path: Path) -> None:
        save_file({}, tmp_path / "a.safetensors")
        self.refuse(config_dir, tmp_path / "a.safetensors", "the file has no tensors")

    def test_cut_file(self, config_dir: Path, pipeline_dir: Path, tmp_path: Path) -> None:
        write(tmp_path / "a.safetensors", "comfyui", factors(pipeline_dir, LINEARS))
        (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:50])
        self.refuse(config_dir, tmp_path / "b.safetensors", "not a safetensors file")

    def test_whole_model(self, config_dir: Path, pipeline_dir: Path, tmp_path: Path) -> None:
        save_file(native_weights(load_transformer(pipeline_dir)), tmp_path / "a.safetensors")
        self.refuse(config_dir, tmp_path / "a.safetensors", "these are whole weights.*not a LoRA.*`transformer_path`")
        self.refuse(config_dir, pipeline_dir / "transformer" / "diffusion_pytorch_model.safetensors", "not a LoRA")

    def test_pair_in_a_pipeline_of_one_transformer(self, pipeline_dir: Path, config_dir: Path, tmp_path: Path) -> None:
        lora = factors(pipeline_dir, LINEARS)
        (tmp_path / "pair").mkdir()
        for name in LORA_FILES.values():
            write(tmp_path / "pair" / name, "diffusers", lora)
        self.refuse(config_dir, tmp_path / "pair", "must be a LoRA of one transformer, not of a pair")
        for expert, name in LORA_FILES.items():
            weights = load_file(tmp_path / "pair" / name)
            save_file(weights, tmp_path / "pair" / name, metadata={"hy_prfl.expert": expert})
            self.refuse(config_dir, tmp_path / "pair" / name, "must be a LoRA of one transformer, not of a pair")
        with pytest.raises(ValueError, match="`lora_2_path` must be left out"):
            load_pipeline(str(config_dir), lora_2_path=str(tmp_path / "pair"))


class TestFolders:
    def test_which_file_counts(self, expert_pipeline_dir: Path, tmp_path: Path) -> None:
        lora = factors(expert_pipeline_dir, LINEARS)
        for name in ("lora_comfyui.safetensors", "lora_comfyui_2.safetensors"):
            write(tmp_path / name, "comfyui", lora)
        options = {"lora_path": str(tmp_path), "lora_2_path": str(tmp_path)}
        pipeline = load_pipeline(str(expert_pipeline_dir), dtype=torch.float32, **options)  # type: ignore[arg-type]
        scales = {name: 3.0 / len(down) for name, (down, _) in lora.items()}
        for folder in ("transformer", "transformer_2"):
            expected = expected_output(expert_pipeline_dir, lora, scales, subfolder=folder)
            check(run(getattr(pipeline, folder)), expected, run(load_transformer(expert_pipeline_dir, folder)))

    def test_several_files_are_named(self, pipeline_dir: Path, tmp_path: Path) -> None:
        for name in ("a_high_noise.safetensors", "b_low_noise.safetensors"):
            (tmp_path / name).touch()
        with pytest.raises(FileNotFoundError, match=r"found 2: a_high_noise\.safetensors, b_low_noise\.safetensors"):
            load_pipeline(str(pipeline_dir), lora_path=str(tmp_path))

    def test_upstream_folder(self, pipeline_dir: Path, tmp_path: Path) -> None:
        lora = factors(pipeline_dir, LINEARS)
        write(tmp_path / "pytorch_lora_transformers_weights.safetensors", "upstream", lora)
        write(tmp_path / "pytorch_lora_kohya_weights.safetensors", "upstream's for kohya", lora)
        write(tmp_path / "pytorch_lora_diffusers_weights.safetensors", "diffusion-pipe", lora)
        expected = expected_output(pipeline_dir, lora)
        check(run(load(pipeline_dir, tmp_path)), expected, run(load_transformer(pipeline_dir)))


class TestHub:
    def test_repository(
        self, hub: HubServer, pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lora = factors(pipeline_dir, LINEARS)
        scales = write(tmp_path / "mine.safetensors", "musubi-tuner", lora)
        api = HfApi()
        api.create_repo("user/lora")
        api.upload_file(
            path_or_fileobj=tmp_path / "mine.safetensors", path_in_repo="mine.safetensors", repo_id="user/lora"
        )
        expected = expected_output(pipeline_dir, lora, scales)
        check(run(load(pipeline_dir, Path("user/lora"))), expected, run(load_transformer(pipeline_dir)))
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            check(run(load(pipeline_dir, Path("user/lora"))), expected, run(load_transformer(pipeline_dir)))
        api.upload_file(
            path_or_fileobj=tmp_path / "mine.safetensors", path_in_repo="b.safetensors", repo_id="user/lora"
        )
        with pytest.raises(FileNotFoundError, match=r"`lora_path` 'user/lora': .*found 2: b\.safetensors, mine"):
            load(pipeline_dir, Path("user/lora"))
        with pytest.raises(
            FileNotFoundError, match="`lora_path`: there is no file or folder 'user/typo' here, and as a repo"
        ):
            load(pipeline_dir, Path("user/typo"))
