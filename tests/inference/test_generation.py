from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from hy_prfl.data.manifest import read_manifest
from hy_prfl.data.prompts import VideoPrompt
from hy_prfl.data.video import read_video
from hy_prfl.formats.pipeline_info import PipelineInfo
from hy_prfl.inference.generation import (
    decode_latents,
    generate_video,
    generate_videos,
    pending_videos,
    video_record,
    video_size,
)
from hy_prfl.inference.pipeline_loras import check_options_fit
from hy_prfl.inference.pipelines import load_pipeline
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.inference.video_files import VideoSettings, read_record


SETTINGS = VideoSettings(
    height=32, width=48, num_frames=5, num_inference_steps=3, max_sequence_length=16, guidance_scale=2.0, crf=0
)


@pytest.fixture(scope="module")
def pipeline(pipeline_dir: Path) -> WanPipeline:
    return load_pipeline(str(pipeline_dir), dtype=torch.float32)


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    """Two images that are wider than the videos."""
    paths = (tmp_path / "first.png", tmp_path / "last.png")
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, size=(40, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def test_decode_latents_is_the_pipelines_decoding(pipeline: WanPipeline) -> None:
    options = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    options |= {"prompt": "a red circle", "max_sequence_length": 16}
    latents = pipeline(generator=torch.Generator().manual_seed(1), output_type="latent", **options).frames
    expected = pipeline(generator=torch.Generator().manual_seed(1), output_type="np", **options).frames
    frames = decode_latents(pipeline.vae, latents)
    assert frames.dtype == np.uint8
    assert frames.shape == (1, 5, 32, 48, 3)
    assert np.abs(frames / 255 - expected).max() < 0.6 / 255


def test_latents_mean_and_std_count(pipeline: WanPipeline) -> None:
    vae = pipeline.vae
    torch.manual_seed(0)
    latents = torch.randn(2, 16, 2, 4, 6)
    mean, std = (torch.tensor(vae.config[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        decoded = vae.decode(latents * std + mean).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(decode_latents(vae, latents).astype(int) - expected).max() <= 1


class TestLoadPipeline:
    def test_types(self, pipeline_dir: Path, i2v_pipeline_dir: Path) -> None:
        text = load_pipeline(str(pipeline_dir))
        assert type(text) is WanPipeline
        image = load_pipeline(str(i2v_pipeline_dir))
        assert type(image) is WanImageToVideoPipeline
        assert text.transformer.dtype == text.text_encoder.dtype == torch.bfloat16
        assert image.vae.dtype == image.image_encoder.dtype == torch.float32

    def test_flow_shift(self, pipeline_dir: Path) -> None:
        pipeline = load_pipeline(str(pipeline_dir), flow_shift=7.0, dtype=torch.float32)
        assert pipeline.scheduler.config.flow_shift == 7.0
        pipeline.scheduler.set_timesteps(10)
        other = load_pipeline(str(pipeline_dir), dtype=torch.float32).scheduler
        other.set_timesteps(10)
        assert (pipeline.scheduler.sigmas[1:-1] > other.sigmas[1:-1]).all()

    def test_transformer_path(self, pipeline_dir: Path, pipeline: WanPipeline, tmp_path: Path) -> None:
        tuned = build_pipeline(num_layers=3, seed=5).transformer
        tuned.save_pretrained(tmp_path / "tuned")
        loaded = load_pipeline(str(pipeline_dir), transformer_path=str(tmp_path / "tuned"), dtype=torch.float32)
        for name, tensor in loaded.transformer.state_dict().items():
            assert torch.equal(tensor, tuned.state_dict()[name]), name
        prompt = VideoPrompt(id="a", caption="a red circle")
        assert not np.allclose(generate_video(loaded, prompt, SETTINGS), generate_video(pipeline, prompt, SETTINGS))

    def test_transformer_of_another_kind(self, pipeline_dir: Path, i2v_pipeline_dir: Path) -> None:
        with pytest.raises(ValueError, match="`in_channels` 36 against 16"):
            load_pipeline(str(pipeline_dir), transformer_path=str(i2v_pipeline_dir / "transformer"))

    def test_transformer_with_missing_weights(self, pipeline_dir: Path, pipeline: WanPipeline, tmp_path: Path) -> None:
        weights = pipeline.transformer.state_dict()
        del weights["proj_out.weight"]
        pipeline.transformer.save_pretrained(tmp_path / "part", state_dict=weights)
        save_file(weights, tmp_path / "part" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"missing_keys, such as proj_out\.weight"):
            load_pipeline(str(pipeline_dir), transformer_path=str(tmp_path / "part"))

    def test_cpu_offload_needs_an_accelerator(self, pipeline_dir: Path) -> None:
        with pytest.raises(ValueError, match="cpu_offload"):
            load_pipeline(str(pipeline_dir), cpu_offload="model")


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with random weights, saved as the trainer saves it."""
    transformer = build_pipeline(num_layers=3).transformer
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("lora")
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    return folder


class TestLora:
    def load(self, pipeline_dir: Path, path: Path, scale: float) -> np.ndarray:
        pipeline = load_pipeline(str(pipeline_dir), lora_path=str(path), lora_scale=scale, dtype=torch.float32)
        return generate_video(pipeline, VideoPrompt(id="a", caption="a red circle"), SETTINGS)

    def test_scale(self, pipeline_dir: Path, pipeline: WanPipeline, lora_dir: Path) -> None:
        base = generate_video(pipeline, VideoPrompt(id="a", caption="a red circle"), SETTINGS)
        full = self.load(pipeline_dir, lora_dir, 1.0)
        half = self.load(pipeline_dir, lora_dir, 0.5)
        np.testing.assert_allclose(self.load(pipeline_dir, lora_dir, 0.0), base, atol=1e-6)
        assert np.abs(full - base).max() > 1e-3
        assert np.abs(full - half).max() > 1e-3

    def test_file(self, pipeline_dir: Path, lora_dir: Path, tmp_path: Path) -> None:
        file = lora_dir / "pytorch_lora_weights.safetensors"
        other = tmp_path / "mine.safetensors"
        other.write_bytes(file.read_bytes())
        expected = self.load(pipeline_dir, lora_dir, 1.0)
        for path in (file, other, tmp_path):
            assert np.array_equal(self.load(pipeline_dir, path, 1.0), expected)

    def test_no_weights(self, pipeline_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="lora_path"):
            load_pipeline(str(pipeline_dir), lora_path=str(tmp_path))

    def test_foreign_weights(self, pipeline_dir: Path, tmp_path: Path) -> None:
        save_file({"unet.x.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="lora_path"):
            load_pipeline(str(pipeline_dir), lora_path=str(tmp_path / "a.safetensors"))


class TestStepCache:
    """Caches must skip work, and forget one video before the next."""

    def count_block_calls(self, pipeline: WanPipeline, settings: VideoSettings) -> tuple[int, np.ndarray]:
        calls = []
        handle = pipeline.transformer.blocks[1].ffn.register_forward_hook(lambda *_: calls.append(1))
        frames = generate_video(pipeline, VideoPrompt(id="a", caption="a red circle"), settings)
        handle.remove()
        return len(calls), frames

    @pytest.mark.parametrize(
        "options",
        [
            {"step_cache": "first_block", "step_cache_threshold": 10.0},
            {"step_cache": "sea", "step_cache_threshold": 10.0},
        ],
    )
    def test_skips_blocks(self, pipeline_dir: Path, pipeline: WanPipeline, options: dict) -> None:
        settings = VideoSettings(**{**SETTINGS.__dict__, "num_inference_steps": 6})
        num_full, full = self.count_block_calls(pipeline, settings)
        cached = load_pipeline(str(pipeline_dir), dtype=torch.float32, **options)
        num_cached, frames = self.count_block_calls(cached, settings)
        assert num_full == 12
        assert num_cached < num_full
        assert not np.array_equal(frames, full)
        assert np.array_equal(self.count_block_calls(cached, settings)[1], frames)

    def test_zero_tolerance_skips_nothing(self, pipeline_dir: Path, pipeline: WanPipeline) -> None:
        prompt = VideoPrompt(id="a", caption="a red circle")
        cached = load_pipeline(
            str(pipeline_dir), dtype=torch.float32, step_cache="first_block", step_cache_threshold=1e-9
        )
        np.testing.assert_allclose(
            generate_video(cached, prompt, SETTINGS), generate_video(pipeline, prompt, SETTINGS), atol=1e-6
        )

    def test_taylorseer(self, pipeline_dir: Path, pipeline: WanPipeline) -> None:
        settings = VideoSettings(**{**SETTINGS.__dict__, "num_inference_steps": 8})
        prompt = VideoPrompt(id="a", caption="a red circle")
        cached = load_pipeline(str(pipeline_dir), dtype=torch.float32, step_cache="taylorseer", step_cache_interval=2)
        num_calls, frames = self.count_block_calls(cached, settings)
        assert num_calls < 16
        assert not np.array_equal(frames, generate_video(pipeline, prompt, settings))
        assert np.array_equal(frames, generate_video(cached, prompt, settings))

    def test_image_to_video(self, i2v_pipeline_dir: Path, images: tuple[Path, Path]) -> None:
        cached = load_pipeline(
            str(i2v_pipeline_dir), dtype=torch.float32, step_cache="first_block", step_cache_threshold=10.0
        )
        prompt = VideoPrompt(id="a", caption="a red circle", image=images[0])
        assert np.isfinite(generate_video(cached, prompt, SETTINGS)).all()
        with pytest.raises(ValueError, match="text-to-video"):
            load_pipeline(str(i2v_pipeline_dir), step_cache="sea")


class TestGenerateVideo:
    def test_is_the_stock_pipeline(self, pipeline: WanPipeline) -> None:
        settings = VideoSettings(**{**SETTINGS.__dict__, "negative_prompt": "blue"})
        expected = pipeline(
            prompt="a red circle",
            negative_prompt="blue",
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=3,
            guidance_scale=2.0,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(11),
        ).frames[0]
        frames = generate_video(pipeline, VideoPrompt(id="a", caption="a red circle", seed=11), settings)
        assert np.array_equal(frames, expected)
        other = generate_video(pipeline, VideoPrompt(id="a", caption="a red circle", seed=12), settings)
        assert not np.array_equal(frames, other)

    def test_first_image_is_cropped_like_training_clips(
        self, i2v_pipeline_dir: Path, images: tuple[Path, Path]
    ) -> None:
        pipeline = load_pipeline(str(i2v_pipeline_dir), dtype=torch.float32)
        frames = generate_video(pipeline, VideoPrompt(id="a", caption="a red circle", image=images[0]), SETTINGS)
        # 40 x 90 covers 32 x 48 at 0.8: the middle 60 columns are kept.
        cropped = Image.open(images[0]).crop((15, 0, 75, 40)).resize((48, 32), Image.Resampling.LANCZOS)
        expected = pipeline(
            image=cropped,
            prompt="a red circle",
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=3,
            guidance_scale=2.0,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]
        assert np.abs(frames - expected).max() < 1e-5

    def test_last_image(self, i2v_pipeline_dir: Path, images: tuple[Path, Path]) -> None:
        pipeline = load_pipeline(str(i2v_pipeline_dir), dtype=torch.float32)
        config = {**pipeline.transformer.config, "pos_embed_seq_len": 10}
        torch.manual_seed(0)
        pipeline.transformer = WanTransformer3DModel.from_config(config)
        prompts = [VideoPrompt(id="a", caption="a circle", image=images[0], last_image=last) for last in images]
        videos = [generate_video(pipeline, prompt, SETTINGS) for prompt in prompts]
        assert videos[0].shape == (5, 32, 48, 3)
        assert not np.allclose(videos[0], videos[1])


class TestVideoSize:
    """Sizes by the formula of Wan's `image2video.py`, in floats, as it is there."""

    def by_wan(self, height: int, width: int, max_area: int, multiple: int) -> tuple[int, int]:
        ratio = height / width
        sides = (np.sqrt(max_area * ratio), np.sqrt(max_area / ratio))
        return tuple(int(round(side // (multiple // 2) // 2 * 2)) * (multiple // 2) for side in sides)  # type: ignore[return-value]

    @pytest.mark.parametrize("multiple", [16, 32])
    def test_is_wans(self, tmp_path: Path, multiple: int) -> None:
        rng = np.random.default_rng(0)
        settings = VideoSettings(image_fit="area")
        for height, width in rng.integers(100, 1500, size=(40, 2)).tolist():
            Image.new("L", (width, height)).save(tmp_path / "a.png")
            found = video_size(VideoPrompt(id="a", caption="a", image=tmp_path / "a.png"), settings, multiple)
            assert found == self.by_wan(height, width, 480 * 832, multiple)
            assert found[0] * found[1] <= 480 * 832

    @pytest.mark.parametrize("size", [(480, 832), (832, 480), (720, 1280), (1280, 720)])
    def test_an_image_of_that_size_keeps_it(self, tmp_path: Path, size: tuple[int, int]) -> None:
        Image.new("L", size[::-1]).save(tmp_path / "a.png")
        prompt = VideoPrompt(id="a", caption="a", image=tmp_path / "a.png")
        settings = VideoSettings(height=size[1], width=size[0], image_fit="area")
        assert video_size(prompt, settings) == size
        assert video_size(prompt, VideoSettings()) == (480, 832)

    def test_videos(self, i2v_pipeline_dir: Path, images: tuple[Path, Path], tmp_path: Path) -> None:
        pipeline = load_pipeline(str(i2v_pipeline_dir), dtype=torch.float32)
        settings = VideoSettings(**{**SETTINGS.__dict__, "height": 64, "image_fit": "area"})
        prompt = VideoPrompt(id="a", caption="a red circle", image=images[0])
        # An image of 40 x 90: the square roots of 64 * 48 * 40 / 90 and of 64 * 48 * 90 / 40 are 36.9 and 83.1.
        (path,) = generate_videos(pipeline, [prompt], tmp_path / "out", settings)
        assert read_video(path, fps=16, num_frames=5).shape == (5, 32, 80, 3)
        assert not pending_videos([prompt], tmp_path / "out", settings)
        with pytest.raises(ValueError, match=r"\(image_fit\)"):
            pending_videos([prompt], tmp_path / "out", VideoSettings(**{**settings.__dict__, "image_fit": "crop"}))

    def test_too_long_an_image(self, tmp_path: Path) -> None:
        Image.new("L", (4000, 2)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"prompt 'a': .*4000 x 2 pixels.*shorter than 16"):
            video_size(VideoPrompt(id="a", caption="a", image=tmp_path / "a.png"), VideoSettings(image_fit="area"))

    def test_records_of_older_videos_count(self) -> None:
        assert "image_fit" not in video_record(VideoPrompt(id="a", caption="a"), VideoSettings())


class TestGenerateVideos:
    PROMPTS = (
        VideoPrompt(id="a", caption="a red circle", seed=0),
        VideoPrompt(id="a", caption="a red circle", seed=1),
        VideoPrompt(id="b", caption="a blue square", seed=0),
    )

    def test_files_and_manifest(self, pipeline: WanPipeline, tmp_path: Path) -> None:
        paths = generate_videos(pipeline, self.PROMPTS, tmp_path, SETTINGS)
        assert [path.name for path in paths] == ["a_seed_0.mp4", "a_seed_1.mp4", "b_seed_0.mp4"]
        rows = read_manifest(tmp_path / "manifest.json")
        assert [(row.id, row.prompt, row.video) for row in rows] == [
            (prompt.name, prompt.caption, path) for prompt, path in zip(self.PROMPTS, paths, strict=True)
        ]
        for prompt, path in zip(self.PROMPTS, paths, strict=True):
            decoded = read_video(path, fps=16, num_frames=5)
            expected = np.round(generate_video(pipeline, prompt, SETTINGS) * 255)
            # Of random pixels, the halved resolution of the colours loses a lot, but not the brightness.
            assert np.abs(decoded.mean(axis=-1) - expected.mean(axis=-1)).mean() < 12
            record = read_record(path)
            assert (record["caption"], record["seed"]) == (prompt.caption, prompt.seed)
            assert record["num_inference_steps"] == 3

    def test_a_video_does_not_depend_on_the_others(self, pipeline: WanPipeline, tmp_path: Path) -> None:
        generate_videos(pipeline, self.PROMPTS, tmp_path / "all", SETTINGS)
        generate_videos(pipeline, self.PROMPTS[2:], tmp_path / "one", SETTINGS)
        assert (tmp_path / "all" / "b_seed_0.mp4").read_bytes() == (tmp_path / "one" / "b_seed_0.mp4").read_bytes()

    def test_existing_files_are_skipped(self, pipeline: WanPipeline, tmp_path: Path) -> None:
        generate_videos(pipeline, self.PROMPTS, tmp_path, SETTINGS)
        times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
        (tmp_path / "a_seed_1.mp4").unlink()
        assert pending_videos(self.PROMPTS, tmp_path, SETTINGS) == [self.PROMPTS[1]]
        generate_videos(pipeline, self.PROMPTS, tmp_path, SETTINGS)
        after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
        assert after.pop("a_seed_1.mp4") != times.pop("a_seed_1.mp4")
        assert after == times

    def test_files_of_other_settings(self, pipeline: WanPipeline, tmp_path: Path) -> None:
        generate_videos(pipeline, self.PROMPTS[:1], tmp_path, SETTINGS, model_identity={"lora_path": "x"})
        other = VideoSettings(**{**SETTINGS.__dict__, "num_inference_steps": 2})
        with pytest.raises(ValueError, match=r"a_seed_0\.mp4.*\(lora_path, num_inference_steps\).*overwrite"):
            generate_videos(pipeline, self.PROMPTS[:1], tmp_path, other)
        edited = VideoPrompt(id="a", caption="a green circle", seed=0)
        with pytest.raises(ValueError, match=r"\(caption\)"):
            generate_videos(pipeline, [edited], tmp_path, SETTINGS, model_identity={"lora_path": "x"})
        generate_videos(pipeline, self.PROMPTS[:1], tmp_path, other, overwrite=True)
        assert read_record(tmp_path / "a_seed_0.mp4")["num_inference_steps"] == 2

    def test_foreign_file(self, pipeline: WanPipeline, tmp_path: Path) -> None:
        (tmp_path / "a_seed_0.mp4").write_bytes(b"not a video")
        with pytest.raises(ValueError, match=r"a_seed_0\.mp4"):
            generate_videos(pipeline, self.PROMPTS, tmp_path, SETTINGS)

    def test_image_counts(self, tmp_path: Path, images: tuple[Path, Path]) -> None:
        pipeline = build_pipeline(image_to_video=True)
        prompt = VideoPrompt(id="a", caption="a red circle", image=images[0])
        generate_videos(pipeline, [prompt], tmp_path / "out", SETTINGS)
        assert not pending_videos([prompt], tmp_path / "out", SETTINGS)
        images[0].write_bytes(images[1].read_bytes())
        with pytest.raises(ValueError, match=r"\(image\)"):
            pending_videos([prompt], tmp_path / "out", SETTINGS)


def test_vae_of_the_fixture_has_a_mean(pipeline: WanPipeline) -> None:
    """Otherwise the tests of the decoding would test nothing."""
    assert isinstance(pipeline.vae, AutoencoderKLWan)
    assert any(value != 0 for value in pipeline.vae.config.latents_mean)


class TestTwoExperts:
    """A pipeline of two transformers, each with what was tuned for it."""

    VIDEO = VideoPrompt(id="a", caption="a red circle")

    def video(self, folder: Path, **options: str) -> np.ndarray:
        return generate_video(load_pipeline(str(folder), dtype=torch.float32, **options), self.VIDEO, SETTINGS)  # type: ignore[arg-type]

    def test_loras_go_into_their_experts(self, expert_pipeline_dir: Path, lora_dir: Path, tmp_path: Path) -> None:
        weights = (lora_dir / "pytorch_lora_weights.safetensors").read_bytes()
        for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"):
            (tmp_path / name).write_bytes(weights)
        run = str(tmp_path)
        videos = [
            self.video(expert_pipeline_dir, **options)
            for options in ({}, {"lora_path": run}, {"lora_2_path": run}, {"lora_path": run, "lora_2_path": run})
        ]
        stock = WanPipeline.from_pretrained(expert_pipeline_dir)
        stock.set_progress_bar_config(disable=True)
        stock.load_lora_weights(run, weight_name="pytorch_lora_weights_2.safetensors", load_into_transformer_2=True)
        np.testing.assert_allclose(generate_video(stock, self.VIDEO, SETTINGS), videos[2], atol=1e-5)
        for index, video in enumerate(videos):
            assert all(np.abs(video - other).max() > 1e-4 for other in videos[:index])

    def test_a_lora_of_the_other_expert_is_refused(self, expert_pipeline_dir: Path, tmp_path: Path) -> None:
        file = tmp_path / "pytorch_lora_weights_2.safetensors"
        save_file({"a": torch.zeros(1)}, file, metadata={"hy_prfl.expert": "low_noise"})
        with pytest.raises(
            ValueError, match="`lora_path` must be of the high_noise expert, this LoRA is of the low_n"
        ):
            load_pipeline(str(expert_pipeline_dir), lora_path=str(file))
        with pytest.raises(FileNotFoundError, match=r"`lora_path` .*expected pytorch_lora_weights.safetensors or one"):
            load_pipeline(str(expert_pipeline_dir), lora_path=str(tmp_path))

    def test_tuned_experts(self, expert_pipeline_dir: Path, tmp_path: Path) -> None:
        tuned = build_pipeline(num_layers=3, seed=1, boundary_ratio=0.875)
        expected = load_pipeline(str(expert_pipeline_dir), dtype=torch.float32)
        expected.transformer_2 = tuned.transformer_2
        tuned.transformer_2.save_pretrained(tmp_path / "transformer_2")
        video = self.video(expert_pipeline_dir, transformer_2_path=str(tmp_path / "transformer_2"))
        np.testing.assert_allclose(video, generate_video(expected, self.VIDEO, SETTINGS), atol=1e-5)

    def test_options_of_a_second_transformer_need_one(self, pipeline_dir: Path) -> None:
        options = {"transformer_2_path": None, "lora_2_path": "somewhere"}
        with pytest.raises(ValueError, match=r"`lora_2_path` must be left out, .*has no `transformer_2`"):
            check_options_fit(PipelineInfo.read(str(pipeline_dir)), options)
