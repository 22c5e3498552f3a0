"""Metadata of a LoRA file: this package's entries in its header, and peft's configuration in the header or beside it."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ..version import __version__
from .weight_files import read_header, read_json


LoraFormat = Literal["diffusers", "comfyui", "kohya", "upstream"]

PREFIX = "hy_prfl."

# Entries that are written again for each format; a conversion keeps all others.
DERIVED = ("format", LORA_ADAPTER_METADATA_KEY, *(f"{PREFIX}{name}" for name in ("format", "rank", "alpha")))

# Files of peft's `save_pretrained`: the weights (safetensors or bin), and the configuration. Only this holds the alpha.
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model", "adapter_config.json"
# Fields of peft's configuration that do not change the meaning of the saved weights, or that are read here.
NEUTRAL_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout",
    "peft_version", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Initializations that change the base weights.
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "eva")


def lora_metadata(
    *,
    base_model: str,
    step: int,
    base_on_hub: bool | None = None,
    reward_model: str | None = None,
    reward_models: Sequence[str] | None = None,
    run: str | None = None,
    config: Mapping[str, Any] | None = None,
    expert: str | None = None,
    base_quantization: str | None = None,
) -> dict[str, str]:
    """
    The origin of a LoRA, as entries for the header of its file. Conversions keep these entries.

    Args:
        base_model (`str`):
            The pipeline that the LoRA was trained on and must be loaded into.
        step (`int`):
            Updates so far.
        base_on_hub (`bool`, *optional*):
            Whether `base_model` is a repository on the Hub; a name such as `data/wan` may be a repository or a path.
        reward_model (`str`, *optional*), reward_models (`Sequence[str]`, *optional*):
            The reward model, or the reward models, that the LoRA was trained with. Several are stored as a JSON list.
        run (`str`, *optional*):
            Name of the run.
        config (`Mapping[str, Any]`, *optional*):
            The run's resolved options. Only their hash is stored: equal hashes mean equal recipes.
        expert (`str`, *optional*):
            `high_noise` or `low_noise`, for a pipeline of two experts.
        base_quantization (`str`, *optional*):
            `int8`, `float8` or `nf4`, if the base weights were quantized while the adapter was trained.
    """
    entries: dict[str, str | None] = {
        "version": __version__,
        "base_model": base_model,
        "base_on_hub": None if base_on_hub is None else str(base_on_hub).lower(),
        "reward_model": reward_model,
        "reward_models": None if reward_models is None else json.dumps(list(reward_models)),
        "step": str(step),
        "run": run,
        "expert": expert,
        "base_quantization": base_quantization,
    }
    if config is not None:
        recipe = json.dumps(dict(config), sort_keys=True, default=str)
        entries["config_hash"] = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    return {f"{PREFIX}{name}": value for name, value in entries.items() if value is not None}


def read_lora_metadata(path: str | Path) -> dict[str, str]:
    """
    The entries of [`lora_metadata`] and `rank`, `alpha` and `format` of a LoRA file that this package wrote.

    Where layers differ, `rank` and `alpha` list all values, such as `"8,16"`. A file of another program gives `{}`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file.
    """
    header = read_header(path)
    return {name.removeprefix(PREFIX): value for name, value in header.items() if name.startswith(PREFIX)}


def lora_header(lora_config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    """
    Header of a LoRA file in diffusers' format.

    Args:
        lora_config (`Mapping[str, Any]`):
            peft's configuration, `LoraConfig.to_dict()`. diffusers rebuilds the adapter from it. Without it, diffusers
            would use the rank as alpha.
        metadata (`Mapping[str, str]`):
            See [`lora_metadata`].
    """
    targets = lora_config["target_modules"]
    if not isinstance(targets, str):
        targets = _with_image_layers(targets)
    entries = {f"transformer.{name}": value for name, value in {**lora_config, "target_modules": targets}.items()}
    ranks = [lora_config["r"], *lora_config["rank_pattern"].values()]
    alphas = [lora_config["lora_alpha"], *lora_config["alpha_pattern"].values()]
    return {
        "format": "pt",
        **metadata,
        **describe_lora("diffusers", ranks, alphas),
        # peft keeps the targets as a set.
        LORA_ADAPTER_METADATA_KEY: json.dumps(entries, default=sorted, sort_keys=True),
    }


def _with_image_layers(targets: Iterable[str]) -> list[str]:
    """
    Targets, with the image projections added for each key projection of the cross-attention.

    When diffusers loads a LoRA without them into an image-to-video model, it adds zeros for `add_k_proj` and
    `add_v_proj`. peft then warns of layers that its configuration does not name. Other models have no such layers, so
    the names change nothing there.
    """
    targets = sorted(targets)
    if any(name.endswith("add_k_proj") for name in targets) and any(name.endswith("add_v_proj") for name in targets):
        return targets
    # diffusers counts the LoRA's blocks and adds zeros to as many blocks of the model, from the first on.
    blocks = {match.group(1) for name in targets if (match := re.match(r"blocks\.(\d+)\.", name))}
    added = set()
    for name in targets:
        match = re.fullmatch(r"((blocks\.(\d+)\.)?(attn2\.)?)to_k", name)
        if match is not None and (match.group(3) is None or int(match.group(3)) < len(blocks)):
            added |= {f"{match.group(1)}{layer}" for layer in ("add_k_proj", "add_v_proj")}
    return sorted({*targets, *added})


def read_lora_config(path: str | Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    """
    peft's configuration of a LoRA file: from its header, or from the file beside it if peft itself saved the LoRA.

    Raises:
        ValueError: If it is broken, or describes more than a plain LoRA of the model's weights.
    """
    beside = Path(path).with_name(PEFT_CONFIG)
    if LORA_ADAPTER_METADATA_KEY in header:
        return parse_lora_config(header, source=str(path))
    if Path(path).stem == PEFT_WEIGHTS and beside.is_file():
        return _check_lora_config(read_json(beside), source=str(beside))
    return None


def has_unclaimed_config(path: str | Path) -> bool:
    """Whether peft's configuration is in a LoRA's folder, but not the file that peft itself would have saved with it."""
    folder = Path(path).parent
    return (folder / PEFT_CONFIG).is_file() and not any(folder.glob(f"{PEFT_WEIGHTS}.*"))


def parse_lora_config(header: Mapping[str, str], *, source: str) -> dict[str, Any] | None:
    """peft's configuration from the header of a file, if it has one; for errors see [`read_lora_config`]."""
    if LORA_ADAPTER_METADATA_KEY not in header:
        return None
    try:
        entries = json.loads(header[LORA_ADAPTER_METADATA_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: `{LORA_ADAPTER_METADATA_KEY}` is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{source}: `{LORA_ADAPTER_METADATA_KEY}` must be a mapping, got {type(entries).__name__}.")
    return _check_lora_config(entries, source=source)


def _check_lora_config(entries: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    defaults = LoraConfig().to_dict()
    config = dict(defaults)
    # First, because every other field of another method is unknown too.
    for key, value in entries.items():
        if key.removeprefix("transformer.") == "peft_type" and value and value != defaults["peft_type"]:
            raise ValueError(
                f"{source}: `{key}` is {value!r}, which is not a plain LoRA. Merge it into the model with peft and use the "
                "result as `transformer_path`."
            )
    for key, value in entries.items():
        name = key.removeprefix("transformer.")
        # An unknown option of a newer peft does not matter while it is off.
        if name not in NEUTRAL_FIELDS and value and value != defaults.get(name):
            raise ValueError(
                f"{source}: peft's metadata has `{key}` = {value!r}: not a plain LoRA of the transformer."
            )
        config[name] = value
    for number, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config[pattern] or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{source}: peft's `{pattern}` must be a mapping, got {patterns!r}.")
        for name, value in ((number, config[number]), *patterns.items()):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{source}: peft's `{number}` must be a number, got {value!r} for `{name}`.")
        for name in patterns:
            _check_pattern(name, f"{source}: peft's `{pattern}`")
    if str(config.get("init_lora_weights")).startswith(CHANGED_BASE):
        raise ValueError(
            f"{source}: `init_lora_weights` is {config['init_lora_weights']!r}: this LoRA belongs to a base model whose "
            "weights peft changed before training. Convert it to a plain LoRA with peft where it was trained, or merge it."
        )
    return config


def _check_pattern(pattern: str, source: str) -> None:
    try:
        # As peft compiles it.
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{source} must have regular expressions as keys, got {pattern!r}: {error}.") from error


def rank_and_alpha(lora_config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """
    Rank and alpha of a layer in peft's configuration; its update is scaled by `alpha / rank`.

    rsLoRA scales by `alpha / sqrt(rank)`. There the returned alpha is multiplied by `sqrt(rank)`, for the same scale.
    """
    rank, alpha = (
        (lora_config[pattern] or {}).get(get_pattern_key(lora_config[pattern] or {}, layer), lora_config[name])
        for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    return rank, alpha * math.sqrt(rank) if lora_config["use_rslora"] else alpha


def describe_lora(lora_format: LoraFormat, ranks: Iterable[int], alphas: Iterable[float]) -> dict[str, str]:
    """Entries for the format of a file and the ranks and alphas of its layers."""
    rank, alpha = (",".join(f"{value:g}" for value in sorted(set(values))) for values in (ranks, alphas))
    return {f"{PREFIX}format": lora_format, f"{PREFIX}rank": rank, f"{PREFIX}alpha": alpha}
