"""Turns the clips of a manifest into rows of a latent dataset."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .clock import ClockJumps
from .encoding import LatentEncoder
from .hashes import FileHashes, hash_text
from .manifest import ManifestRow
from .pixels import HDR
from .schema import TENSORS, pack_tensor
from .video import (
    DecodingRules,
    VideoError,
    decode_video,
    nearest_bucket,
    read_image,
    resize_and_crop,
    short_side_bucket,
    to_float,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """
    How a clip becomes a row.

    Args:
        fps (`float`): Frame rate that clips are resampled to.
        num_frames (`int`): Frames of a row, `4k + 1`.
        min_num_frames (`int`): Fewest frames of a clip, at `fps`; longer ones are cut to `4k + 1`.
        buckets (`tuple[tuple[int, int], ...]`): Sizes `(height, width)`; a clip gets the one with the nearest aspect
        ratio. If there are none, `resolution` and `max_aspect_ratio` decide, see `short_side_bucket`.
        tensor_dtype (`str`): Storage type, `"float16"` or `"float32"`.
        prompts_only (`bool`): Store prompts, and first frames for image-to-video, but no latents.
        hdr, max_frame_duration, clock_jumps: See `DecodingRules`.
    """

    fps: float = 16.0
    num_frames: int = 81
    min_num_frames: int = 81
    buckets: tuple[tuple[int, int], ...] = ()
    resolution: int = 480
    max_aspect_ratio: float = 1.78
    tensor_dtype: str = "float16"
    prompts_only: bool = False
    hdr: HDR = "refuse"
    max_frame_duration: float = 10.0
    clock_jumps: ClockJumps = "refuse"

    @property
    def decoding_rules(self) -> DecodingRules:
        return DecodingRules(hdr=self.hdr, max_frame_duration=self.max_frame_duration, clock_jumps=self.clock_jumps)

    def check_pipeline(self, is_image_to_video: bool) -> None:
        """Raise a `ValueError` if these settings do not fit the kind of pipeline."""
        if self.prompts_only and not is_image_to_video and len(self.buckets) != 1:
            raise ValueError(
                "`buckets` must name exactly one size for the prompts of a text-to-video pipeline "
                f"(`prompts_only`), got {len(self.buckets)}."
            )

    def choose_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the row for a clip or image of this size."""
        if self.buckets:
            return nearest_bucket(height, width, self.buckets)
        return short_side_bucket(height, width, self.resolution, self.max_aspect_ratio)


@dataclass(frozen=True)
class _Clip:
    """
    Frames `(num_frames, 3, height, width)` in [-1, 1] if they will be encoded, the encoded arrays of a row, and
    remarks for the report.
    """

    frames: torch.Tensor | None
    arrays: dict[str, np.ndarray | None]
    num_frames: int
    height: int
    width: int
    remarks: Sequence[str] = ()


class ClipEncoder:
    """
    Makes dataset rows from manifest rows: a `store.RowEncoder`.

    Args:
        encoder (`LatentEncoder`): Encoders of the pipeline.
        settings (`ClipSettings`): Sizes, lengths, types.
        hashes (`FileHashes`, *optional*): Hashes of clips, if they are known already.
    """

    def __init__(self, encoder: LatentEncoder, settings: ClipSettings, hashes: FileHashes | None = None) -> None:
        settings.check_pipeline(encoder.is_image_to_video)
        for size in settings.buckets:
            if size[0] % encoder.size_multiple or size[1] % encoder.size_multiple:
                raise ValueError(
                    f"`buckets`: the sides of {size[0]}x{size[1]} must be multiples of {encoder.size_multiple}."
                )
        self.encoder = encoder
        self.settings = settings
        self.hashes = FileHashes() if hashes is None else hashes
        self.null_prompt_embeds = encoder.encode_prompt("").numpy()

    def row_key(self, row: ManifestRow) -> str:
        """Hash of everything that determines the encoded columns of a row: files, texts, settings, encoders."""
        if not row.prompt:
            raise VideoError("no caption")
        files = [self.hashes[path] for path in self._sources(row)]
        settings = dataclasses.asdict(self.settings)
        return hash_text(json.dumps([files, row.prompt, row.long_prompt, settings, self.encoder.identity]))

    def encode_row(self, row: ManifestRow) -> dict[str, Any]:
        """Packed columns of one row; remarks are logged. Raises a `VideoError` if the clip is bad."""
        (result,) = self.encode_rows([row])
        if isinstance(result, VideoError):
            raise result
        for remark in result.pop("remarks"):
            logger.warning(f"clip {row.id!r}: {remark}.")
        return result

    def encode_rows(self, rows: Sequence[ManifestRow]) -> list[dict[str, Any] | VideoError]:
        """
        Packed columns of each row with its `remarks`, or the error of its clip.

        Clips of the same size and length share a batch.
        """
        results: dict[int, dict[str, Any] | VideoError] = {}
        clips: dict[int, _Clip] = {}
        for index, row in enumerate(rows):
            try:
                clips[index] = self._read_clip(row)
            except VideoError as error:
                results[index] = error
        self._encode_latents(list(clips.values()))
        for index, clip in clips.items():
            try:
                results[index] = self._pack(rows[index], clip)
            except VideoError as error:
                results[index] = error
        return [results[index] for index in range(len(rows))]

    def _read_clip(self, row: ManifestRow) -> _Clip:
        """Frames of a row, and its encoded arrays except the latents."""
        arrays: dict[str, np.ndarray | None] = {
            "prompt_embeds": self.encoder.encode_prompt(row.prompt).numpy(),
            "null_prompt_embeds": self.null_prompt_embeds,
        }
        if row.long_prompt is not None:
            arrays["long_prompt_embeds"] = self.encoder.encode_prompt(row.long_prompt).numpy()
        if self.settings.prompts_only:
            return self._read_prompt(row, arrays)
        settings = self.settings
        (path,) = self._sources(row)
        video = decode_video(path, settings.fps, settings.num_frames, settings.min_num_frames, settings.decoding_rules)
        height, width = settings.choose_size(*video.frames.shape[1:3])
        frames = to_float(resize_and_crop(video.frames, height, width))
        if self.encoder.is_image_to_video:
            self._encode_condition(frames, len(frames), arrays)
        return _Clip(frames, arrays, len(frames), height, width, video.remarks)

    def _encode_latents(self, clips: Sequence[_Clip]) -> None:
        """Add the latents of the clips that have frames to their arrays."""
        batches: dict[torch.Size, list[tuple[_Clip, torch.Tensor]]] = {}
        for clip in clips:
            if clip.frames is not None:
                batches.setdefault(clip.frames.shape, []).append((clip, clip.frames))
        for batch in batches.values():
            latents = self.encoder.encode_videos(torch.stack([frames for _, frames in batch]))
            for (clip, _), values in zip(batch, latents, strict=True):
                clip.arrays["latents"] = values.numpy()

    def _pack(self, row: ManifestRow, clip: _Clip) -> dict[str, Any]:
        sources = self._sources(row)
        columns = pack_row(
            self.encoder,
            row,
            clip.arrays,
            num_frames=clip.num_frames,
            height=clip.height,
            width=clip.width,
            fps=self.settings.fps,
            tensor_dtype=self.settings.tensor_dtype,
            source_hash=self.hashes[sources[0]] if sources else None,
        )
        return columns | {"remarks": list(clip.remarks)}

    def _read_prompt(self, row: ManifestRow, arrays: dict[str, np.ndarray | None]) -> _Clip:
        """A row of a prompt-only dataset, its condition added to the arrays."""
        settings = self.settings
        if not self.encoder.is_image_to_video:
            ((height, width),) = settings.buckets
            return _Clip(None, arrays, settings.num_frames, height, width)
        sources = self._sources(row)
        remarks: Sequence[str] = ()
        if row.image is not None:
            images = [read_image(path) for path in sources]
        else:
            # The video may be shorter than the one to generate; its last frame is used all the same.
            num_frames = settings.num_frames if self.encoder.uses_last_frame else 1
            video = decode_video(sources[0], settings.fps, num_frames, rules=settings.decoding_rules)
            images, remarks = [video.frames[0]], video.remarks
            if self.encoder.uses_last_frame:
                images.append(video.frames[-1])
        height, width = settings.choose_size(*images[0].shape[:2])
        frames = to_float(np.concatenate([resize_and_crop(image[None], height, width) for image in images]))
        self._encode_condition(frames, settings.num_frames, arrays)
        return _Clip(None, arrays, settings.num_frames, height, width, remarks)

    def _encode_condition(self, frames: torch.Tensor, num_frames: int, arrays: dict[str, np.ndarray | None]) -> None:
        image_embeds, condition = self.encoder.encode_condition(frames, num_frames=num_frames)
        arrays["image_embeds"] = None if image_embeds is None else image_embeds.numpy()
        arrays["condition"] = condition.numpy()

    def _sources(self, row: ManifestRow) -> list[Path]:
        """Files whose content is in the row: the clip, or the sources of a prompt's first and last frame."""
        needed: dict[str, Path | None] = {}
        if not self.settings.prompts_only:
            needed = {"no video": row.video}
        elif self.encoder.is_image_to_video and row.image is None:
            needed = {"neither a first image nor a video": row.video}
        elif self.encoder.is_image_to_video:
            needed = {"no image": row.image}
            if self.encoder.uses_last_frame:
                needed["no last image beside the first one"] = row.last_image
        for missing, path in needed.items():
            if path is None:
                raise VideoError(missing)
            if not path.is_file():
                raise VideoError(row.missing.get(path, f"there is no file '{path}'"))
        return [path for path in needed.values() if path is not None]


def pack_row(
    encoder: LatentEncoder,
    row: ManifestRow,
    arrays: Mapping[str, np.ndarray | None],
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    tensor_dtype: str,
    source_hash: str | None,
) -> dict[str, Any]:
    """
    Columns of one row, without id, source and labels. `source_hash` is the hash of its source file, if there is one.

    Raises:
        VideoError: If a tensor does not fit `tensor_dtype` or holds a NaN or an infinity.
    """
    columns: dict[str, Any] = {}
    for name in TENSORS:
        try:
            columns |= pack_tensor(name, arrays.get(name), tensor_dtype, source=f"clip {row.id!r}")
        except ValueError as error:
            raise VideoError(str(error)) from error
    # For a prompt this is the shape of the sample to generate.
    columns["latents_shape"] = encoder.latents_shape(num_frames, height, width)
    return columns | {
        "prompt": row.prompt,
        "long_prompt": row.long_prompt,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "fps": fps,
        "source_hash": source_hash,
        "max_sequence_length": encoder.max_sequence_length,
        "vae_fingerprint": encoder.vae_fingerprint,
        "text_encoder_fingerprint": encoder.text_encoder_fingerprint,
    }
