"""Options of `label`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import Config


@dataclass(kw_only=True)
class LabelConfig(Config):
    """Options of `label`: merge annotations into an existing latent dataset. Nothing is encoded again."""

    dataset: str = field(metadata={"help": "Latent dataset written by `preprocess`: a folder or a Hub id."})
    annotations: str = field(
        metadata={
            "help": "JSON list, JSON Lines or CSV with `id` and any of text_alignment, blur_quality, "
            "physics_quality, human_quality: 1/0, good/poor, or empty for unknown."
        }
    )
    output_dir: str = field(metadata={"help": "Folder for the labelled dataset; may be `dataset` itself."})
    unknown_ids: Literal["error", "ignore"] = field(
        default="error", metadata={"help": "How to treat annotations of clips that are not in the dataset."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace labels that differ from the annotations; without it a difference is an error."},
    )
