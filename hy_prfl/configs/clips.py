"""How clips are cut out of videos: the same for `preprocess` and `score`, or scores would be of other clips."""

import re
from dataclasses import dataclass, field
from typing import Literal

from .base import check


@dataclass(kw_only=True)
class ClipConfig:
    """
    Options of decoding, cropping and encoding.

    > Parameters of the clips
    """

    # Parameters of the clips
    fps: float = field(default=16.0, metadata={"help": "Frame rate that clips are resampled to."})
    num_frames: int = field(default=81, metadata={"help": "Frames per clip, 4k + 1. Longer clips are cut."})
    min_num_frames: int | None = field(
        default=None,
        metadata={"help": "Accept clips with at least this many frames, cut to 4k + 1; num_frames if left out."},
    )
    buckets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Sizes HEIGHTxWIDTH such as 480x832 832x480; the nearest aspect ratio wins. If left out, "
            "resolution and max_aspect_ratio give the size."
        },
    )
    resolution: int = field(
        default=480,
        metadata={"help": "Short side in pixels, a multiple of 32 (upstream: 480 and 704). Sides round up to 32."},
    )
    max_aspect_ratio: float = field(
        default=1.78, metadata={"help": "The long side is cut to resolution times this, rounded up to 32."}
    )
    max_sequence_length: int = field(default=512, metadata={"help": "Tokens after which a prompt is cut."})
    text_encoder_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Type of the text encoder. VAE and image encoder are always float32."}
    )

    def __post_init__(self) -> None:
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
        check(self.max_sequence_length >= 1, "max_sequence_length", self.max_sequence_length, "at least 1")
