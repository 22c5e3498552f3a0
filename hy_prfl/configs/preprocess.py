"""Options of `preprocess`."""

import re
from dataclasses import dataclass, field
from typing import Literal

from .base import check


@dataclass(kw_only=True)
class PreprocessConfig:
    """
    Options of `preprocess`: clips of a manifest, or folders of upstream's preprocessing, become a latent dataset.

    > Parameters of the input and output
    > Parameters of the clips
    > Parameters of the encoders and of storage
    """

    # Parameters of the input and output
    pretrained_model_name_or_path: str = field(
        metadata={"help": "Diffusers Wan pipeline whose VAE, text and image encoder are used: a folder or a Hub id."}
    )
    output_dir: str = field(metadata={"help": "Folder of the finished dataset, for `datasets.load_from_disk`."})
    manifest: str | None = field(
        default=None, metadata={"help": "Clips to encode: a JSON list, JSON Lines or CSV file (.json, .jsonl, .csv)."}
    )
    upstream_meta: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a manifest: a folder of HY-Video-PRFL's `*_meta_v1.json` files, or a .list file that "
            "names such files. Their .npy files are imported, nothing is encoded but the empty prompt."
        },
    )
    upstream_root: str = field(
        default=".",
        metadata={"help": "Folder that upstream ran in: paths in its files are looked up there and beside the file."},
    )
    null_prompt_path: str | None = field(
        default=None,
        metadata={"help": "Upstream's null.npy, the embedding of the empty prompt; encoded anew if left out."},
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the pipeline."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the pipeline's weight files, e.g. fp16."})

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
    prompts_only: bool = field(
        default=False,
        metadata={
            "help": "Encode no latents: prompts for reward updates, with first images for image-to-video. For "
            "text-to-video, buckets must name one size."
        },
    )

    # Parameters of the encoders and of storage
    max_sequence_length: int = field(default=512, metadata={"help": "Tokens after which a prompt is cut."})
    text_encoder_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Type of the text encoder. VAE and image encoder are always float32."}
    )
    tensor_dtype: Literal["float16", "float32"] = field(
        default="float16", metadata={"help": "Type that tensors are stored in."}
    )
    shard_size: int = field(default=8, metadata={"help": "Clips that are stored at once: the loss if killed."})

    def __post_init__(self) -> None:
        check(
            (self.manifest is None) != (self.upstream_meta is None),
            "manifest",
            self.manifest,
            "given, or else `upstream_meta`, and not both",
        )
        check(not (self.prompts_only and self.upstream_meta), "prompts_only", True, "false with `upstream_meta`")
        check(
            self.null_prompt_path is None or self.upstream_meta is not None,
            "null_prompt_path",
            self.null_prompt_path,
            "left out without `upstream_meta`",
        )
        check(self.fps > 0, "fps", self.fps, "greater than 0")
        check(self.num_frames >= 1 and self.num_frames % 4 == 1, "num_frames", self.num_frames, "of the form 4k + 1")
        check(
            self.min_num_frames is None or 1 <= self.min_num_frames <= self.num_frames,
            "min_num_frames",
            self.min_num_frames,
            "between 1 and num_frames",
        )
        for size in self.buckets:
            match = re.fullmatch(r"(\d+)x(\d+)", size)
            valid = match is not None and all(int(side) > 0 and int(side) % 16 == 0 for side in match.groups())
            check(valid, "buckets", size, "sizes HEIGHTxWIDTH with sides that are multiples of 16")
        check(self.resolution > 0 and self.resolution % 32 == 0, "resolution", self.resolution, "a multiple of 32")
        check(self.max_aspect_ratio >= 1, "max_aspect_ratio", self.max_aspect_ratio, "at least 1")
        check(self.max_sequence_length >= 1, "max_sequence_length", self.max_sequence_length, "at least 1")
        check(self.shard_size >= 1, "shard_size", self.shard_size, "at least 1")
