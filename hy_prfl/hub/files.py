"""Selects the files of a run or model folder that are pushed to the Hub, and their paths in the repository."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from ..formats.checkpoints import AVERAGE_FOLDER, BEST_FOLDER, MODEL_FOLDER, list_checkpoints
from ..formats.layout import EXPERT_FOLDERS, LORA_FILES
from ..runtime.provenance import CONFIG_FILE, METRICS_FILE, RUN_FILE
from .model_card import CARD_FILE, PIPELINE_INDEX, has_class, may_replace_card, model_kind, write_model_card


logger = logging.getLogger(__name__)


def model_files(folder: Path) -> dict[str, Path]:
    """
    Files of a run ([`run_files`]), or all files of a folder with a model in it.

    Raises:
        ValueError: If the folder is neither.
    """
    if (folder / CONFIG_FILE).is_file():
        return run_files(folder)
    files = _visible_files(folder)
    if PIPELINE_INDEX in files:
        raise ValueError(
            f"`folder`: '{folder}' is a whole pipeline ({PIPELINE_INDEX}). Push the run, or a folder with only the trained "
            "`transformer` or LoRA. To push a whole pipeline, use `hf upload`."
        )
    if has_class(files, "WanTransformer3DModel"):
        raise ValueError(f"`folder`: '{folder}' is the transformer itself. Push the folder that contains it.")
    if model_kind(files) is None:
        raise ValueError(f"`folder`: '{folder}' is neither a run nor a folder with a model in it.")
    return files


def run_files(run_dir: Path, weights_dir: Path | None = None) -> dict[str, Path]:
    """
    Files of a run for the Hub: path in the repository -> file. Optimizer states are never included.

    The best reward model, or else the last one, is at the root of the repository, so that the repository's id is enough
    to load it. An adapter is at the root too. A transformer has its own folder, as in pipelines. Averaged weights (EMA)
    are preferred. The run's configuration, metrics, record of how it was started, and card are included.

    Args:
        weights_dir (`Path`, *optional*):
            The checkpoint to take the weights from. If left out, the run's result, or else its newest checkpoint.

    Raises:
        ValueError: If there are no weights yet.
    """
    places = [run_dir, *reversed(list_checkpoints(run_dir))] if weights_dir is None else [weights_dir]
    weights = next(filter(None, (_weight_files(place, run_dir) for place in places)), None)
    if weights is None:
        raise ValueError(f"{places[0]}: there is no trained model to push, neither a result nor a checkpoint.")
    texts = [run_dir / name for name in (CONFIG_FILE, METRICS_FILE, RUN_FILE, CARD_FILE)]
    return weights | {path.name: path for path in texts if path.is_file()}


def _weight_files(place: Path, run_dir: Path) -> dict[str, Path] | None:
    """Weights in the run's `best`, or in one result or checkpoint folder."""
    for root in (run_dir / BEST_FOLDER, place / MODEL_FOLDER):
        if root.is_dir():
            return _visible_files(root)
    for folder in (place / AVERAGE_FOLDER, place):
        # A run on a pipeline with two experts has trained one or both.
        transformers = [folder / name for name in EXPERT_FOLDERS.values() if (folder / name).is_dir()]
        found = {f"{each.name}/{name}": path for each in transformers for name, path in _visible_files(each).items()}
        found = found or {name: folder / name for name in LORA_FILES.values() if (folder / name).is_file()}
        if found:
            return found
    return None


def _visible_files(folder: Path) -> dict[str, Path]:
    """All files below a folder by their path in it, without hidden ones except the Hub's evaluation results."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hidden = {
        name for name in files if any(part.startswith(".") for part in name.parts if part != EVAL_RESULTS_FOLDER)
    }
    return {name.as_posix(): path for name, path in files.items() if name not in hidden}


def stage(files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """
    Copy or link files into the layout of their repository, so that the originals may change during the upload.

    Weight files are hard-linked, which costs neither time nor space: a run replaces them but never changes them in
    place. Other files are copied, and so are weights on file systems without hard links.
    """
    staged = {}
    for path_in_repo, source in files.items():
        target = staged[path_in_repo] = folder / path_in_repo
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors":
            try:
                os.link(source, target)
                continue
            except OSError:
                logger.info("%s cannot be hard-linked and is copied for its upload.", source)
        shutil.copyfile(source, target)
    return staged


def add_card(staged: Mapping[str, Path], folder: Path, repo_id: str, api: HfApi) -> list[str]:
    """Add card, plot and evaluation to a staged repository, unless it has a card that a person wrote. Returns their names."""
    if model_kind(staged) is None or not may_replace_card(staged.get(CARD_FILE)):
        return []
    return write_model_card(staged, folder, repo_id=repo_id, api=api)
