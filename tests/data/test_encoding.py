"""What is stored is what the pipelines feed their transformer: compared with real pipeline calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVideoToVideoPipeline
from PIL import Image

from hy_prfl.data.encoding import (
    LatentEncoder,
    strip_padding,
    text_encoder_fingerprint,
    vae_fingerprint,
)
from hy_prfl.data.video import read_video, to_float, to_uint8
from hy_prfl.formats.pipeline_info import PipelineInfo
from hy_prfl.inference.tiny_pipelines import build_pipeline


PROMPT = "a red circle moves to the right"


@pytest.fixture(scope="module")
def frames(write_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    path = write_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=9)
    return to_float(read_video(path, fps=16, num_frames=9))


def first_transformer_inputs(pipeline: Any, **arguments: Any) -> dict[str, torch.Tensor]:
    """Arguments of the first call that a real pipeline call makes to its transformer."""
    calls: list[dict[str, torch.Tensor]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline(num_inference_steps=1, guidance_scale=1.0, output_type="latent", **arguments)
    hook.remove()
    return calls[0]


def pad(prompt_embeds: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(prompt_embeds, (0, 0, 0, length - len(prompt_embeds)))


def test_latents_are_those_of_the_video_to_video_pipeline(pipeline_dir: Path, frames: torch.Tensor) -> None:
    pipeline = WanVideoToVideoPipeline.from_pretrained(pipeline_dir)
    # The pipeline hands out its clean latents only with noise added, so the same noise is added to ours.
    pipeline.scheduler.set_timesteps(4)
    timestep, sigma = pipeline.scheduler.timesteps[-1:], pipeline.scheduler.sigmas[-2]
    assert 0 < sigma < 0.6
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    noisy = pipeline.prepare_latents(
        frames.permute(1, 0, 2, 3).unsqueeze(0),
        height=32,
        width=48,
        dtype=torch.float32,
        device="cpu",
        generator=torch.Generator().manual_seed(0),
        timestep=timestep,
    )
    latents = LatentEncoder.from_pretrained(str(pipeline_dir)).encode_video(frames)
    assert latents.shape == (16, 3, 4, 6)
    assert latents.dtype == torch.float32
    torch.testing.assert_close((1 - sigma) * latents + sigma * noise[0], noisy[0], rtol=1e-5, atol=1e-6)


def test_latents_are_normalised_by_the_constants_of_the_vae(pipeline_dir: Path, frames: torch.Tensor) -> None:
    encoder = LatentEncoder.from_pretrained(str(pipeline_dir))
    vae = encoder.pipeline.vae
    with torch.no_grad():
        mode = vae.encode(frames.permute(1, 0, 2, 3)[None]).latent_dist.mode()[0]
    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    torch.testing.assert_close(encoder.encode_video(frames), (mode - mean) / std, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prompt", [PROMPT, "", "a &amp; b   c", "square " * 100])
def test_prompts_are_those_of_the_text_to_video_pipeline(pipeline_dir: Path, prompt: str) -> None:
    inputs = first_transformer_inputs(
        WanPipeline.from_pretrained(pipeline_dir),
        prompt=prompt,
        height=32,
        width=48,
        num_frames=5,
        max_sequence_length=64,
    )
    encoder = LatentEncoder.from_pretrained(str(pipeline_dir), max_sequence_length=64)
    prompt_embeds = encoder.encode_prompt(prompt)
    torch.testing.assert_close(pad(prompt_embeds, 64)[None], inputs["encoder_hidden_states"], rtol=0, atol=0)
    assert (prompt_embeds != 0).any(dim=1).all()


def test_only_real_tokens_are_kept(pipeline_dir: Path) -> None:
    encoder = LatentEncoder.from_pretrained(str(pipeline_dir))
    num_tokens = len(encoder.pipeline.tokenizer(PROMPT).input_ids)
    assert encoder.encode_prompt(PROMPT).shape == (num_tokens, 32)
    assert encoder.encode_prompt("").shape == (1, 32)


def test_first_frame_is_that_of_the_image_to_video_pipeline(i2v_pipeline_dir: Path, frames: torch.Tensor) -> None:
    inputs = first_transformer_inputs(
        WanImageToVideoPipeline.from_pretrained(i2v_pipeline_dir),
        prompt=PROMPT,
        image=Image.fromarray(to_uint8(frames)[0]),
        height=32,
        width=48,
        num_frames=9,
    )
    encoder = LatentEncoder.from_pretrained(str(i2v_pipeline_dir))
    assert encoder.is_image_to_video
    image_embeds, condition = encoder.encode_condition(frames)
    assert condition.shape == (20, 3, 4, 6)
    torch.testing.assert_close(condition, inputs["hidden_states"][0, 16:], rtol=0, atol=0)
    torch.testing.assert_close(image_embeds, inputs["encoder_hidden_states_image"][0], rtol=0, atol=0)


def test_first_frame_alone_is_enough(i2v_pipeline_dir: Path, frames: torch.Tensor) -> None:
    encoder = LatentEncoder.from_pretrained(str(i2v_pipeline_dir))
    from_clip, from_image = encoder.encode_condition(frames), encoder.encode_condition(frames[:1], num_frames=9)
    for clip_value, image_value in zip(from_clip, from_image, strict=True):
        torch.testing.assert_close(clip_value, image_value, rtol=0, atol=0)


def test_first_and_last_frame_are_those_of_the_pipeline(flf2v_pipeline_dir: Path, frames: torch.Tensor) -> None:
    first, *_, last = (Image.fromarray(image) for image in to_uint8(frames))
    inputs = first_transformer_inputs(
        WanImageToVideoPipeline.from_pretrained(flf2v_pipeline_dir),
        prompt=PROMPT,
        image=first,
        last_image=last,
        height=32,
        width=48,
        num_frames=9,
    )
    encoder = LatentEncoder.from_pretrained(str(flf2v_pipeline_dir))
    assert encoder.uses_last_frame
    image_embeds, condition = encoder.encode_condition(frames)
    torch.testing.assert_close(condition, inputs["hidden_states"][0, 16:], rtol=0, atol=0)
    # The pipeline hands over two rows for one clip.
    torch.testing.assert_close(image_embeds, inputs["encoder_hidden_states_image"], rtol=0, atol=0)
    images_alone = encoder.encode_condition(frames[[0, -1]], num_frames=9)
    for clip_value, image_value in zip((image_embeds, condition), images_alone, strict=True):
        torch.testing.assert_close(clip_value, image_value, rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs a first and a last image"):
        encoder.encode_condition(frames[:1], num_frames=9)


def test_image_to_video_without_an_image_encoder_has_no_image_embeds(frames: torch.Tensor) -> None:
    pipeline = build_pipeline(image_to_video=True)
    pipeline.image_encoder = None
    encoder = LatentEncoder(pipeline)
    image_embeds, condition = encoder.encode_condition(frames)
    assert image_embeds is None
    assert condition.shape == (20, 3, 4, 6)


def test_text_to_video_has_no_first_frame(pipeline_dir: Path, frames: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="image-to-video"):
        LatentEncoder.from_pretrained(str(pipeline_dir)).encode_condition(frames)


@pytest.mark.parametrize("shape", [(9, 3, 40, 48), (9, 3, 32, 40), (9, 1, 32, 48), (8, 3, 32, 48)])
def test_frames_that_do_not_fit_are_refused(pipeline_dir: Path, shape: tuple[int, ...]) -> None:
    encoder = LatentEncoder.from_pretrained(str(pipeline_dir))
    with pytest.raises(ValueError, match="multiples of 16|4k \\+ 1"):
        encoder.encode_video(torch.zeros(shape))


def test_transformer_is_not_loaded(pipeline_dir: Path) -> None:
    encoder = LatentEncoder.from_pretrained(str(pipeline_dir))
    assert encoder.pipeline.transformer is None
    assert LatentEncoder.from_pretrained(PipelineInfo.read(str(pipeline_dir))).identity == encoder.identity


def test_other_pipelines_are_refused(pipeline_dir: Path) -> None:
    with pytest.raises(ValueError, match="WanVideoToVideoPipeline"):
        LatentEncoder(WanVideoToVideoPipeline.from_pretrained(pipeline_dir))


def test_fingerprints_hold_across_precisions_and_kinds_of_pipeline(pipeline_dir: Path, i2v_pipeline_dir: Path) -> None:
    encoder = LatentEncoder.from_pretrained(str(pipeline_dir))
    pipeline = encoder.pipeline
    names = (encoder.vae_fingerprint, encoder.text_encoder_fingerprint)
    assert all(len(name) == 16 for name in names)
    other = LatentEncoder.from_pretrained(str(i2v_pipeline_dir))
    assert (other.vae_fingerprint, other.text_encoder_fingerprint) == names
    for dtype in (torch.bfloat16, torch.float16):
        assert vae_fingerprint(pipeline.vae.to(dtype)) == names[0]
        assert text_encoder_fingerprint(pipeline.text_encoder.to(dtype), pipeline.tokenizer) == names[1]


def test_fingerprints_tell_weights_and_constants_apart() -> None:
    first, second = build_pipeline(seed=0), build_pipeline(seed=1)
    assert vae_fingerprint(first.vae) != vae_fingerprint(second.vae)
    assert text_encoder_fingerprint(first.text_encoder, first.tokenizer) != text_encoder_fingerprint(
        second.text_encoder, second.tokenizer
    )
    before = vae_fingerprint(first.vae)
    first.vae.register_to_config(latents_mean=[0.0] * 16)
    assert vae_fingerprint(first.vae) != before


def test_strip_padding() -> None:
    prompt_embeds = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(strip_padding(prompt_embeds), prompt_embeds[:3])
    assert strip_padding(torch.zeros(4, 2)).shape == (1, 2)
