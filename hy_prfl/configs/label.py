"""Options of `label`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import Config


@dataclass(kw_only=True)
class LabelConfig(Config):
    """Options of `label`: merge annotations into an existing latent dataset without encoding anything."""

    dataset: str = field(metadata={"help": "Latent dataset written by `preprocess`: a folder or a Hub id."})
    annotations: str = field(
        metadata={
            "help": "JSON list, JSON Lines or CSV with `id` and any of text_alignment, blur_quality, "
            "physics_quality, human_quality: 1/0, good/poor, or empty for unknown."
        }
    )
    output_dir: str = field(metadata={"help": "Folder for the labelled dataset; may be `dataset` itself."})
    unknown_ids: Literal["error", "ignore"] = field(
        default="error", metadata={"help": "What to do with annotations of clips that are not in the dataset."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Let annotations replace different labels; without it a difference is an error."},
    )
