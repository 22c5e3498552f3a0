"""Transformers that replace those of a pipeline."""

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from ..formats.layout import EXPERT_FOLDERS, ExpertName
from ..formats.sources import reading
from ..formats.weight_files import check_finite, read_json


# Options of transformers, one for each expert; a pipeline of one transformer has the first only.
TRANSFORMER_OPTIONS: dict[ExpertName, str] = {"high_noise": "transformer_path", "low_noise": "transformer_2_path"}
# Configuration values that a transformer must share with the one that it replaces.
INTERFACE = ("patch_size", "in_channels", "out_channels", "text_dim", "image_dim")


def _check_is_transformer(path: str, option: str) -> None:
    """Refuse a folder that holds no transformer in diffusers' format, before diffusers tries to read one."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / "model_index.json").is_file():
        raise ValueError(f"`{option}` '{path}' is a whole pipeline. Give its transformer, '{folder / 'transformer'}'.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"`{option}`: there is no config.json in '{path}'.")
    if read_json(folder / "config.json").get("_class_name") != WanTransformer3DModel.__name__:
        raise ValueError(
            f"`{option}` '{path}' is not a transformer in diffusers' format. `hy-prfl convert --transformer {path}` "
            "converts Wan's native files."
        )


def load_tuned_transformer(
    transformer_path: str,
    pretrained_model_name_or_path: str,
    expert: ExpertName,
    *,
    revision: str | None,
    dtype: torch.dtype,
) -> WanTransformer3DModel:
    """
    Load a transformer in diffusers' format that replaces one of a pipeline.

    Args:
        expert (`str`):
            The expert whose transformer it replaces.

    Raises:
        FileNotFoundError: If there is no transformer in the folder.
        ValueError: If the folder holds something else, or the transformer does not fit the pipeline, or a weight is missing,
            left over or not finite.
    """
    option = TRANSFORMER_OPTIONS[expert]
    expected = WanTransformer3DModel.load_config(
        pretrained_model_name_or_path, subfolder=EXPERT_FOLDERS[expert], revision=revision
    )
    _check_is_transformer(transformer_path, option)
    with reading(option, transformer_path):
        transformer, info = WanTransformer3DModel.from_pretrained(
            transformer_path, dtype=dtype, output_loading_info=True
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            keys = ", ".join(str(key) for key in list(info[problem])[:5])
            raise ValueError(f"`{option}` '{transformer_path}': {len(info[problem])} {problem}, such as {keys}.")
    check_finite(transformer.named_parameters(), source=f"`{option}` '{transformer_path}'")
    different = [
        f"`{name}` {transformer.config[name]} against {expected[name]}"
        for name in INTERFACE
        if name in expected and _plain(transformer.config[name]) != _plain(expected[name])
    ]
    if different:
        raise ValueError(
            f"`{option}` '{transformer_path}' does not fit the pipeline '{pretrained_model_name_or_path}': "
            f"{', '.join(different)}."
        )
    return transformer


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
