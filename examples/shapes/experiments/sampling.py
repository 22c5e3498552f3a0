"""Samples the small generator in large batches, which is several times faster than a video at a time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline

from examples.shapes.judge import judge_videos
from examples.shapes.pretrain import MAX_SEQUENCE_LENGTH, PRETRAINED_DIR
from hy_prfl.inference.generation import decode_latents
from hy_prfl.inference.pipelines import load_pipeline


NUM_STEPS, BATCH_SIZE, SHAPE = 20, 96, (16, 5, 6, 6)


def load_generator(lora: Path | None = None) -> WanPipeline:
    """The pretrained pipeline, with the LoRA of a tuned one."""
    pipeline = load_pipeline(str(PRETRAINED_DIR), lora_path=None if lora is None else str(lora), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def walk_chains(pipeline: WanPipeline, captions: Sequence[str], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """
    Walk the chains of a batch to the end.

    Returns:
        `latents` `(batch_size, NUM_STEPS, 16, 5, 6, 6)`, those after each step, `text`, the embeddings of the captions,
        `kind` `(batch_size,)`, the judge's verdicts, and `frames` `(batch_size, 5, height, width, 3)`, every fourth frame.
    """
    scheduler, transformer = pipeline.scheduler, pipeline.transformer
    text, _ = pipeline.encode_prompt(
        list(captions), do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    scheduler.set_timesteps(NUM_STEPS)
    latents = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    chain = []
    for timestep in scheduler.timesteps:
        velocity = transformer(latents, timestep.expand(len(latents)), text).sample
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        chain.append(latents)
    videos = decode_latents(pipeline.vae, latents)
    kinds = [verdict.kind for verdict in judge_videos(videos, captions)]
    arrays = {"latents": torch.stack(chain, dim=1).numpy(), "text": text.numpy()}
    return {**arrays, "kind": np.array(kinds), "frames": videos[:, ::4]}
