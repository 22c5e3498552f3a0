"""Chains are the pipeline's own, and what they lead to is read off them step by step."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from examples.shapes.clips import split_captions
from examples.shapes.experiments.decisions import FORESEEN, NUM_STEPS, decode, follow_chains
from examples.shapes.pretrain import PRETRAINED_DIR
from hy_prfl.models.reward_model import WanRewardModel


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(PRETRAINED_DIR)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_decoding_is_the_pipelines(pipeline: WanPipeline) -> None:
    latents = torch.randn(2, pipeline.vae.config.z_dim, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    options = {"height": 48, "width": 48, "num_frames": 17, "num_inference_steps": 1, "guidance_scale": 1.0}
    kept: list[torch.Tensor] = []

    def keep(pipe: WanPipeline, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept.append(tensors["latents"])
        return {}

    frames = pipeline(
        ["a red circle moves up over a plain wall"] * 2, latents=latents, callback_on_step_end=keep, **options
    ).frames
    np.testing.assert_allclose(np.stack(decode(pipeline, kept[-1])), frames, atol=1e-4)


def test_a_video_is_foreseen_long_before_it_is_there(pipeline: WanPipeline) -> None:
    model = WanRewardModel.from_transformer(pipeline.transformer, num_layers=1).eval()
    captions = [str(caption) for caption in split_captions("train")][:48]
    points = follow_chains(pipeline, {"finetuned": model}, captions, seed=0)
    assert len(points) == NUM_STEPS
    assert [index for index, point in enumerate(points) if "foreseen/frozen" in point] == list(FORESEEN)
    assert points[0]["timestep"] > points[-1]["timestep"]
    for failure in ("frozen", "vanishing"):
        # From noise alone nothing is certain; after most of the steps the foreseen video is nearly the finished one.
        assert points[0][f"foreseen/{failure}"] < 0.9 < points[FORESEEN[-1]][f"foreseen/{failure}"]
        assert all(0 <= point[f"finetuned/{failure}"] <= 1 for point in points)
