"""LoRAs of a pipeline: where their files are, whether they fit, and how they are added."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from ..configs.base import check
from ..configs.inputs import HUB_ID
from ..formats.layout import LORA_FILES, ExpertName
from ..formats.lora import FILE_NAMES, UPSTREAM_FILES, Adapter, read_adapter
from ..formats.lora_loading import check_adapter_fits, load_adapter
from ..formats.lora_metadata import read_lora_metadata
from ..formats.pipeline_info import PipelineInfo
from ..formats.sources import reading
from .tuned_transformers import TRANSFORMER_OPTIONS


logger = logging.getLogger(__name__)

# Options of LoRAs, one for each expert; a pipeline of one transformer has the first only.
LORA_OPTIONS: dict[ExpertName, str] = {"high_noise": "lora_path", "low_noise": "lora_2_path"}
# Name of the adapter of a LoRA that is alone; of several, the names are numbered.
LORA_ADAPTER = "prfl"


def as_list(paths: str | Sequence[str] | None) -> list[str]:
    """Paths as a list, which is empty if there are none."""
    if paths is None:
        return []
    return [paths] if isinstance(paths, str) else list(paths)


def check_options_fit(info: PipelineInfo, options: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if an option is for a second transformer and the pipeline has only one."""
    if info.has_two_experts:
        return
    without = f"{info.source}: model_index.json has no `transformer_2`"
    for name in (TRANSFORMER_OPTIONS["low_noise"], LORA_OPTIONS["low_noise"]):
        check(options.get(name) is None, name, options.get(name), f"left out, {without}")
    for path in as_list(options.get(LORA_OPTIONS["high_noise"])):
        if not Path(path).exists():
            continue
        pair = any({*names.values()} <= {each.name for each in Path(path).glob("*")} for names in FILE_NAMES.values())
        is_of_two = pair or _trained_expert(find_lora_weights(path), "high_noise") is not None
        check(not is_of_two, LORA_OPTIONS["high_noise"], path, f"a LoRA of one transformer, not of a pair: {without}")


def find_lora_weights(lora_path: str, expert: ExpertName = "high_noise") -> str:
    """
    The file that a LoRA is read from, or its Hub id unchanged.

    Args:
        expert (`str`, defaults to `"high_noise"`):
            The expert that the LoRA is for. The folder of a run that trained both has a file for each.

    Raises:
        FileNotFoundError: If there is no such file or folder, or it is unclear which file of a folder to read.
    """
    path, option = Path(lora_path), LORA_OPTIONS[expert]
    if path.is_file():
        return lora_path
    if not path.is_dir():
        if "/" not in lora_path or not HUB_ID.fullmatch(lora_path):
            raise FileNotFoundError(f"`{option}` '{lora_path}': there is no such file or folder.")
        return lora_path
    name = _choose_lora_file([file.name for file in path.glob("*.safetensors")], f"`{option}` '{lora_path}'", expert)
    return str(path / name)


def _choose_lora_file(names: Sequence[str], source: str, expert: ExpertName) -> str:
    """The file to read from a folder or repository: the one with the expert's name, or else the only one."""
    others: set[str] = set()
    for written in FILE_NAMES.values():
        if written[expert] in names:
            return written[expert]
        others |= set(written.values())
    rest = sorted(set(names) - others)
    if expert == "high_noise" and set(UPSTREAM_FILES) <= set(rest):
        # All of these files have the same weights.
        return next(iter(UPSTREAM_FILES))
    if len(rest) != 1:
        shown = f": {', '.join(sorted(names)[:5])}{', ...' * (len(names) > 5)}" if names else ""
        raise FileNotFoundError(
            f"{source}: expected {LORA_FILES[expert]} or one safetensors file, found {len(names)}{shown}. Give "
            "one of the files."
        )
    return rest[0]


def _source(expert: ExpertName, file: str) -> str:
    return f"`{LORA_OPTIONS[expert]}` '{file}'"


def read_lora(lora_path: str, expert: ExpertName) -> tuple[str, Adapter]:
    """Read a LoRA, which is downloaded if it is on the Hub; returns its file too."""
    option, file = LORA_OPTIONS[expert], find_lora_weights(lora_path, expert)
    if not Path(file).is_file():
        file = _download_lora(lora_path, expert)
    trained = _trained_expert(file, expert)
    fits = trained is None or trained == expert
    check(fits, option, file, f"of the {expert} expert, this LoRA is of the {trained}")
    try:
        return file, read_adapter(file)
    except ValueError as error:
        raise ValueError(f"`{option}` {error}") from error


def warn_of_unnamed_experts(loras: Sequence[tuple[str, Adapter]]) -> None:
    """Warn of LoRAs that name no expert, for a pipeline of two experts whose low-noise expert gets no LoRA."""
    for file, adapter in loras:
        if not adapter.names_expert:
            logger.warning(
                "`%s` '%s' does not say which expert it is for, and is added to the high-noise one only. Give one for the "
                "other expert as `%s`.",
                LORA_OPTIONS["high_noise"],
                file,
                LORA_OPTIONS["low_noise"],
            )


def _trained_expert(file: str, expert: ExpertName) -> str | None:
    """The expert that a LoRA given for `expert` was trained for; None if its header does not name one."""
    if Path(file).suffix != ".safetensors":
        return None
    try:
        return read_lora_metadata(file).get("expert")
    except ValueError as error:
        raise ValueError(f"`{LORA_OPTIONS[expert]}` {error}") from error


def _download_lora(repo_id: str, expert: ExpertName) -> str:
    """Download only the LoRA's file from a repository; offline, find it in the cache."""
    option = LORA_OPTIONS[expert]
    source = f"`{option}` '{repo_id}'"
    if constants.HF_HUB_OFFLINE:
        with reading(option, repo_id):
            folder = Path(snapshot_download(repo_id, local_files_only=True))
        names = [file.name for file in folder.glob("*.safetensors")]
        return str(folder / _choose_lora_file(names, source, expert))
    with reading(option, repo_id):
        files = HfApi().list_repo_files(repo_id)
    name = _choose_lora_file([name for name in files if re.fullmatch(r"[^/]*\.safetensors", name)], source, expert)
    with reading(option, repo_id):
        return hf_hub_download(repo_id, name)


def check_lora_fits(
    adapter: Adapter, file: str, expert: ExpertName, path: str, subfolder: str | None, revision: str | None
) -> None:
    """Check a LoRA against the configuration of the transformer that it goes to, before any weights are read."""
    config = WanTransformer3DModel.load_config(path, subfolder=subfolder, revision=revision)
    with init_empty_weights():
        transformer = WanTransformer3DModel.from_config(config)
    check_adapter_fits(adapter, transformer, source=_source(expert, file))


def add_loras(
    transformer: WanTransformer3DModel,
    loras: Sequence[tuple[str, Adapter]],
    strengths: Sequence[float],
    expert: ExpertName,
) -> None:
    """Add LoRAs, each given with its file, to a transformer, and activate all of them."""
    active = {}
    for number, ((file, adapter), strength) in enumerate(zip(loras, strengths, strict=True), 1):
        name = LORA_ADAPTER if len(loras) == 1 else f"{LORA_ADAPTER}_{number}"
        if load_adapter(transformer, adapter, name, scale=strength, source=_source(expert, file)):
            active[name] = strength
    if active:
        transformer.set_adapters(list(active), list(active.values()))
