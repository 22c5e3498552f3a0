"""Options of `score`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import check, check_seed, check_timesteps
from .clips import ClipConfig


@dataclass(kw_only=True)
class ScoreConfig(ClipConfig):
    """
    Options of `score`: write a table of rewards at given noise levels, for videos with captions or a latent dataset.

    > Parameters of the input and output
    > Parameters of the scores
    """

    # Parameters of the input and output
    reward_model: str = field(metadata={"help": "Reward model: a folder written by train_reward, or a Hub id."})
    reward_model_revision: str | None = field(default=None, metadata={"help": "Hub revision of the reward model."})
    manifest: str | None = field(
        default=None,
        metadata={"help": "Videos to score: .json, .jsonl or .csv, as for `preprocess` or written by `generate`."},
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
        default=False,
        metadata={"help": "Replace a table that was made with other options; without it such a table is an error."},
    )

    # Parameters of the scores
    timesteps: list[int] = field(
        default_factory=lambda: [201, 400, 600, 800, 1000],
        metadata={"help": "Noise levels, 1000 * sigma, in (0, 1000]."},
    )
    num_noise_samples: int = field(
        default=1, metadata={"help": "Number of noise samples that each logit is averaged over."}
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of the noise. With the seed of a training run, the noise is that of its evaluation."},
    )
    batch_size: int = field(default=1, metadata={"help": "Rows of a dataset in one batch, per process."})
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="float32", metadata={"help": "Type of the reward model."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
        check_timesteps("timesteps", self.timesteps)
        for name in ("num_noise_samples", "batch_size"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check_seed("seed", self.seed)
