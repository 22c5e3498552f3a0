"""Reads video files as frames of one size and frame rate."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.format import Flags as FormatFlags
from PIL import Image, ImageOps

from ..configs.base import check
from .clock import EPSILON, Clock, ClockJumps
from .container import DecodedStream, choose_stream, open_video
from .pixels import HDR, FrameConverter, VideoError, on_white


logger = logging.getLogger(__name__)

# A frame that stays for more seconds than this is reported.
LONG_FRAME = 1.0

TEMPORAL_STRIDE = 4

# Tags of TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262


@dataclass(frozen=True, kw_only=True)
class DecodingRules:
    """
    How to read clips in HDR or with a broken clock.

    Args:
        hdr (`str`, defaults to `"refuse"`): Colours of PQ, HLG and BT.2020: `"refuse"`, or `"tone_map"` to BT.709.
        max_frame_duration (`float`, defaults to 10.0): Seconds that one frame may stay on the screen; if it stays
        longer, the clock has jumped.
        clock_jumps (`str`, defaults to `"refuse"`): A clock that jumps or runs back: `"refuse"`, or `"join"` the parts.
    """

    hdr: HDR = "refuse"
    max_frame_duration: float = 10.0
    clock_jumps: ClockJumps = "refuse"


@dataclass(frozen=True)
class DecodedVideo:
    """Frames `(num_frames, height, width, 3)` uint8, and remarks for the report on a clip that is used."""

    frames: np.ndarray
    remarks: tuple[str, ...]


def floor_num_frames(num_frames: int) -> int:
    """Largest `4k + 1` that is not above `num_frames`: what the causal Wan VAE encodes without remainder."""
    return (num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1


def read_video(
    path: str | Path,
    fps: float,
    num_frames: int,
    min_num_frames: int | None = None,
    rules: DecodingRules | None = None,
) -> np.ndarray:
    """The frames of [`decode_video`], whose remarks are logged."""
    video = decode_video(path, fps, num_frames, min_num_frames, rules)
    for remark in video.remarks:
        logger.warning(f"'{path}': {remark}.")
    return video.frames


def decode_video(
    path: str | Path,
    fps: float,
    num_frames: int,
    min_num_frames: int | None = None,
    rules: DecodingRules | None = None,
) -> DecodedVideo:
    """
    Decode the start of a video at a constant frame rate.

    Output frame `i` is the source frame that is on the screen `i / fps` seconds after the first one, by presentation
    time, so variable frame rates come out right. [`Clock`] handles times that are missing, unsorted, rounded or jump;
    [`FrameConverter`] rotation, mirroring, pixels that are not square, transparency and HDR. Of several video streams
    the default one is read, else the largest, never a cover picture. Interlaced frames are not deinterlaced.

    Args:
        path (`str` or `Path`):
            A file of any kind that FFmpeg reads, recognised by its content and not by its name.
        fps (`float`):
            Frames per second of the output.
        num_frames (`int`):
            Frames wanted, `4k + 1`.
        min_num_frames (`int`, *optional*):
            Minimum number of frames, `num_frames` if left out. A clip in between is cut to `4k + 1` frames.
        rules (`DecodingRules`, *optional*):
            How to handle HDR and jumps of the clock.

    Returns:
        `DecodedVideo`: its frames have the shape `(num_frames, height, width, 3)`, uint8, the width with square
        pixels.

    Raises:
        VideoError: If the file is missing, is not a video, is damaged or truncated, holds no frame, is too short, or
            is refused by the rules.
        ValueError: If `fps` is not a finite number greater than 0.
    """
    check(math.isfinite(fps) and fps > 0, "fps", fps, "a finite number greater than 0")
    rules = DecodingRules() if rules is None else rules
    min_num_frames = num_frames if min_num_frames is None else min_num_frames
    try:
        with open_video(path) as container:
            frames, remarks = _resample(container, fps, num_frames, rules)
    except av.error.FFmpegError as error:
        # PyAV's own message would name the file, which has no name here.
        raise VideoError(f"cannot be decoded: {error.strerror or error}") from error
    if len(frames) < min_num_frames:
        raise VideoError(f"too short: {len(frames)} frames at {fps:g} fps, {min_num_frames} are needed")
    return DecodedVideo(frames[: floor_num_frames(len(frames))], remarks)


def _resample(
    container: av.container.InputContainer, fps: float, num_frames: int, rules: DecodingRules
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Up to `num_frames` RGB frames, one for each time `i / fps` that the stream covers, and remarks on them."""
    stream = choose_stream(container)
    stream.thread_type = "AUTO"
    # FFmpeg's base rate is the rate before rounding, the average rate that of the rounded times.
    base_rate = float(stream.base_rate or fps)
    clock = Clock(
        tick=float(stream.time_base),
        interval=1 / float(stream.guessed_rate or base_rate),
        fps=fps,
        base_rate=base_rate,
        max_frame_duration=rules.max_frame_duration,
        jumps=rules.clock_jumps,
        is_made_up=bool(container.format.flags & FormatFlags.no_timestamps.value),
    )
    convert = FrameConverter(stream.sample_aspect_ratio, rules.hdr)
    source = DecodedStream(container, stream)
    # Memory for all frames at once: a list of them would have to be copied. What is not written to takes none.
    frames, count = np.empty((0, 0, 0, 3), np.uint8), 0
    end, longest, interlaced = 0.0, 0.0, False
    for shown in clock.show(source):
        if shown.frame.is_corrupt:
            raise VideoError(f"damaged: the frame at {shown.frame.time} s is corrupt")
        before = count
        while count < num_frames and count / fps < shown.end - EPSILON:
            count += 1
        if count > before:
            image = convert(shown.frame, source.tagged)
            frames = np.empty((num_frames, *image.shape), np.uint8) if before == 0 else frames
            if image.shape != frames.shape[1:]:
                raise VideoError("the size of the frames changes within the clip")
            frames[before:count] = image
            longest = max(longest, (count - before) / fps)
            interlaced = interlaced or shown.frame.interlaced_frame
        end = shown.end
        if count == num_frames:
            break
    else:
        source.check(end + clock.skipped)
    remarks = []
    if clock.joined:
        remarks.append(f"its clock was joined (jumps: {len(clock.joined)}), first where {clock.joined[0]}")
    if longest > LONG_FRAME:
        remarks.append(f"one frame fills {longest:.2f} s of the clip")
    if interlaced:
        remarks.append("its frames are interlaced")
    return frames[:count], tuple(remarks)


def read_image(path: str | Path) -> np.ndarray:
    """
    Read an image as `(height, width, 3)` uint8, turned upright by its EXIF tag.

    12 and 16 bits per channel are scaled to 8, transparency is laid on white as in videos, and only the first picture
    of an animated image is read. 32-bit integers and floats are refused, because it is unknown which value is white.

    Raises:
        VideoError: If the file is missing, is not an image, or is of a kind that is refused.
    """
    try:
        with Image.open(path) as image:
            # Pillow opens 16-bit grey images of these formats in a 32-bit mode.
            deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            if image.mode in ("I", "F") and not deep:
                raise ValueError(f"mode {image.mode!r}, in which it is unknown which value is white")
            transparent = image.info.get("transparency") if deep else None
            if image.format == "PNG" and "transparency" in image.info and "RGB;16" in str(image.tile):
                # Pillow keeps 8 bits, in which that colour cannot be identified.
                raise ValueError("16 bits per channel and a transparent colour")
            # TIFF says which value is white; the other formats are scaled to 16 bits.
            tags = getattr(image, "tag_v2", {})
            white = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
            white_is_zero = tags.get(PHOTOMETRIC) == 0
            upright = ImageOps.exif_transpose(image)
            if deep:
                values = np.asarray(upright).astype(np.uint32)
                if white_is_zero:
                    values = white - values
                gray = np.where(values == transparent, 255, (510 * values + white) // (2 * white)).astype(np.uint8)
                return np.repeat(gray[..., None], 3, axis=2)
            if upright.has_transparency_data or upright.mode in ("La", "RGBa"):
                return on_white(np.asarray(upright.convert("RGBA")))
            return np.asarray(upright.convert("RGB"))
    # The last ones are what Pillow's decoders raise for broken files.
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError, EOFError) as error:
        raise VideoError(f"the image '{path}' cannot be read: {error}") from error


def parse_size(size: str) -> tuple[int, int]:
    """Height and width of a size written as `"480x832"`."""
    height, separator, width = size.partition("x")
    if not (separator and height.isdigit() and width.isdigit()):
        raise ValueError(f"a size is written HEIGHTxWIDTH, as in 480x832, got {size!r}.")
    return int(height), int(width)


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The `(height, width)` in `buckets` with the aspect ratio nearest to the clip's, by factor; the first of equals."""
    return min(buckets, key=lambda bucket: abs(np.log(bucket[1] / bucket[0]) - np.log(width / height)))


def short_side_bucket(height: int, width: int, resolution: int, max_aspect_ratio: float) -> tuple[int, int]:
    """
    Size of a clip in upstream's preprocessing.

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
