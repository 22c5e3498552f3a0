"""What a LoRA file says about itself in its header, which any safetensors reader shows."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from ..version import __version__
from .weight_files import read_header


LoraFormat = Literal["diffusers", "comfyui", "kohya", "upstream"]

PREFIX = "hy_prfl."

# Entries that are written anew for each format; a conversion keeps all others.
DERIVED = ("format", LORA_ADAPTER_METADATA_KEY, *(f"{PREFIX}{name}" for name in ("format", "rank", "alpha")))


def lora_metadata(
    *,
    base_model: str,
    step: int,
    reward_model: str | None = None,
    run: str | None = None,
    config: Mapping[str, Any] | None = None,
    expert: str | None = None,
) -> dict[str, str]:
    """
    The origin of a LoRA, as entries for the header of its file; conversions keep it.

    Args:
        base_model (`str`):
            The pipeline that it was trained on, and has to be loaded into.
        step (`int`):
            Updates so far.
        reward_model (`str`, *optional*):
            The reward model that it climbed.
        run (`str`, *optional*):
            Name of the run.
        config (`Mapping[str, Any]`, *optional*):
            The run's resolved options, of which a hash is kept: equal hashes, equal recipe.
        expert (`str`, *optional*):
            `high_noise` or `low_noise`, for a pipeline of two experts.
    """
    entries: dict[str, str | None] = {
        "version": __version__,
        "base_model": base_model,
        "reward_model": reward_model,
        "step": str(step),
        "run": run,
        "expert": expert,
    }
    if config is not None:
        recipe = json.dumps(dict(config), sort_keys=True, default=str)
        entries["config_hash"] = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    return {f"{PREFIX}{name}": value for name, value in entries.items() if value is not None}


def read_lora_metadata(path: str | Path) -> dict[str, str]:
    """
    The entries of [`lora_metadata`], with `rank`, `alpha` and `format`, of a LoRA file of this project.

    Where layers differ, `rank` and `alpha` list all values, such as `"8,16"`. A file of another program gives `{}`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file.
    """
    header = read_header(path)
    return {name.removeprefix(PREFIX): value for name, value in header.items() if name.startswith(PREFIX)}


def lora_header(lora_config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    """
    Header of a LoRA file in diffusers' format.

    Args:
        lora_config (`Mapping[str, Any]`):
            peft's configuration, `LoraConfig.to_dict()`. diffusers rebuilds the adapter from it; without it, alpha
            would be taken for the rank.
        metadata (`Mapping[str, str]`):
            See [`lora_metadata`].
    """
    entries = {f"transformer.{name}": value for name, value in lora_config.items()}
    ranks = [lora_config["r"], *lora_config["rank_pattern"].values()]
    alphas = [lora_config["lora_alpha"], *lora_config["alpha_pattern"].values()]
    return {
        "format": "pt",
        **metadata,
        **describe_lora("diffusers", ranks, alphas),
        # peft keeps the targets as a set.
        LORA_ADAPTER_METADATA_KEY: json.dumps(entries, default=sorted, sort_keys=True),
    }


def describe_lora(lora_format: LoraFormat, ranks: Iterable[int], alphas: Iterable[float]) -> dict[str, str]:
    """Entries for the format of a file and the ranks and alphas of its layers."""
    rank, alpha = (",".join(f"{value:g}" for value in sorted(set(values))) for values in (ranks, alphas))
    return {f"{PREFIX}format": lora_format, f"{PREFIX}rank": rank, f"{PREFIX}alpha": alpha}
