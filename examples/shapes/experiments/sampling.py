"""Samples the small generator in large batches, which is several times faster than a video at a time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import WanPipeline

from examples.shapes.annotate import labels_of
from examples.shapes.clips import split_captions
from examples.shapes.judge import judge_videos
from examples.shapes.pretrain import MAX_SEQUENCE_LENGTH, PRETRAINED_DIR
from hy_prfl.data.schema import pack_tensor, rows_to_table, table_to_rows
from hy_prfl.inference.generation import decode_latents
from hy_prfl.inference.pipelines import load_pipeline


NUM_STEPS, BATCH_SIZE, SHAPE = 20, 96, (16, 5, 6, 6)


def load_generator(tuned: Path | None = None) -> WanPipeline:
    """The pretrained pipeline, or with `tuned`, the folder of a run, with its transformer or its LoRA."""
    transformer = None if tuned is None else tuned / "transformer"
    is_full = transformer is not None and transformer.is_dir()
    pipeline = load_pipeline(
        str(PRETRAINED_DIR),
        transformer_path=str(transformer) if is_full else None,
        lora_path=None if tuned is None or is_full else str(tuned),
        dtype=torch.float32,
    )
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


@torch.no_grad()
def own_videos(pipeline: WanPipeline, like: Dataset, seeds: Sequence[int], prefix: str) -> Dataset:
    """
    A latent dataset of a generator's own videos of training captions, with the judge's labels.

    The latents are those that the generator made, not those of a video that was decoded and encoded again.

    Args:
        like (`Dataset`):
            A latent dataset of the same models, whose other columns are taken over.
        seeds (`Sequence[int]`):
            Seed of the noise of each video.
        prefix (`str`):
            Begins the ids of the rows.
    """
    captions = [str(caption) for caption in split_captions("train")]
    (template,) = table_to_rows(like.with_format("arrow")[0])
    rows = []
    for start in range(0, len(seeds), BATCH_SIZE):
        numbers = range(start, min(len(seeds), start + BATCH_SIZE))
        texts = [captions[number % len(captions)] for number in numbers]
        found = walk_chains(pipeline, texts, [seeds[number] for number in numbers])
        parts = (found[name] for name in ("kind", "latents", "text"))
        for number, caption, kind, chain, embeds in zip(numbers, texts, *parts, strict=True):
            real_tokens = embeds[np.abs(embeds).sum(axis=-1) > 0]
            packed = pack_tensor("latents", chain[-1], "float16", source=caption)
            packed |= pack_tensor("prompt_embeds", real_tokens, "float16", source=caption)
            row_id = f"{prefix}-{number:04d}"
            rows.append({**template, "id": row_id, "prompt": caption, "source": row_id, **labels_of(kind), **packed})
    return Dataset(rows_to_table(rows)).cast(like.features)
