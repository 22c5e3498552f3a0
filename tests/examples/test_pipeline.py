"""The tiny pipelines are real ones: they save, load and sample, and know the words of the captions."""

from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from examples.shapes.clips import NUM_FRAMES, SIZE, split_captions
from examples.shapes.pretrain import MAX_SEQUENCE_LENGTH, VAE_CONFIG, encode_prompts
from hy_prfl.inference.tiny_pipelines import build_pipeline


def test_saved_pipelines_load(pipeline_dir: Path, i2v_pipeline_dir: Path) -> None:
    assert type(WanPipeline.from_pretrained(pipeline_dir)) is WanPipeline
    pipeline = WanImageToVideoPipeline.from_pretrained(i2v_pipeline_dir)
    assert pipeline.image_encoder is not None
    assert pipeline.transformer.config.in_channels == 36


def test_same_seed_same_weights() -> None:
    states = [build_pipeline(seed=seed).transformer.state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_captions_are_words_to_the_tokenizer() -> None:
    tokenizer = build_pipeline().tokenizer
    for caption in split_captions("train") + split_captions("held_out"):
        tokens = tokenizer(str(caption)).input_ids
        assert tokenizer.unk_token_id not in tokens
        assert len(tokens) == len(str(caption).split()) + 1
        assert len(tokens) <= MAX_SEQUENCE_LENGTH


def test_captions_have_different_embeddings() -> None:
    prompt_embeds = encode_prompts(build_pipeline(), [str(caption) for caption in split_captions("train")])
    distances = torch.pdist(prompt_embeds.flatten(1))
    assert distances.min() > 0.1 * prompt_embeds[0].norm()


def test_a_tiny_pipeline_samples(pipeline_dir: Path) -> None:
    pipeline = WanPipeline.from_pretrained(pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    (frames,) = pipeline(
        "a red circle moves up over a plain wall",
        height=SIZE,
        width=SIZE,
        num_frames=NUM_FRAMES,
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    ).frames
    assert frames.shape == (NUM_FRAMES, SIZE, SIZE, 3)
    assert np.isfinite(frames).all()


def test_the_vae_of_the_shapes_has_wans_strides() -> None:
    pipeline = build_pipeline(vae_config=VAE_CONFIG)
    assert (pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial) == (4, 8)
    with torch.no_grad():
        latents = pipeline.vae.encode(torch.zeros(1, 3, NUM_FRAMES, SIZE, SIZE)).latent_dist.mode()
    assert latents.shape == (1, 16, (NUM_FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    assert len(pipeline.vae.config.latents_mean) == len(pipeline.vae.config.latents_std) == 16
