"""The tiny pipelines are real ones: they save, load and sample, and the pretraining trains what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from examples.shapes.clips import NUM_FRAMES, SIZE, split_captions
from examples.shapes.pipeline import build_pipeline
from examples.shapes.pretrain import MAX_SEQUENCE_LENGTH, VAE_CONFIG, PretrainConfig, encode_prompts, pretrain


@pytest.fixture(scope="module")
def pretrained_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(PretrainConfig(output_dir=str(folder), num_clips=8, vae_steps=10, generator_steps=2, num_layers=2))
    return folder


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


def test_pretrained_pipeline_samples(pretrained_dir: Path) -> None:
    pipeline = WanPipeline.from_pretrained(pretrained_dir)
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


def test_pretraining_trains_vae_and_transformer(pretrained_dir: Path) -> None:
    pipeline = WanPipeline.from_pretrained(pretrained_dir)
    options = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 384, "text_dim": 64}
    initial = build_pipeline(**options, vae_config=VAE_CONFIG)
    for name in ("vae", "transformer"):
        start = dict(getattr(initial, name).named_parameters())
        for key, parameter in getattr(pipeline, name).named_parameters():
            assert not torch.equal(parameter, start[key]), f"{name}.{key} has not moved"
    start = initial.text_encoder.state_dict()
    assert all(torch.equal(value, start[key]) for key, value in pipeline.text_encoder.state_dict().items())


def test_vae_has_wans_strides_and_its_own_statistics(pretrained_dir: Path) -> None:
    pipeline = WanPipeline.from_pretrained(pretrained_dir)
    assert (pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial) == (4, 8)
    latents = pipeline.vae.encode(torch.zeros(1, 3, NUM_FRAMES, SIZE, SIZE)).latent_dist.mode()
    assert latents.shape == (1, 16, (NUM_FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    assert len(pipeline.vae.config.latents_mean) == len(pipeline.vae.config.latents_std) == 16
    assert pipeline.vae.config.latents_std != build_pipeline().vae.config.latents_std
