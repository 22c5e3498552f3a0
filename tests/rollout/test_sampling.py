from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from hy_prfl.data.encoding import LatentEncoder
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_scheduler
from hy_prfl.rollout.sampling import sample_latents


NUM_STEPS = 5


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_whole_chain_equals_the_stock_pipeline(pipeline_dir: Path, guidance_scale: float) -> None:
    pipeline = WanPipeline.from_pretrained(pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 16, 2, 4, 6)
    prompt_embeds, negative = pipeline.encode_prompt(["a red circle", "a wall"], max_sequence_length=16)
    expected = pipeline(
        prompt_embeds=prompt_embeds, negative_prompt_embeds=negative, latents=noise, height=32, width=48, num_frames=5,
        num_inference_steps=NUM_STEPS, guidance_scale=guidance_scale, output_type="latent",
    ).frames  # fmt: skip
    actual = sample_latents(
        pipeline.transformer,
        load_scheduler(str(pipeline_dir)),
        noise=noise,
        num_inference_steps=NUM_STEPS,
        conditioning=Conditioning(prompt_embeds),
        negative_prompt_embeds=negative,
        guidance_scale=guidance_scale,
    )
    torch.testing.assert_close(actual, expected)


def test_whole_chain_equals_the_stock_image_to_video_pipeline(i2v_pipeline_dir: Path) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(i2v_pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    seen: dict[str, torch.Tensor] = {}

    def remember(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.update(kwargs)

    hook = pipeline.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    noise = torch.randn(1, 16, 2, 4, 6)
    expected = pipeline(
        image=Image.new("RGB", (48, 32), (200, 30, 30)), prompt="a red circle", latents=noise, height=32, width=48,
        num_frames=5, num_inference_steps=NUM_STEPS, guidance_scale=1.0, output_type="latent", max_sequence_length=16,
    ).frames  # fmt: skip
    hook.remove()
    actual = sample_latents(
        pipeline.transformer,
        load_scheduler(str(i2v_pipeline_dir)),
        noise=noise,
        num_inference_steps=NUM_STEPS,
        conditioning=Conditioning(
            seen["encoder_hidden_states"], seen["encoder_hidden_states_image"], seen["hidden_states"][:, 16:]
        ),
    )
    torch.testing.assert_close(actual, expected)


def test_timesteps_that_all_tokens_share_are_given_once(tmp_path: Path) -> None:
    """Text-to-video of Wan2.2 TI2V 5B: the stock pipeline repeats the timestep for every token, which changes nothing."""
    folder = tmp_path / "5b"
    build_pipeline(num_layers=3, expand_timesteps=True).save_pretrained(folder)
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    shapes = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["timestep"].shape)), with_kwargs=True
    )
    noise = torch.randn(2, 48, 2, 4, 6)
    prompt_embeds, negative = pipeline.encode_prompt(["a red circle", "a wall"], max_sequence_length=16)
    expected = pipeline(
        prompt_embeds=prompt_embeds, negative_prompt_embeds=negative, latents=noise, height=64, width=96, num_frames=5,
        num_inference_steps=NUM_STEPS, guidance_scale=4.0, output_type="latent",
    ).frames  # fmt: skip
    assert set(shapes) == {(2, 2 * 2 * 3)}
    actual = sample_latents(
        pipeline.transformer, load_scheduler(str(folder)), noise=noise, num_inference_steps=NUM_STEPS,
        conditioning=Conditioning(prompt_embeds), negative_prompt_embeds=negative, guidance_scale=4.0,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert shapes[-1] == (2,)


def test_a_clean_first_frame_is_that_of_the_stock_pipeline(tmp_path: Path) -> None:
    """Image-to-video of Wan2.2 TI2V 5B: the image as first frame of the latents, its tokens at timestep 0."""
    folder = tmp_path / "5b"
    build_pipeline(num_layers=3, expand_timesteps=True, image_to_video=True).save_pretrained(folder)
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[dict[str, torch.Tensor]] = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    noise = torch.randn(1, 48, 3, 4, 6)
    image = Image.new("RGB", (96, 64), (200, 30, 30))
    expected = pipeline(
        image=image, prompt="a red circle", latents=noise, height=64, width=96, num_frames=9, guidance_scale=4.0,
        num_inference_steps=NUM_STEPS, output_type="latent", max_sequence_length=16,
    ).frames  # fmt: skip
    stock = list(calls)
    prompt_embeds, negative = (stock[index]["encoder_hidden_states"] for index in (0, 1))
    frames = torch.tensor([200, 30, 30]).view(1, 3, 1, 1).expand(9, 3, 64, 96) / 127.5 - 1
    image_embeds, condition = LatentEncoder.from_pretrained(str(folder)).encode_condition(frames)
    assert image_embeds is None
    assert condition.shape == (48, 1, 4, 6)
    actual = sample_latents(
        pipeline.transformer, load_scheduler(str(folder)), noise=noise, num_inference_steps=NUM_STEPS,
        conditioning=Conditioning(prompt_embeds, condition=condition[None]), negative_prompt_embeds=negative,
        guidance_scale=4.0,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(actual[:, :, 0], condition[None, :, 0])
    for own, other in zip(calls[len(stock) :], stock, strict=True):
        assert torch.equal(own["timestep"].float(), other["timestep"].float())
        assert own["timestep"][0].unique().numel() == 2
