"""Rewards of videos or latents at chosen noise levels, as tensors and as a table."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..compatibility import check_dataset_fits, check_encoder_fits
from ..configs.base import check_timesteps
from ..data.collators import LatentBatch, collate_latents
from ..data.dataset import read_columns
from ..data.encoding import LatentEncoder
from ..data.manifest import ManifestRow
from ..data.preprocessing import ClipEncoder, ClipSettings
from ..data.schema import LABELS, table_to_rows
from ..data.video import VideoError
from ..flow_matching import NUM_TRAIN_TIMESTEPS, row_noise
from ..models.conditioning import Conditioning
from ..models.reward_model import WanRewardModel, score_noised
from .score_table import write_scores


DEFAULT_TIMESTEPS = (201, 400, 600, 800, 1000)


@torch.no_grad()
def score_latents(
    reward_model: nn.Module,
    latents: torch.Tensor,
    conditioning: Conditioning,
    timesteps: Sequence[float] = DEFAULT_TIMESTEPS,
    *,
    row_ids: Sequence[str],
    num_noise_samples: int = 1,
    seed: int = 0,
) -> torch.Tensor:
    """
    Score clean latents at several noise levels.

    The noise is a function of row id, seed and number of the draw, so a score depends neither on the batch nor on the
    process; with the same seed it is the noise that the reward model is evaluated with in training.

    Args:
        reward_model (`nn.Module`):
            A [`WanRewardModel`], on the device of the tensors.
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Clean normalised latents.
        conditioning (`Conditioning`):
            Prompts, in the type that the model runs in, and images, for image-to-video reward models.
        timesteps (`Sequence[float]`):
            Noise levels, `1000 * sigma`, in (0, 1000].
        row_ids (`Sequence[str]`):
            Ids of the rows, from which their noise is drawn.
        num_noise_samples (`int`, defaults to 1):
            Number of draws of noise that the logits are averaged over.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_timesteps)`: logits, float32 on the CPU. Their sigmoid is the reward.

    Raises:
        ValueError: If a timestep is outside (0, 1000], or rows and ids differ in number.
    """
    check_timesteps("timesteps", timesteps)
    if len(row_ids) != len(latents) or num_noise_samples < 1:
        raise ValueError(
            f"expected an id for each of {len(latents)} rows, got {len(row_ids)}, and `num_noise_samples` at least 1, "
            f"got {num_noise_samples}."
        )
    total = torch.zeros(len(latents), len(timesteps))
    for draw in range(num_noise_samples):
        noise = torch.stack([row_noise(row_id, latents.shape[1:], seed=seed, draw=draw) for row_id in row_ids])
        noise = noise.to(latents)
        for column, timestep in enumerate(timesteps):
            logits = score_noised(
                reward_model,
                latents=latents,
                noise=noise,
                sigmas=torch.full((len(latents),), timestep / NUM_TRAIN_TIMESTEPS, device=latents.device),
                conditioning=conditioning,
            )
            total[:, column] += logits.float().cpu()
    return total / num_noise_samples


def score_videos(
    reward_model: WanRewardModel,
    encoder: LatentEncoder,
    videos: Sequence[str | Path],
    captions: Sequence[str],
    timesteps: Sequence[float] = DEFAULT_TIMESTEPS,
    *,
    clip_settings: ClipSettings | None = None,
    row_ids: Sequence[str] | None = None,
    num_noise_samples: int = 1,
    seed: int = 0,
) -> torch.Tensor:
    """
    Score video files.

    Args:
        encoder (`LatentEncoder`):
            Encoders of the pipeline that the reward model comes from.
        clip_settings (`ClipSettings`, *optional*):
            Frame rate, length and size, as for `preprocess`.
        row_ids (`Sequence[str]`, *optional*):
            Ids from which the noise is drawn; the stems of the files if left out.

    Returns:
        `torch.Tensor` of shape `(num_videos, num_timesteps)`: logits, float32 on the CPU.

    Raises:
        ValueError: If the encoder does not fit the reward model. A `VideoError` if a clip cannot be used.

    Example:
        ```python
        reward_model = load_reward_model("outputs/reward/best")
        encoder = LatentEncoder.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        logits = score_videos(reward_model, encoder, ["cat.mp4"], ["a cat plays the piano"])
        rewards = logits.sigmoid()
        ```
    """
    check_encoder_fits(reward_model, encoder)
    ids = [Path(video).stem for video in videos] if row_ids is None else row_ids
    clip_encoder = ClipEncoder(encoder, ClipSettings() if clip_settings is None else clip_settings)
    logits = []
    for row_id, video, caption in zip(ids, videos, captions, strict=True):
        row = ManifestRow(where=f"'{video}'", id=row_id, prompt=caption, video=Path(video))
        packed = {**clip_encoder.encode_row(row), "id": row_id}
        logits.append(score_rows(reward_model, [packed], timesteps, num_noise_samples=num_noise_samples, seed=seed))
    return torch.cat(logits) if logits else torch.zeros(0, len(timesteps))


def score_rows(
    reward_model: WanRewardModel,
    rows: Sequence[dict[str, Any]],
    timesteps: Sequence[float] = DEFAULT_TIMESTEPS,
    *,
    num_noise_samples: int = 1,
    seed: int = 0,
) -> torch.Tensor:
    """`score_latents` of rows of a latent dataset, all of one shape. A text-to-video model ignores their images."""
    clips: LatentBatch = collate_latents(rows).to(reward_model.device, reward_model.dtype)
    assert clips.latents is not None
    return score_latents(
        reward_model,
        clips.latents,
        Conditioning.of(clips).taken_by(reward_model.config),
        timesteps,
        row_ids=clips.ids,
        num_noise_samples=num_noise_samples,
        seed=seed,
    )


def score_dataset(
    reward_model: WanRewardModel,
    dataset: Dataset,
    output: str | Path,
    timesteps: Sequence[float] = DEFAULT_TIMESTEPS,
    *,
    num_noise_samples: int = 1,
    seed: int = 0,
    batch_size: int = 1,
    request: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """
    Score every row of a latent dataset into a table; see [`write_scores`] for what is written and how it resumes.

    Args:
        batch_size (`int`, defaults to 1):
            Rows of one shape that are scored at once.
        request (`Mapping`):
            Everything that the scores depend on, for [`write_scores`].

    Raises:
        ValueError: If the dataset does not fit the reward model, see [`check_dataset_fits`].
    """
    check_dataset_fits(reward_model, dataset)
    clips = read_columns(dataset, ["id", "prompt", "source", *LABELS, "latents_shape"])
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, clip in enumerate(clips):
        by_shape[tuple(clip.pop("latents_shape"))].append(position)
    batches = [
        positions[start : start + batch_size]
        for positions in by_shape.values()
        for start in range(0, len(positions), batch_size)
    ]

    def score_batch(positions: list[int]) -> list[list[float]]:
        rows = [table_to_rows(dataset[position])[0] for position in positions]
        return score_rows(reward_model, rows, timesteps, num_noise_samples=num_noise_samples, seed=seed).tolist()

    return write_scores(clips, batches, score_batch, output, timesteps, task=reward_model.config.task, request=request)


def score_manifest(
    reward_model: WanRewardModel,
    encoder: LatentEncoder,
    rows: Sequence[ManifestRow],
    output: str | Path,
    timesteps: Sequence[float] = DEFAULT_TIMESTEPS,
    *,
    clip_settings: ClipSettings | None = None,
    num_noise_samples: int = 1,
    seed: int = 0,
    request: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """
    Score the videos of a manifest into a table; see [`write_scores`] for what is written and how it resumes.

    Clips are encoded as by `preprocess`, so the scores equal those of the dataset that it would write. A clip that cannot
    be used is in the table with the reason instead of a score.

    Args:
        request (`Mapping`):
            Everything that the scores depend on, for [`write_scores`].

    Raises:
        ValueError: If the encoder does not fit the reward model.
    """
    check_encoder_fits(reward_model, encoder)
    clip_encoder = ClipEncoder(encoder, ClipSettings() if clip_settings is None else clip_settings)

    def score_batch(positions: list[int]) -> list[list[float]]:
        packed = []
        for row in (rows[position] for position in positions):
            if not row.prompt:
                raise VideoError("no caption")
            packed.append({**clip_encoder.encode_row(row), "id": row.id})
        return score_rows(reward_model, packed, timesteps, num_noise_samples=num_noise_samples, seed=seed).tolist()

    clips = [
        {"id": row.id, "prompt": row.prompt, "source": str(row.video)}
        | {name: row.labels.get(name) for name in LABELS}
        for row in rows
    ]
    # One by one: sizes are unknown before the clips are read, and most of the time goes into encoding.
    batches = [[position] for position in range(len(rows))]
    return write_scores(clips, batches, score_batch, output, timesteps, task=reward_model.config.task, request=request)
