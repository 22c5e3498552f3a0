import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

from hy_prfl.formats.pipeline_info import PUBLISHED, PipelineInfo
from hy_prfl.inference.tiny_pipelines import build_pipeline


def test_kind_of_a_pipeline(pipeline_dir: Path, i2v_pipeline_dir: Path, tmp_path: Path) -> None:
    assert PipelineInfo.read(str(pipeline_dir)).pipeline_class is WanPipeline
    info = PipelineInfo.read(str(i2v_pipeline_dir))
    assert info.pipeline_class is WanImageToVideoPipeline
    assert info.is_image_to_video
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="is a `FluxPipeline`"):
        _ = PipelineInfo.read(str(tmp_path)).pipeline_class
    with pytest.raises(OSError, match="model_index.json"):
        PipelineInfo.read(str(tmp_path / "nowhere"))


def test_parts_are_read_as_their_classes_read_them(pipeline_dir: Path, expert_pipeline_dir: Path) -> None:
    info = PipelineInfo.read(str(pipeline_dir))
    real = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    assert info.transformer == {name: real.config[name] for name in info.transformer}
    assert {"image_dim", "num_layers", "pos_embed_seq_len"} <= set(info.transformer)
    vae = AutoencoderKLWan.from_pretrained(pipeline_dir, subfolder="vae").config
    assert info.vae_stride == (vae.scale_factor_temporal, vae.scale_factor_spatial, vae.scale_factor_spatial)
    assert not info.has_residual_vae
    assert info.size_multiple == 2 * vae.scale_factor_spatial == 16
    assert (info.has_two_experts, info.boundary_ratio) == (False, None)
    assert PipelineInfo.read(str(expert_pipeline_dir)).has_two_experts
    assert PipelineInfo.read(str(expert_pipeline_dir)).boundary_ratio == 0.875


def test_asking_draws_no_random_numbers(pipeline_dir: Path) -> None:
    """A resumed run asks after its random state was restored."""
    state = torch.get_rng_state()
    info = PipelineInfo.read(str(pipeline_dir))
    assert info.transformer["num_layers"] == 3
    assert info.vae_stride[0] == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_last_images(pipeline_dir: Path, i2v_pipeline_dir: Path, tmp_path: Path) -> None:
    """Text to video, Wan2.1 I2V, Wan2.1 FLF2V, Wan2.2 A14B and Wan2.2 TI2V 5B."""
    assert PipelineInfo.read(str(pipeline_dir)).last_image == "none"
    info = PipelineInfo.read(str(i2v_pipeline_dir))
    assert info.last_image == "none"
    for name, changes in {"required": {"pos_embed_seq_len": 10}, "optional": {"image_dim": None}}.items():
        folder = tmp_path / name
        (folder / "transformer").mkdir(parents=True)
        (folder / "model_index.json").write_text(json.dumps(dict(info.index)))
        (folder / "transformer" / "config.json").write_text(json.dumps(info.transformer | changes))
        assert PipelineInfo.read(str(folder)).last_image == name
    folder = tmp_path / "5b"
    build_pipeline(image_to_video=True, expand_timesteps=True).save_pretrained(folder)
    info = PipelineInfo.read(str(folder))
    assert info.takes_first_frame
    assert info.last_image == "none"
    assert (info.has_residual_vae, info.vae_stride) == (True, (4, 16, 16))
    # The class and the transformer tell the same.
    told = PipelineInfo.from_transformer("5b", info.transformer, class_name="WanImageToVideoPipeline")
    assert (told.is_image_to_video, told.takes_first_frame, told.last_image) == (True, True, "none")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_pipelines_are_known_without_the_hub(name: str) -> None:
    info = PipelineInfo.known(name)
    takes_images = "I2V-" in name.replace("TI2V", "") or "FLF2V" in name
    assert info.is_image_to_video == takes_images
    assert info.has_two_experts == ("A14B" in name) == (info.boundary_ratio is not None)
    assert info.takes_first_frame == ("5B" in name)
    assert info.vae_stride == ((4, 16, 16) if "5B" in name else (4, 8, 8))
    assert info.has_residual_vae == ("5B" in name)
    expected = "required" if "FLF2V" in name else "optional" if takes_images and "A14B" in name else "none"
    assert info.last_image == expected
    told = PipelineInfo.from_transformer("", PUBLISHED[name])
    assert (told.is_image_to_video, told.last_image, told.transformer) == (takes_images, expected, info.transformer)


def test_what_has_been_read_is_not_read_again(pipeline_dir: Path) -> None:
    info = PipelineInfo("nowhere", {}, "v2")
    assert PipelineInfo.of(info) is info
    assert PipelineInfo.of(info, "v2") is info
    with pytest.raises(ValueError, match="`revision` must be that of the pipeline that was read, v2, got 'main'"):
        PipelineInfo.of(info, "main")
    assert PipelineInfo.of(str(pipeline_dir)) == PipelineInfo.read(str(pipeline_dir))
