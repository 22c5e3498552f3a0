"""Options of `preprocess`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import check
from .clips import ClipConfig


@dataclass(kw_only=True)
class PreprocessConfig(ClipConfig):
    """
    Options of `preprocess`: encode the clips of a manifest, or import upstream's preprocessed clips, into a latent
    dataset.

    > Parameters of the input and output
    > Parameters of encoding and of storage
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
            "names such files. Imports their .npy files and encodes only the empty prompt."
        },
    )
    upstream_root: str = field(
        default=".",
        metadata={"help": "Folder in which upstream ran. Paths in its files are looked up there and beside the file."},
    )
    null_prompt_path: str | None = field(
        default=None,
        metadata={"help": "Upstream's null.npy, the embedding of the empty prompt. If left out, it is encoded here."},
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Replace a finished dataset that was made with other options, and drop clips that are no longer in the "
            "manifest; without it both are errors."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the pipeline."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the pipeline's weight files, e.g. fp16."})

    # Parameters of encoding and of storage
    prompts_only: bool = field(
        default=False,
        metadata={
            "help": "Encode only prompts for reward updates, and first images for image-to-video, but no latents. For "
            "text-to-video, buckets must have exactly one size."
        },
    )

    tensor_dtype: Literal["float16", "float32"] = field(
        default="float16", metadata={"help": "Type that tensors are stored in."}
    )
    batch_size: int = field(
        default=1,
        metadata={
            "help": "Clips of one size and length that the VAE encodes together. More is faster for small clips."
        },
    )
    num_workers: int = field(
        default=2,
        metadata={
            "help": "Threads in each process that read the next clips while the VAE encodes. With 0, reading and encoding "
            "alternate. A thread needs memory for twice the frames of a clip at the file's size: 1 GB for 81 frames of 1080p. "
            "Up to max(num_workers, batch_size) clips are read in advance, at their final size: 0.2 GB each at 720P."
        },
    )
    shard_size: int = field(
        default=8,
        metadata={"help": "Clips that are stored together. At most this many are lost if the process is killed."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        check(self.num_workers >= 0, "num_workers", self.num_workers, "at least 0")
        check(self.shard_size >= 1, "shard_size", self.shard_size, "at least 1")
