"""Options of `score`."""

import re
from dataclasses import dataclass, field
from typing import Literal

from .base import check


@dataclass(kw_only=True)
class ScoreConfig:
    """
    Options of `score`: videos with captions, or a latent dataset -> a table of rewards at chosen noise levels.

    > Parameters of the input and output
    > Parameters of the scores
    > Parameters of the clips, as for `preprocess`
    """

    # Parameters of the input and output
    reward_model: str = field(metadata={"help": "Reward model: a folder written by train_reward, or a Hub id."})
    reward_model_revision: str | None = field(default=None, metadata={"help": "Hub revision of the reward model."})
    manifest: str | None = field(
        default=None,
        metadata={"help": "Videos to score: .json, .jsonl or .csv, as for `preprocess` or by `generate`."},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Instead of a manifest: a latent dataset, a folder or a Hub id."}
    )
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Diffusers Wan pipeline whose encoders are used for a manifest: a folder or a Hub id."},
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the pipeline."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the pipeline's weight files, e.g. fp16."})
    output: str = field(
        metadata={"help": "Table to write: .csv, .json or .jsonl. A summary is written to <output>.summary.json."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a table of other scores; without it that is an error."}
    )

    # Parameters of the scores
    timesteps: list[int] = field(
        default_factory=lambda: [201, 400, 600, 800, 1000],
        metadata={"help": "Noise levels, 1000 * sigma, in (0, 1000]."},
    )
    num_noise_samples: int = field(default=1, metadata={"help": "Noises that each logit is the mean over."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise; with the seed of training, the same noise."})
    batch_size: int = field(default=1, metadata={"help": "Rows of a dataset that are scored at once, per process."})
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="float32", metadata={"help": "Type of the reward model."}
    )

    # Parameters of the clips, as for `preprocess`
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
        one_input = (self.manifest is None) != (self.dataset is None)
        check(one_input, "manifest", self.manifest, "given, or else `dataset`, and not both")
        pipeline = self.pretrained_model_name_or_path
        check(
            (pipeline is None) == (self.manifest is None),
            "pretrained_model_name_or_path",
            pipeline,
            "given with `manifest`, whose videos it encodes, and left out with `dataset`",
        )
        check(self.output.endswith((".csv", ".json", ".jsonl")), "output", self.output, "a .csv, .json or .jsonl file")
        check(len(self.timesteps) > 0, "timesteps", self.timesteps, "not empty")
        check(len(set(self.timesteps)) == len(self.timesteps), "timesteps", self.timesteps, "different numbers")
        for timestep in self.timesteps:
            check(0 < timestep <= 1000, "timesteps", timestep, "in (0, 1000]")
        for name in ("num_noise_samples", "batch_size", "max_sequence_length"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.seed >= 0, "seed", self.seed, "at least 0")
        self._check_clips()

    def _check_clips(self) -> None:
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
