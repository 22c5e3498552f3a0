"""Datasets of random latents, for runs where only the shapes matter: dry runs, comparisons, benchmarks."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from .schema import LABELS, latent_features, pack_tensor, rows_to_table


def synthetic_dataset(
    *,
    latents_shape: Sequence[int],
    text_dim: int,
    vae_fingerprint: str,
    text_tokens: int,
    max_sequence_length: int | None = None,
    num_rows: int = 2,
    condition_shape: Sequence[int] | None = None,
    image_embeds_shape: Sequence[int] | None = None,
    dtype: str = "float16",
    seed: int = 0,
) -> Dataset:
    """
    Latent dataset of standard normal noise, one good and one poor row for each prompt.

    The latents of good rows have a mean of 1, so that there is something to learn.

    Args:
        latents_shape (`Sequence[int]`):
            `(num_channels, num_frames, height, width)` of every row.
        text_dim (`int`):
            Width of the text encoder.
        vae_fingerprint (`str`):
            Fingerprint of the VAE to write into the rows.
        text_tokens (`int`):
            Tokens of each prompt.
        max_sequence_length (`int`, *optional*):
            Length that batches pad prompts to. `text_tokens` if left out.
        num_rows (`int`, defaults to 2):
            Number of rows; poor and good ones alternate.
        condition_shape (`Sequence[int]`, *optional*):
            `(num_channels, num_frames, height, width)` of the image condition. None for text-to-video.
        image_embeds_shape (`Sequence[int]`, *optional*):
            `(num_image_tokens, image_dim)` of the image embeddings.
        dtype (`str`, defaults to `"float16"`):
            Storage type of the tensors.
        seed (`int`, defaults to 0):
            Seed of the noise.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(num_rows):
        label = index % 2
        tensors: dict[str, np.ndarray] = {"latents": rng.normal(label, 1.0, latents_shape)}
        for name in ("prompt_embeds", "null_prompt_embeds"):
            tensors[name] = rng.normal(size=(text_tokens, text_dim))
        if condition_shape is not None:
            tensors["condition"] = rng.normal(size=condition_shape)
        if image_embeds_shape is not None:
            tensors["image_embeds"] = rng.normal(size=image_embeds_shape)
        row: dict[str, object] = {
            **dict.fromkeys(latent_features()),
            **dict.fromkeys(LABELS, label),
            "id": f"synthetic-{index}",
            "prompt": f"synthetic prompt {index // 2}",
            "fps": 16.0,
            "max_sequence_length": max_sequence_length or text_tokens,
            "vae_fingerprint": vae_fingerprint,
            "text_encoder_fingerprint": "",
        }
        for name, array in tensors.items():
            row |= pack_tensor(name, array, dtype, source=f"row {index}")
        rows.append(row)
    return Dataset(rows_to_table(rows, dtype))
