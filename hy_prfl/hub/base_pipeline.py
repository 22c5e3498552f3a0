"""Sources of a model on the Hub: which of them are on the Hub too, and the kind of its pipeline."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from ..formats.pipeline_info import PUBLISHED, PipelineInfo
from ..runtime.provenance import RUN_FILE


logger = logging.getLogger(__name__)

# Options of a run that name a folder or a repository, and the kind of that repository.
SOURCE_OPTIONS = {
    "pretrained_model_name_or_path": "model",
    "reward_model": "model",
    "reward_models": "model",
    "train_dataset": "dataset",
    "prompt_dataset": "dataset",
    "validation_dataset": "dataset",
}
SHAPE = ("in_channels", "out_channels", "image_dim", "pos_embed_seq_len")
# Keys of these sources in the record of a run.
SOURCES = "sources"


@dataclass(frozen=True)
class BasePipeline:
    """
    The kind of a Wan pipeline, inferred from its `model_index.json` and the configuration of its transformer.

    Args:
        class_name (`str`):
            `WanPipeline` or `WanImageToVideoPipeline`.
        in_channels, out_channels (`int`):
            Input and output channels of the transformer.
        image_dim (`int`, *optional*):
            Width of the image embeddings, if the transformer takes any.
        pos_embed_seq_len (`int`, *optional*):
            Number of image tokens with positions, for two images together, if it takes a first and a last image
            (FLF2V).
    """

    class_name: str
    in_channels: int = 16
    out_channels: int = 16
    image_dim: int | None = None
    pos_embed_seq_len: int | None = None

    @property
    def is_image_to_video(self) -> bool:
        """Whether it starts from an image."""
        return self.class_name == "WanImageToVideoPipeline"

    @property
    def needs_last_image(self) -> bool:
        """Whether it requires a last image."""
        return self.image_dim is not None and self.pos_embed_seq_len is not None

    @classmethod
    def from_transformer(cls, config: Mapping[str, Any]) -> "BasePipeline":
        """The pipeline of a transformer, from its configuration: more input than output channels mean a condition."""
        shape = {name: config[name] for name in SHAPE if config.get(name) is not None}
        pipeline = cls("WanPipeline", **shape)
        takes_condition = pipeline.in_channels > pipeline.out_channels
        return cls("WanImageToVideoPipeline", **shape) if takes_condition else pipeline


def run_sources(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Record of a run's sources, because paths may not exist on the machine that pushes it.

    Args:
        config (`Mapping[str, Any]`):
            Options of the run, which starts now: a name that is not a path here is a repository of the Hub.

    Returns:
        `{"on_hub": [...], "pipeline": {...}}`, JSON values: the names that are repositories, and a [`BasePipeline`],
        null if its configuration cannot be read.
    """
    given = [config[option] for option in SOURCE_OPTIONS if config.get(option)]
    names = {str(name) for value in given for name in (value if isinstance(value, list) else [value])}
    on_hub = sorted(name for name in names if _may_be_repo_id(name) and not Path(name).exists())
    pipeline = load_base_pipeline(str(config["pretrained_model_name_or_path"]), config.get("revision"))
    return {"on_hub": on_hub, "pipeline": None if pipeline is None else asdict(pipeline)}


def recorded_sources(files: Mapping[str, Path]) -> dict[str, Any]:
    """The latest [`run_sources`] in the record of a run, empty if there is none."""
    records = json.loads(files[RUN_FILE].read_text(encoding="utf-8")) if RUN_FILE in files else []
    return records[-1].get(SOURCES, {}) if records else {}


def find_base_pipeline(
    name: str, revision: str | None, recorded: Mapping[str, Any], transformer_config: Mapping[str, Any] | None = None
) -> BasePipeline | None:
    """
    The kind of the pipeline that a model belongs to: from the run's record, from the pipeline's configuration, or from
    the model's own, in this order; None if there is none of them. Never inferred from its name.

    Args:
        name (`str`):
            Folder or Hub id of the pipeline, or an empty string.
        recorded (`Mapping[str, Any]`):
            See [`recorded_sources`].
        transformer_config (`Mapping[str, Any]`, *optional*):
            Configuration of a transformer, or reward model, that was made from it.
    """
    if recorded.get("pipeline"):
        return BasePipeline(**recorded["pipeline"])
    found = load_base_pipeline(name, revision) if name else None
    if found is None and transformer_config:
        return BasePipeline.from_transformer(transformer_config)
    return found


def load_base_pipeline(name: str, revision: str | None = None) -> BasePipeline | None:
    """The kind of a pipeline in a folder or on the Hub; None if its configuration cannot be read."""
    is_published = name in PUBLISHED and not Path(name).exists()
    if not is_published and not Path(name).is_dir() and not _may_be_repo_id(name):
        return None
    try:
        # What is published does not change with a revision.
        info = PipelineInfo.known(name, None if is_published else revision)
        config = info.transformer
        return BasePipeline(info.index["_class_name"], **{key: config[key] for key in SHAPE})
    except (OSError, ValueError, KeyError) as error:
        logger.info("The configuration of '%s' cannot be read (%s).", name, next(iter(str(error).splitlines()), ""))
        return None


def is_on_hub(name: str, repo_type: str, recorded: Mapping[str, Any], api: HfApi | None = None) -> bool:
    """
    Whether a name in a configuration is a repository of the Hub and not a path.

    `data/train` looks like both. The run's record decides, or else whether that path exists here; then the Hub is
    asked, or without a client, the cache of downloads. In doubt it is a path.

    Args:
        repo_type (`str`):
            `"model"` or `"dataset"`.
        recorded (`Mapping[str, Any]`):
            See [`recorded_sources`].
        api (`HfApi`, *optional*):
            Client to ask the Hub with.
    """
    if not _may_be_repo_id(name):
        return False
    if "on_hub" in recorded:
        return name in recorded["on_hub"]
    if Path(name).exists():
        return False
    if repo_type == "model" and name in PUBLISHED:
        return True
    if api is None:
        cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=repo_type)
        return (cached / "snapshots").is_dir()
    try:
        return api.repo_exists(name, repo_type=repo_type)
    except (HTTPError, OSError) as error:
        logger.warning("The Hub cannot be asked for '%s' (%s): it gets no link.", name, error)
        return False


def _may_be_repo_id(name: str) -> bool:
    """Whether it has the form of `user/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1
