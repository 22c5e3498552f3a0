"""From a video file to frames of one size and frame rate. No models."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError


# Containers such as WebM round presentation times to milliseconds: a frame due within this time counts as there.
TIME_TOLERANCE = 1e-3

TEMPORAL_STRIDE = 4


class VideoError(ValueError):
    """One clip cannot be used; the message is the reason, fit for a report. Other clips are not concerned."""


def floor_num_frames(num_frames: int) -> int:
    """Largest `4k + 1` that is not above `num_frames`: what the causal Wan VAE encodes without remainder."""
    return (num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1


def read_video(path: str | Path, fps: float, num_frames: int, min_num_frames: int | None = None) -> np.ndarray:
    """
    Decode the start of a video at a constant frame rate.

    Output frame `i` is the source frame that is on the screen `i / fps` seconds after the first one, by presentation
    time, so variable frame rates come out right. Rotation written in the file is applied.

    Args:
        path (`str` or `Path`):
            Anything that FFmpeg reads.
        fps (`float`):
            Frames per second of the output.
        num_frames (`int`):
            Frames wanted, `4k + 1`.
        min_num_frames (`int`, *optional*):
            Fewest frames to accept, `num_frames` if not given. A clip in between is cut to `4k + 1` frames.

    Returns:
        `np.ndarray` of shape `(num_frames, height, width, 3)` and type uint8.

    Raises:
        VideoError: If the file is missing, is no video, is damaged or truncated, holds no frame or is too short.
    """
    path = Path(path)
    min_num_frames = num_frames if min_num_frames is None else min_num_frames
    if not path.is_file():
        raise VideoError(f"there is no file '{path}'")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError("the file holds no video stream")
            frames = _resample(container, fps, num_frames)
    except av.error.FFmpegError as error:
        raise VideoError(f"cannot be decoded: {error}") from error
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError("the size of the frames changes within the clip")
    if len(frames) < min_num_frames:
        raise VideoError(f"too short: {len(frames)} frames at {fps:g} fps, {min_num_frames} are needed")
    return np.stack(frames[: floor_num_frames(len(frames))])


def _resample(container: av.container.InputContainer, fps: float, num_frames: int) -> list[np.ndarray]:
    """Up to `num_frames` RGB frames, one for each time `i / fps` that the stream covers."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    interval = 1 / float(stream.average_rate) if stream.average_rate else 1 / fps
    frames: list[np.ndarray] = []
    previous: av.VideoFrame | None = None
    # One for all frames: each frame's own would set up threads anew, which takes longer than to convert a small frame.
    reformatter = VideoReformatter()
    start, end = 0.0, 0.0
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise VideoError(f"damaged: the frame at {frame.time} s is corrupt")
        time = end if frame.time is None else frame.time
        if previous is None:
            start = time
        else:
            _repeat(frames, previous, reformatter, until=time - start, fps=fps, num_frames=num_frames)
            if len(frames) == num_frames:
                return frames
        end = time + (float(frame.duration * frame.time_base) if frame.duration else interval)
        previous = frame
    if previous is None:
        raise VideoError("zero frames could be decoded")
    _repeat(frames, previous, reformatter, until=end - start, fps=fps, num_frames=num_frames)
    if len(frames) < num_frames and stream.duration is not None:
        announced = float(stream.duration * stream.time_base)
        if end - start < announced - 2 * interval:
            raise VideoError(f"truncated: {end - start:.2f} s of the announced {announced:.2f} s can be decoded")
    return frames


def _repeat(
    frames: list[np.ndarray],
    frame: av.VideoFrame,
    reformatter: VideoReformatter,
    *,
    until: float,
    fps: float,
    num_frames: int,
) -> None:
    """Append `frame` for every output time that lies before `until`."""
    image: np.ndarray | None = None
    while len(frames) < num_frames and len(frames) / fps < until - TIME_TOLERANCE:
        if image is None:
            image = reformatter.reformat(frame, format="rgb24").to_ndarray()
            image = np.rot90(image, k=round(frame.rotation / 90) % 4)
        frames.append(image)


def read_image(path: str | Path) -> np.ndarray:
    """
    Read an image as `(height, width, 3)` uint8, turned upright by its EXIF tag.

    Raises:
        VideoError: If the file is missing or is no image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise VideoError(f"the image '{path}' cannot be read: {error}") from error


def parse_size(size: str) -> tuple[int, int]:
    """Height and width of a size written as `"480x832"`."""
    height, separator, width = size.partition("x")
    if not (separator and height.isdigit() and width.isdigit()):
        raise ValueError(f"a size is written HEIGHTxWIDTH, as in 480x832, got {size!r}.")
    return int(height), int(width)


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The `(height, width)` of `buckets` whose aspect ratio is nearest to that of the clip, by factor; first wins."""
    return min(buckets, key=lambda bucket: abs(np.log(bucket[1] / bucket[0]) - np.log(width / height)))


def short_side_bucket(height: int, width: int, resolution: int, max_aspect_ratio: float) -> tuple[int, int]:
    """
    Size that upstream's preprocessing gives a clip.

    The clip is scaled so that its short side equals `resolution`; both sides are rounded up to a multiple of 32 and
    capped at `resolution * max_aspect_ratio`, rounded up likewise.

    Example: a 1080 x 1920 clip at resolution 480 becomes 480 x 864, and 480 x 832 under an aspect limit of 1.7.
    """
    scale = resolution / min(height, width)
    max_side = _ceil_to_32(int(resolution * max_aspect_ratio))
    return min(_ceil_to_32(int(height * scale)), max_side), min(_ceil_to_32(int(width * scale)), max_side)


def _ceil_to_32(size: int) -> int:
    return -(-size // 32) * 32


def resize_and_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """
    Scale frames until they cover `height` x `width` and cut out the centre.

    Lanczos, the filter of diffusers' `VideoProcessor`, which prepares the first frame at inference. The cut is made
    in source coordinates, so nothing is stretched by rounding.

    Args:
        frames (`np.ndarray` of shape `(num_frames, source_height, source_width, 3)`): uint8.

    Returns:
        `np.ndarray` of shape `(num_frames, height, width, 3)` and type uint8.
    """
    source_height, source_width = frames.shape[1:3]
    if (source_height, source_width) == (height, width):
        return frames
    scale = max(height / source_height, width / source_width)
    top, left = (source_height - height / scale) / 2, (source_width - width / scale) / 2
    box = (
        max(left, 0.0),
        max(top, 0.0),
        min(left + width / scale, source_width),
        min(top + height / scale, source_height),
    )
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS, box=box) for frame in frames]
    return np.stack([np.asarray(image) for image in resized])


def to_float(frames: np.ndarray) -> torch.Tensor:
    """Frames `(num_frames, height, width, 3)` uint8 as `(num_frames, 3, height, width)` float32 in [-1, 1]."""
    tensor = torch.tensor(frames).permute(0, 3, 1, 2)
    # Same order of operations as `VideoProcessor.preprocess`, so that both give the same bits.
    return 2.0 * (tensor.float() / 255.0) - 1.0


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """Inverse of `to_float`."""
    scaled = ((frames.float() + 1.0) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
