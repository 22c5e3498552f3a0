"""The video files that `generate` writes, and the settings in their metadata. Loads no torch."""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

from ..configs.base import check
from ..data.container import open_video
from ..data.pixels import VideoError
from ..runtime.atomic_writes import replacing


ImageFit = Literal["crop", "area"]

MANIFEST = "manifest.json"
# Half-precision arithmetic may leave [0, 1] by this much.
ROUNDING = 1e-2


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """
    How videos are sampled and written.

    Args:
        height, width (`int`): Size in pixels, multiples of 16, for Wan2.2 TI2V 5B of 32.
        image_fit (`str`): `"crop"`: images are resized and centre-cropped to this size. `"area"`: each video has the aspect
            ratio of its first image, and at most as many pixels as this size, see [`video_size`].
        num_frames (`int`): Frames, `4k + 1`.
        num_inference_steps (`int`): Denoising steps.
        guidance_scale (`float`): Classifier-free guidance; 1 turns it off.
        negative_prompt (`str`, *optional*): What the videos should not show.
        max_sequence_length (`int`): Text tokens that prompts are padded or cut to.
        fps (`int`): Frame rate of the files.
        crf (`int`): H.264 quality, 0 (lossless) to 51.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str | None = None
    max_sequence_length: int = 512
    fps: int = 16
    crf: int = 12
    image_fit: ImageFit = "crop"


def read_record(path: str | Path) -> dict[str, Any]:
    """The `video_record` in the metadata of a file; empty if there is none."""
    try:
        with open_video(path) as container:
            record = json.loads(container.metadata.get("comment", "{}"))
    except (VideoError, av.error.FFmpegError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def write_video(
    path: str | Path, frames: np.ndarray, fps: float, *, crf: int = 12, comment: str | None = None, tag: str = ""
) -> None:
    """
    Write an H.264 mp4 in yuv420p, which every player shows. The file is complete or not there.

    Colours are BT.709 in limited range at any size, and tagged as such. Players that ignore tags assume this only for
    videos of HD size.

    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`):
            RGB, uint8 or float in [0, 1]; height and width even.
        fps (`float`):
            Frames per second.
        crf (`int`, defaults to 12):
            Quality, 0 (lossless) to 51; 12 looks lossless.
        comment (`str`, *optional*):
            Text for the file's metadata.
        tag (`str`):
            Different in each process that may write the same file, see [`~hy_prfl.runtime.atomic_writes.replacing`].

    Raises:
        ValueError: If the frames have another shape, type or range, or odd sides, or hold a NaN or an infinity, or `fps`
            is not a finite number greater than 0.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[0] == 0 or frames.shape[3] != 3 or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"{path}: expected frames (num_frames, height, width, 3) of even size, got {frames.shape}.")
    check(math.isfinite(fps) and fps > 0, "fps", fps, "a finite number greater than 0")
    if frames.dtype != np.uint8:
        if not np.issubdtype(frames.dtype, np.floating):
            raise ValueError(f"{path}: expected frames of type uint8 or float, got {frames.dtype}.")
        if not np.isfinite(frames).all():
            raise ValueError(f"{path}: the frames hold a NaN or an infinity.")
        low, high = float(frames.min()), float(frames.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(f"{path}: expected float frames in [0, 1], got [{low:g}, {high:g}].")
        frames = np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the prefix FFmpeg would read the text before a colon as a protocol.
    with (
        replacing(path, tag=tag) as temporary,
        av.open(f"file:{temporary}", mode="w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        if comment is not None:
            container.metadata["comment"] = comment
        # mbtree reads uninitialised memory: with it the same frames would not always give the same file.
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        reformatter = VideoReformatter()
        for frame in frames:
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(frame, format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            picture.color_primaries, picture.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
