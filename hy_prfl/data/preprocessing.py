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
    Settings for the conversion of a clip to a row.

    Args:
        fps (`float`): Frame rate that clips are resampled to.
        num_frames (`int`): Most frames of a row, `4k + 1`.
        min_num_frames (`int`): Fewest frames of a clip, at `fps`. Clips are cut to `4k + 1` frames.
        buckets (`tuple[tuple[int, int], ...]`): Sizes `(height, width)`. A clip gets the one with the nearest aspect
            ratio. If there are none, the size follows from `resolution` and `max_aspect_ratio`, see
            `short_side_bucket`.
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
                "`buckets` must have exactly one size for the prompts of a text-to-video pipeline "
                f"(`prompts_only`), got {len(self.buckets)}."
            )

    def choose_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the row for a clip or image of this size."""
        if self.buckets:
            return nearest_bucket(height, width, self.buckets)
        return short_side_bucket(height, width, self.resolution, self.max_aspect_ratio)


@dataclass(frozen=True)
class ClipContent:
    """
    Content of a row's files, before it is encoded.

    Args:
        frames (`np.ndarray`, *optional*):
            `(num_frames, height, width, 3)`, uint8, in the row's size. For a prompt-only row its images, or None if it
            has none.
        num_frames, height, width (`int`):
            Size of the row.
        remarks (`Sequence[str]`):
            Texts about the clip for the report.
    """

    frames: np.ndarray | None
    num_frames: int
    height: int
    width: int
    remarks: Sequence[str] = ()


class ClipEncoder:
    """
    Converts manifest rows to dataset rows. Implements `store.RowEncoder`.

    Args:
        encoder (`LatentEncoder`): Encoders of the pipeline.
        settings (`ClipSettings`): Sizes, lengths, types.
        hashes (`FileHashes`, *optional*): Hashes of clips that are known already.
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
        """Hash of everything that the encoded columns of a row depend on: files, texts, settings, encoders."""
        if not row.prompt:
            raise VideoError("no caption")
        files = [self.hashes[path] for path in self._sources(row)]
        settings = dataclasses.asdict(self.settings)
        return hash_text(json.dumps([files, row.prompt, row.long_prompt, settings, self.encoder.identity]))

    def read_row(self, row: ManifestRow) -> ClipContent:
        """Frames of a row. Uses no model, so it may run in another thread. Raises a `VideoError` for a bad clip."""
        if self.settings.prompts_only:
            return self._read_prompt(row)
        settings = self.settings
        (path,) = self._sources(row)
        video = decode_video(path, settings.fps, settings.num_frames, settings.min_num_frames, settings.decoding_rules)
        height, width = settings.choose_size(*video.frames.shape[1:3])
        frames = resize_and_crop(video.frames, height, width)
        return ClipContent(frames, len(frames), height, width, video.remarks)

    def encode_row(self, row: ManifestRow) -> dict[str, Any]:
        """Packed columns of one row; remarks are logged. Raises a `VideoError` if the clip is bad."""
        (result,) = self.encode_rows([row], [self.read_row(row)])
        if isinstance(result, VideoError):
            raise result
        for remark in result.pop("remarks"):
            logger.warning(f"clip {row.id!r}: {remark}.")
        return result

    def encode_rows(
        self, rows: Sequence[ManifestRow], contents: Sequence[ClipContent]
    ) -> list[dict[str, Any] | VideoError]:
        """
        For each row, its packed columns with `remarks`, or the error of its clip.

        Clips of the same size and length are encoded in one batch.

        Args:
            contents (`Sequence[ClipContent]`):
                Result of `read_row` for each row.
        """
        arrays = [self._encode_texts(row) for row in rows]
        # Clips wait as uint8, which takes a quarter of the memory of float32.
        videos = [None if content.frames is None else to_float(content.frames) for content in contents]
        for frames, content, encoded in zip(videos, contents, arrays, strict=True):
            if frames is not None and self.encoder.is_image_to_video:
                image_embeds, condition = self.encoder.encode_condition(frames, num_frames=content.num_frames)
                encoded["image_embeds"] = None if image_embeds is None else image_embeds.numpy()
                encoded["condition"] = condition.numpy()
        if not self.settings.prompts_only:
            frames_of_all = [frames for frames in videos if frames is not None]
            for encoded, latents in zip(arrays, self._encode_latents(frames_of_all), strict=True):
                encoded["latents"] = latents
        results: list[dict[str, Any] | VideoError] = []
        for row, content, encoded in zip(rows, contents, arrays, strict=True):
            try:
                results.append(self._pack(row, content, encoded))
            except VideoError as error:
                results.append(error)
        return results

    def _encode_texts(self, row: ManifestRow) -> dict[str, np.ndarray | None]:
        arrays: dict[str, np.ndarray | None] = {
            "prompt_embeds": self.encoder.encode_prompt(row.prompt).numpy(),
            "null_prompt_embeds": self.null_prompt_embeds,
        }
        if row.long_prompt is not None:
            arrays["long_prompt_embeds"] = self.encoder.encode_prompt(row.long_prompt).numpy()
        return arrays

    def _encode_latents(self, videos: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Latents of each video. Videos of one shape are encoded together."""
        latents: dict[int, np.ndarray] = {}
        batches: dict[torch.Size, list[int]] = {}
        for index, frames in enumerate(videos):
            batches.setdefault(frames.shape, []).append(index)
        for batch in batches.values():
            encoded = self.encoder.encode_videos(torch.stack([videos[index] for index in batch]))
            latents |= {index: values.numpy() for index, values in zip(batch, encoded, strict=True)}
        return [latents[index] for index in range(len(videos))]

    def _pack(self, row: ManifestRow, content: ClipContent, arrays: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
        sources = self._sources(row)
        columns = pack_row(
            self.encoder,
            row,
            arrays,
            num_frames=content.num_frames,
            height=content.height,
            width=content.width,
            fps=self.settings.fps,
            tensor_dtype=self.settings.tensor_dtype,
            source_hash=self.hashes[sources[0]] if sources else None,
        )
        return columns | {"remarks": list(content.remarks)}

    def _read_prompt(self, row: ManifestRow) -> ClipContent:
        """Size and images of a row of a prompt-only dataset."""
        settings = self.settings
        if not self.encoder.is_image_to_video:
            ((height, width),) = settings.buckets
            return ClipContent(None, settings.num_frames, height, width)
        sources = self._sources(row)
        remarks: Sequence[str] = ()
        if row.image is not None:
            images = [read_image(path) for path in sources]
        else:
            # The video may be shorter than the one to generate. Its own last frame is used.
            num_frames = settings.num_frames if self.encoder.uses_last_frame else 1
            video = decode_video(sources[0], settings.fps, num_frames, rules=settings.decoding_rules)
            images, remarks = [video.frames[0]], video.remarks
            if self.encoder.uses_last_frame:
                images.append(video.frames[-1])
        height, width = settings.choose_size(*images[0].shape[:2])
        frames = np.concatenate([resize_and_crop(image[None], height, width) for image in images])
        return ClipContent(frames, settings.num_frames, height, width, remarks)

    def _sources(self, row: ManifestRow) -> list[Path]:
        """Files that the row is made from: the clip, or for a prompt the sources of its first and last frame."""
        needed: dict[str, Path | None] = {}
        if not self.settings.prompts_only:
            needed = {"no video": row.video}
        elif self.encoder.is_image_to_video and row.image is None:
            needed = {"neither a first image nor a video": row.video}
        elif self.encoder.is_image_to_video:
            needed = {"no image": row.image}
            if self.encoder.uses_last_frame:
                needed["a first image, but no last image"] = row.last_image
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
    Columns of one row, without id, source and labels.

    Args:
        source_hash (`str`, *optional*):
            Hash of the row's source file, if there is one.

    Raises:
        VideoError: If a tensor overflows `tensor_dtype` or holds a NaN or an infinity.
    """
    columns: dict[str, Any] = {}
    for name in TENSORS:
        try:
            columns |= pack_tensor(name, arrays.get(name), tensor_dtype, source=f"clip {row.id!r}")
        except ValueError as error:
            raise VideoError(str(error)) from error
    # In a prompt-only dataset this is the shape of the latents to generate.
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
