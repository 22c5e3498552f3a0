"""Finds out for a model card which pipeline and datasets of a run are on the Hub, and what kind the pipeline is."""

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

from ..configs.base import names_in
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
# Configuration entries of the transformer that determine the kind of its pipeline.
SHAPE = ("in_channels", "out_channels", "image_dim", "pos_embed_seq_len")
# Key of [`run_sources`] in the record of a run.
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
            Number of position embeddings for the tokens of both images, if the transformer takes a first and a last
            image (FLF2V).
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
        """The kind inferred from a transformer's configuration: image-to-video if it has more input than output channels."""
        shape = {name: config[name] for name in SHAPE if config.get(name) is not None}
        pipeline = cls("WanPipeline", **shape)
        takes_condition = pipeline.in_channels > pipeline.out_channels
        return cls("WanImageToVideoPipeline", **shape) if takes_condition else pipeline


def run_sources(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Record of a run's sources, made when the run starts: its paths may not exist on the machine that pushes it later.

    Args:
        config (`Mapping[str, Any]`):
            Options of the run. A name that is not a path on this machine is a repository on the Hub.

    Returns:
        `{"on_hub": [...], "pipeline": {...}}`, JSON values: the names that are repositories, and the fields of a
        [`BasePipeline`], or null if its configuration cannot be read.
    """
    names = {name for option in SOURCE_OPTIONS for name in names_in(config.get(option))}
    on_hub = sorted(name for name in names if _may_be_repo_id(name) and not Path(name).exists())
    pipeline = load_base_pipeline(str(config["pretrained_model_name_or_path"]), config.get("revision"))
    return {"on_hub": on_hub, "pipeline": None if pipeline is None else asdict(pipeline)}


def recorded_sources(files: Mapping[str, Path]) -> dict[str, Any]:
    """The latest [`run_sources`] in the record of a run. Empty if there is none."""
    records = json.loads(files[RUN_FILE].read_text(encoding="utf-8")) if RUN_FILE in files else []
    return records[-1].get(SOURCES, {}) if records else {}


def find_base_pipeline(
    name: str, revision: str | None, recorded: Mapping[str, Any], transformer_config: Mapping[str, Any] | None = None
) -> BasePipeline | None:
    """
    The kind of the pipeline that a model belongs to. It is never inferred from the pipeline's name.

    It is read from the run's record, else from the pipeline's configuration, else from the model's own. None if there is
    none of these.

    Args:
        name (`str`):
            Folder or Hub id of the pipeline, or an empty string.
        recorded (`Mapping[str, Any]`):
            See [`recorded_sources`].
        transformer_config (`Mapping[str, Any]`, *optional*):
            Configuration of the transformer or reward model that was made from the pipeline.
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
        # The published pipelines have the same kind at every revision.
        info = PipelineInfo.known(name, None if is_published else revision)
        config = info.transformer
        return BasePipeline(info.index["_class_name"], **{key: config[key] for key in SHAPE})
    except (OSError, ValueError, KeyError) as error:
        logger.info("The configuration of '%s' cannot be read (%s).", name, next(iter(str(error).splitlines()), ""))
        return None


def is_on_hub(name: str, repo_type: str, recorded: Mapping[str, Any], api: HfApi | None = None) -> bool:
    """
    Whether a name in a configuration is a repository on the Hub and not a path.

    `data/train` may be either. The run's record decides. Without a record, a name that exists here as a path is a path;
    otherwise the Hub decides, or the cache of downloads if `api` is None. In doubt it is a path.

    Args:
        repo_type (`str`):
            `"model"` or `"dataset"`.
        recorded (`Mapping[str, Any]`):
            See [`recorded_sources`].
        api (`HfApi`, *optional*):
            Client for the request to the Hub.
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
        logger.warning("The Hub cannot be reached to look up '%s' (%s): the card gets no link to it.", name, error)
        return False


def _may_be_repo_id(name: str) -> bool:
    """Whether a name has the form `user/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1
