"""LoRAs of other programs, written in our formats and applied by the rule of the program that each is for."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hy_prfl.formats.layout import LORA_FILES
from hy_prfl.formats.lora import read_adapter, read_adapters
from hy_prfl.formats.lora_metadata import lora_header
from hy_prfl.formats.lora_writing import save_adapters, upstream_use

from .native_layout import assert_equal_weights, native_name, native_weights, run
from .test_lora import RULES, Example, add_lora, apply_native, load_transformer, save_lora


LORA_FILE = LORA_FILES["high_noise"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_all_formats(folder: Path, source: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """Convert a LoRA to each format and apply each file: diffusers' by diffusers itself, the others by their rule."""
    base = load_transformer(folder)
    assert (expected - run(base)).abs().max() > 0.01
    refused = any("patch_embedding" in name for adapter in read_adapters(source) for name in adapter.layers)
    for (lora_format, name), rule in RULES.items():
        if lora_format == "upstream" and refused:
            continue
        output_dir = tmp_path / lora_format
        if not output_dir.exists():
            save_adapters(read_adapters(source), output_dir, lora_format)  # type: ignore[arg-type]
        output = run(apply_native(base, output_dir / name, tmp_path, rule))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    save_adapters(read_adapters(source), tmp_path / "diffusers", "diffusers")
    pipeline = WanPipeline.from_pretrained(folder, vae=None, text_encoder=None, tokenizer=None)
    pipeline.load_lora_weights(tmp_path / "diffusers", weight_name=LORA_FILE)
    torch.testing.assert_close(run(pipeline.transformer), expected, rtol=1e-4, atol=1e-4)


class TestOtherPrograms:
    # Key of the down factor of a layer, of the up factor, and of the alpha, which is 6 for the rank 2.
    FILES: dict[str, tuple[str, str, str | None]] = {
        "DiffSynth": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", None),
        "VideoX-Fun": ("lora_unet__{}.lora_down.weight", "lora_unet__{}.lora_up.weight", "lora_unet__{}.alpha"),
        "kohya without alpha": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", None),
        "LyCORIS": ("lycoris_{}.lora_down.weight", "lycoris_{}.lora_up.weight", "lycoris_{}.alpha"),
        "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None),
    }

    @pytest.mark.parametrize("program", FILES)
    def test_into_every_format(self, pipeline_dir: Path, tmp_path: Path, program: str) -> None:
        down_key, up_key, alpha_key = self.FILES[program]
        transformer = load_transformer(pipeline_dir)
        weights = {}
        for index, name in enumerate(
            ["blocks.0.attn1.to_q", "blocks.1.attn2.to_k", "blocks.2.ffn.net.0.proj", "proj_out"]
        ):
            parameter = transformer.get_parameter(f"{name}.weight")
            out_features, in_features = parameter.shape
            down, up = noise(2, in_features, seed=index), noise(out_features, 2, seed=9 + index)
            written = name if program in ("peft", "LyCORIS") else native_name(f"{name}.").removesuffix(".")
            written = written.replace(".", "_") if "_{}" in down_key else written
            weights |= {down_key.format(written): down, up_key.format(written): up}
            if alpha_key is not None:
                weights[alpha_key.format(written)] = torch.tensor(6.0)
            parameter.data += (1.0 if alpha_key is None else 3.0) * up @ down
        save_file(weights, tmp_path / "lora.safetensors")
        check_all_formats(pipeline_dir, tmp_path / "lora.safetensors", run(transformer), tmp_path)

    def test_pefts_folder(self, pipeline_dir: Path, tmp_path: Path) -> None:
        # Its alpha is in the configuration beside the weights.
        transformer = load_transformer(pipeline_dir)
        add_lora(transformer, ["to_q", "ffn.net.2"], r=2, lora_alpha=5)
        config = transformer.peft_config["default"]
        weights = get_peft_model_state_dict(transformer)
        (tmp_path / "lora").mkdir()
        save_file(
            {f"base_model.model.{name}": t for name, t in weights.items()},
            tmp_path / "lora" / "adapter_model.safetensors",
        )
        config.save_pretrained(tmp_path / "lora")
        check_all_formats(pipeline_dir, tmp_path / "lora", run(transformer), tmp_path)

    def test_pefts_patterns_are_in_the_words_of_its_model(self, pipeline_dir: Path, tmp_path: Path) -> None:
        # As diffusion-pipe saves it: native names, and peft's configuration of the native model.
        transformer = load_transformer(pipeline_dir)
        q, k = (noise(24, 2, seed=index) @ noise(2, 24, seed=5 + index) for index in range(2))
        weights = {}
        for index, (name, native) in enumerate((("to_q", "q"), ("to_k", "k"))):
            key = f"diffusion_model.blocks.0.self_attn.{native}"
            weights |= {
                f"{key}.lora_A.weight": noise(2, 24, seed=5 + index),
                f"{key}.lora_B.weight": noise(24, 2, seed=index),
            }
            parameter = transformer.get_parameter(f"blocks.0.attn1.{name}.weight")
            parameter.data += {"to_q": 4 * q, "to_k": 0.5 * k}[name]
        (tmp_path / "lora").mkdir()
        save_file(weights, tmp_path / "lora" / "adapter_model.safetensors")
        LoraConfig(r=2, lora_alpha=8, alpha_pattern={"self_attn.k": 1}).save_pretrained(tmp_path / "lora")
        check_all_formats(pipeline_dir, tmp_path / "lora", run(transformer), tmp_path)

    def test_rslora(self, pipeline_dir: Path, tmp_path: Path) -> None:
        transformer = load_transformer(pipeline_dir)
        add_lora(transformer, ["to_q", "ffn.net.2"], r=3, lora_alpha=2, use_rslora=True, rank_pattern={"ffn.net.2": 5})
        file = save_lora(transformer, tmp_path / "prfl")
        check_all_formats(pipeline_dir, file, run(transformer), tmp_path)

    def test_dora(self, pipeline_dir: Path, tmp_path: Path) -> None:
        transformer = load_transformer(pipeline_dir)
        add_lora(transformer, ["to_q"], use_dora=True)
        file = save_lora(transformer, tmp_path / "prfl")
        for lora_format in ("comfyui", "kohya", "upstream"):
            with pytest.raises(ValueError, match=f"is a DoRA of peft, which the format of {lora_format} cannot hold"):
                save_adapters([read_adapter(file)], tmp_path / lora_format, lora_format)  # type: ignore[arg-type]
        save_adapters([read_adapter(file)], tmp_path / "back", "diffusers")
        assert_equal_weights(load_file(tmp_path / "back" / LORA_FILE), load_file(file))
        pipeline = WanPipeline.from_pretrained(pipeline_dir)
        pipeline.load_lora_weights(tmp_path / "back", weight_name=LORA_FILE)
        torch.testing.assert_close(run(pipeline.transformer), run(transformer), rtol=1e-4, atol=1e-4)


class TestPatchEmbedding:
    """ComfyUI's trainer has the factors of the convolution over patches as matrices."""

    def weights(self, folder: Path, in_features: int | None = None) -> dict[str, torch.Tensor]:
        weight = native_weights(load_transformer(folder))["patch_embedding.weight"]
        key = "diffusion_model.patch_embedding"
        return {
            f"{key}.lora_up.weight": noise(len(weight), 3, seed=1),
            f"{key}.lora_down.weight": noise(3, in_features or weight[0].numel(), seed=2),
            f"{key}.alpha": torch.tensor(1.0),
        }

    def test_into_every_format(self, pipeline_dir: Path, i2v_pipeline_dir: Path, tmp_path: Path) -> None:
        for folder in (pipeline_dir, i2v_pipeline_dir):
            weights = self.weights(folder)
            save_file(weights, tmp_path / "lora.safetensors")
            up, down, _ = weights.values()
            transformer = load_transformer(folder)
            parameter = transformer.patch_embedding.weight
            # ComfyUI's rule: the product of the matrices, in the shape of the weight.
            parameter.data += (up @ down).reshape(parameter.shape) / 3
            target = tmp_path / folder.parent.name
            check_all_formats(folder, tmp_path / "lora.safetensors", run(transformer), target)
            written = load_file(target / "diffusers" / LORA_FILE)
            assert written["transformer.patch_embedding.lora_A.weight"].shape == (3, parameter.shape[1], 1, 2, 2)

    def test_no_patches(self, pipeline_dir: Path, tmp_path: Path) -> None:
        save_file(self.weights(pipeline_dir, in_features=37), tmp_path / "lora.safetensors")
        with pytest.raises(
            ValueError, match=r"'diffusion_model\.patch_embedding': 37 inputs cannot be channels of patches"
        ):
            read_adapter(tmp_path / "lora.safetensors")


def test_upstream_files_hold_no_alpha(pipeline_dir: Path, tmp_path: Path) -> None:
    example = Example(pipeline_dir, tmp_path, ["to_q", "ffn.net.2"], r=4, lora_alpha=2)
    files = save_adapters([read_adapter(example.file)], tmp_path / "out", "upstream")
    ends = {
        "pytorch_lora_transformers_weights.safetensors": (
            "base_model.model.blocks.0.self_attn.q.",
            "lora_A",
            "lora_B",
        ),
        "pytorch_lora_kohya_weights.safetensors": ("lora_blocks_0_self_attn_q.", "lora_down", "lora_up"),
        "pytorch_lora_diffusers_weights.safetensors": ("diffusion_model.blocks.0.self_attn.q.", "lora_A", "lora_B"),
    }
    assert files == list(ends)
    trained = load_file(example.file)
    for name, (key, down, up) in ends.items():
        written = load_file(tmp_path / "out" / name)
        assert len(written) == len(trained) == 2 * 9
        assert torch.equal(written[f"{key}{down}.weight"], trained["transformer.blocks.0.attn1.to_q.lora_A.weight"])
        assert torch.equal(written[f"{key}{up}.weight"], trained["transformer.blocks.0.attn1.to_q.lora_B.weight"] / 2)


class TestForUpstreamsFlags:
    @pytest.mark.parametrize("target", ["add_k_proj", "add_v_proj", "patch_embedding"])
    def test_layers_that_its_loader_dies_of(self, i2v_pipeline_dir: Path, tmp_path: Path, target: str) -> None:
        """
        `load_lora_for_model` takes `cross_attn_k_img` for `cross_attn.k` and then finds no `img` in it: IndexError; the
        factors of a convolution over patches have 5 dimensions, which `torch.mm` refuses.
        """
        example = Example(i2v_pipeline_dir, tmp_path, ["attn1.to_q", target])
        with pytest.raises(
            ValueError, match=rf"cannot apply a LoRA of [\w.]*{target}.* `hy-prfl convert --transformer"
        ):
            save_adapters([read_adapter(example.file)], tmp_path / "out", "upstream")
        assert not (tmp_path / "out").exists()

    def test_which_file_goes_where(self, pipeline_dir: Path, tmp_path: Path) -> None:
        example = Example(pipeline_dir, tmp_path, ["attn1.to_q", "ffn.net.2", "proj_out"], r=4)
        use = upstream_use(read_adapter(example.file))
        assert "pytorch_lora_kohya_weights.safetensors is for `--lora_path`" in use
        assert "pytorch_lora_transformers_weights.safetensors is for `model.lora.resume_lora_path`" in use
        assert "`lora_rank: 4` and `target_modules: [ffn.2, head.head, self_attn.q]`" in use
        example = Example(pipeline_dir, tmp_path / "two", ["to_q"], r=4, rank_pattern={"blocks.0.attn1.to_q": 3})
        assert "not usable: it has layers of rank 3, 4, but upstream trains a single rank" in upstream_use(
            read_adapter(example.file)
        )


class TestPeftsWarning:
    """To a LoRA without the image projections diffusers adds zeros for them, of which peft warns unless they are named."""

    def load(self, folder: Path, lora: Path, pipeline_class: Any = WanImageToVideoPipeline) -> Any:
        pipeline = pipeline_class.from_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            pipeline.load_lora_weights(lora, weight_name=LORA_FILE)
        return run(pipeline.transformer)

    @pytest.mark.parametrize(
        "targets",
        [
            ["to_q", "to_k", "to_v", "to_out.0"],
            ["attn2.to_k", "ffn.net.0.proj"],
            ["attn1.to_k", "attn2.to_q"],
            ["to_q", "to_v"],
            ["to_k", "add_k_proj", "add_v_proj"],
            ["blocks.0.attn2.to_k", "blocks.1.attn1.to_q"],
            ["blocks.1.attn2.to_k"],
            ["blocks.2.attn2.to_k", "blocks.0.attn1.to_k"],
        ],
    )
    @pytest.mark.parametrize("converted", [False, True])
    def test_image_to_video(self, i2v_pipeline_dir: Path, tmp_path: Path, targets: list[str], converted: bool) -> None:
        example = Example(i2v_pipeline_dir, tmp_path, targets)
        folder = example.file.parent
        if converted:
            save_adapters([read_adapter(example.file)], tmp_path / "converted", "diffusers")
            folder = tmp_path / "converted"
        example.check(self.load(i2v_pipeline_dir, folder))

    @pytest.mark.parametrize("converted", [False, True])
    def test_text_to_video(self, pipeline_dir: Path, i2v_pipeline_dir: Path, tmp_path: Path, converted: bool) -> None:
        example = Example(pipeline_dir, tmp_path, ["to_q", "to_k"])
        folder = example.file.parent
        if converted:
            save_adapters([read_adapter(example.file)], tmp_path / "converted", "diffusers")
            folder = tmp_path / "converted"
        example.check(self.load(pipeline_dir, folder, WanPipeline))
        # The same file in an image-to-video model.
        self.load(i2v_pipeline_dir, folder)

    def test_targets_in_the_header(self) -> None:
        def targets(given: list[str] | str) -> Any:
            config = LoraConfig(r=2, target_modules=given).to_dict()
            return json.loads(lora_header(config, {})["lora_adapter_metadata"])["transformer.target_modules"]

        assert targets(["to_k", "to_q"]) == ["add_k_proj", "add_v_proj", "to_k", "to_q"]
        assert targets(["attn2.to_k"]) == ["attn2.add_k_proj", "attn2.add_v_proj", "attn2.to_k"]
        assert targets(["attn1.to_k"]) == ["attn1.to_k"]
        assert targets(".*to_k") == ".*to_k"
