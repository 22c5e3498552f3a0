"""Sources of a run, for its model card: which of them are on the Hub, and what kind its pipeline is."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from ..configs.base import names_in
from ..formats.pipeline_info import PIPELINE_CLASSES, PUBLISHED, PipelineInfo
from ..runtime.provenance import RUN_FILE


logger = logging.getLogger(__name__)

# Options of a run that name a folder or a repository that its model is made from or measured on. A monitor's reward models
# are not among them: the model is not made from them, and a card has no links to them.
SOURCE_OPTIONS = (
    "pretrained_model_name_or_path",
    "reward_model",
    "reward_models",
    "train_dataset",
    "prompt_dataset",
    "validation_dataset",
)
# Configuration entries of the transformer that determine, with its class, the kind of a pipeline.
SHAPE = ("in_channels", "out_channels", "image_dim", "pos_embed_seq_len")
# Key of [`run_sources`] in the record of a run.
SOURCES = "sources"


def run_sources(config: Mapping[str, Any], pipeline: PipelineInfo) -> dict[str, Any]:
    """
    Record of a run's sources, made when the run starts: its paths may not exist on the machine that pushes it later.

    Args:
        config (`Mapping[str, Any]`):
            Options of the run. A name that is not a path on this machine is a repository on the Hub.
        pipeline (`PipelineInfo`):
            The pipeline of the run.

    Returns:
        `{"on_hub": [...], "pipeline": {...}}`, JSON values: the names that are repositories, and the pipeline's class with
        the entries `SHAPE` of its transformer, or null if its configuration cannot be read.
    """
    names = {name for option in SOURCE_OPTIONS for name in names_in(config.get(option))}
    on_hub = sorted(name for name in names if _may_be_repo_id(name) and not Path(name).exists())
    return {"on_hub": on_hub, "pipeline": _pipeline_record(pipeline)}


def recorded_sources(files: Mapping[str, Path]) -> dict[str, Any]:
    """The latest [`run_sources`] in the record of a run. Empty if there is none."""
    records = json.loads(files[RUN_FILE].read_text(encoding="utf-8")) if RUN_FILE in files else []
    return records[-1].get(SOURCES, {}) if records else {}


def find_base_pipeline(
    name: str, revision: str | None, recorded: Mapping[str, Any], transformer_config: Mapping[str, Any] | None = None
) -> PipelineInfo | None:
    """
    The pipeline that a model belongs to, as far as it is known. Its kind is never inferred from its name.

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
    record = recorded.get("pipeline") or (_read_record(name, revision) if name else None)
    if record and record["class_name"] in PIPELINE_CLASSES:
        return PipelineInfo.from_transformer(name, record, class_name=record["class_name"])
    return PipelineInfo.from_transformer(name, transformer_config) if transformer_config else None


def _read_record(name: str, revision: str | None) -> dict[str, Any] | None:
    """The record of a pipeline in a folder or on the Hub; None if its configuration cannot be read."""
    is_published = name in PUBLISHED and not Path(name).exists()
    if not is_published and not Path(name).is_dir() and not _may_be_repo_id(name):
        return None
    try:
        # The published pipelines have the same kind at every revision.
        info = PipelineInfo.known(name, None if is_published else revision)
    except (OSError, ValueError) as error:
        _note_unreadable(name, error)
        return None
    return _pipeline_record(info)


def _pipeline_record(info: PipelineInfo) -> dict[str, Any] | None:
    """What [`run_sources`] records of a pipeline."""
    try:
        return {"class_name": info.pipeline_class.__name__, **{name: info.transformer[name] for name in SHAPE}}
    except (OSError, ValueError, KeyError) as error:
        _note_unreadable(info.source, error)
        return None


def _note_unreadable(name: str, error: Exception) -> None:
    logger.info("The configuration of '%s' cannot be read (%s).", name, next(iter(str(error).splitlines()), ""))


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
