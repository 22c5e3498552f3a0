"""Options for reading clips from videos. `preprocess` and `score` share them, so that both use the same clips."""

import re
from dataclasses import dataclass, field
from typing import Literal

from .base import Config, check


# The values of `file_identity`, in words.
FILE_IDENTITIES = {"time": "size and time stamp", "content": "content"}


@dataclass(kw_only=True)
class ClipConfig(Config):
    """
    Options of decoding, cropping and encoding.

    > Parameters of the clips
    """

    # Parameters of the clips
    fps: float = field(default=16.0, metadata={"help": "Frame rate that clips are resampled to."})
    num_frames: int = field(default=81, metadata={"help": "Frames per clip, 4k + 1. Longer clips are cut."})
    min_num_frames: int | None = field(
        default=None,
        metadata={"help": "Accept clips of at least this many frames and cut them to 4k + 1. num_frames if left out."},
    )
    buckets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Sizes HEIGHTxWIDTH such as 480x832 832x480. A clip gets the one with the nearest aspect ratio. If left "
            "out, the size follows from resolution and max_aspect_ratio."
        },
    )
    resolution: int = field(
        default=480,
        metadata={"help": "Short side in pixels, a multiple of 32 (upstream: 480 and 704). Sides round up to 32."},
    )
    max_aspect_ratio: float = field(
        default=1.78, metadata={"help": "The long side is cropped to resolution times this, rounded up to 32."}
    )
    hdr: Literal["refuse", "tone_map"] = field(
        default="refuse",
        metadata={
            "help": "For clips in HDR (PQ, HLG) or BT.2020: leave them out, or convert them to BT.709 with compressed highlights."
        },
    )
    max_frame_duration: float = field(
        default=10.0,
        metadata={
            "help": "Longest time in seconds that one frame may stay on the screen. A longer time counts as a clock jump.",
            "may_be_infinite": True,
        },
    )
    clock_jumps: Literal["refuse", "join"] = field(
        default="refuse",
        metadata={
            "help": "For clips whose clock jumps, as in a paused recording, or runs backwards: leave them out, or join the "
            "parts and report it."
        },
    )
    file_identity: Literal["time", "content"] = field(
        default="time",
        metadata={
            "help": "How a finished job recognises unchanged files: by size and time stamp, or by content, which means to "
            "read all of them."
        },
    )
    vae_tiling: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "help": "Run the VAE in tiles, which changes the result slightly. auto does this only if a pass would not fit "
            "into free memory."
        },
    )
    max_sequence_length: int = field(default=512, metadata={"help": "Most tokens of a prompt; the rest is cut off."})
    text_encoder_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Type of the text encoder. VAE and image encoder are always float32."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.fps > 0, "fps", self.fps, "greater than 0")
        check(self.num_frames >= 1 and self.num_frames % 4 == 1, "num_frames", self.num_frames, "of the form 4k + 1")
        fewest = self.min_num_frames
        check(fewest is None or 1 <= fewest <= self.num_frames, "min_num_frames", fewest, "between 1 and num_frames")
        for size in self.buckets:
            match = re.fullmatch(r"(\d+)x(\d+)", size)
            valid = match is not None and all(int(side) > 0 and int(side) % 16 == 0 for side in match.groups())
            check(valid, "buckets", size, "sizes HEIGHTxWIDTH with sides that are multiples of 16")
        check(self.resolution > 0 and self.resolution % 32 == 0, "resolution", self.resolution, "a multiple of 32")
        check(self.max_aspect_ratio >= 1, "max_aspect_ratio", self.max_aspect_ratio, "at least 1")
        check(self.max_frame_duration > 0, "max_frame_duration", self.max_frame_duration, "greater than 0")
        check(self.max_sequence_length >= 1, "max_sequence_length", self.max_sequence_length, "at least 1")
