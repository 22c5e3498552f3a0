"""
LoRA files in the formats of diffusers, ComfyUI, kohya and upstream, read into one form and written from it.

A layer adds `alpha / rank * up @ down` to a weight. Where the formats keep the alpha is the difference that loses it:
diffusers in the header of the file (in peft's words), ComfyUI and kohya as a tensor beside each layer, upstream
nowhere. Conversions carry weights bit for bit, with the rank and the alpha of each layer; whatever is no LoRA, or
would mean something else in the other program, is an error that names it.
"""

import dataclasses
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from .experts import LORA_FILES, ExpertName
from .lora_metadata import DERIVED, PREFIX, LoraFormat, describe_lora, lora_header
from .native import layer_names
from .weight_files import StateDict, new_folder, read_header, read_safetensors


logger = logging.getLogger(__name__)

# The first words of all keys -> format, and whether the name of the layer has underscores for dots.
PREFIXES: dict[str, tuple[LoraFormat, bool]] = {
    "transformer.": ("diffusers", False),
    "diffusion_model.": ("comfyui", False),
    "base_model.model.": ("upstream", False),
    "lora_unet_": ("kohya", True),
    "lora_": ("upstream", True),
}
# Upstream's trainer writes the same weights three times: file -> prefix. The first is the one that it reads itself.
UPSTREAM_FILES = {
    "pytorch_lora_transformers_weights.safetensors": "base_model.model.",
    "pytorch_lora_kohya_weights.safetensors": "lora_",
    "pytorch_lora_diffusers_weights.safetensors": "diffusion_model.",
}
FILE_NAMES: dict[str, dict[ExpertName, str]] = {
    "diffusers": LORA_FILES,
    "comfyui": {"high_noise": "lora_comfyui.safetensors", "low_noise": "lora_comfyui_2.safetensors"},
    "kohya": {"high_noise": "lora_kohya.safetensors", "low_noise": "lora_kohya_2.safetensors"},
}

# Last words of a key -> what the tensor is.
PARTS = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_B.bias": "bias",
    ".diff_b": "diff_b",
    ".diff": "diff",
}
OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a LoRA with a third factor",
}

# Fields of peft's configuration that say nothing about what the saved weights mean, or that are read here.
NEUTRAL_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout",
    "peft_version", "r", "rank_pattern", "revision", "target_modules", "task_type",
}  # fmt: skip
# These start from other base weights than the model's own.
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class LoraLayer:
    """
    The adapter of one layer.

    Args:
        down (`torch.Tensor` of shape `(rank, in_features, ...)`):
            `lora_A` of peft, `lora_down` of kohya.
        up (`torch.Tensor` of shape `(out_features, rank, ...)`):
            `lora_B` of peft, `lora_up` of kohya.
        alpha (`float`):
            The layer's update is scaled by `alpha / rank`.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*):
            Bias of `lora_B`, scaled like the update.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """
    A LoRA of a Wan transformer.

    Args:
        layers (`dict[str, LoraLayer]`):
            By the names of the layers in `WanTransformer3DModel`.
        metadata (`dict[str, str]`):
            What else the header of the file says, without what depends on the format.
        format (`str`):
            The format that it was read from.
    """

    layers: dict[str, LoraLayer]
    metadata: dict[str, str] = field(default_factory=dict)
    format: LoraFormat = "diffusers"

    @property
    def expert(self) -> ExpertName:
        """The transformer that it is for, as its header tells; `high_noise` if the pipeline has only one."""
        return "low_noise" if self.metadata.get(f"{PREFIX}expert") == "low_noise" else "high_noise"


def find_lora_files(path: str | Path) -> list[Path]:
    """
    The files that LoRAs are read from: the path itself, or what diffusers, upstream or `save_adapters` wrote to a folder.

    Two files, if there is one for each expert of a pipeline of two.

    Raises:
        FileNotFoundError: If there is none, or it is unclear which file counts.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    for names in (LORA_FILES.values(), *([name] for name in UPSTREAM_FILES)):
        found = [path / name for name in names if (path / name).is_file()]
        if found:
            return found
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1 and [file.name for file in files] not in (
        list(names.values()) for names in FILE_NAMES.values()
    ):
        raise FileNotFoundError(
            f"{path}: expected {LORA_FILES['high_noise']}, upstream's {next(iter(UPSTREAM_FILES))}, or one safetensors "
            f"file, found {len(files)}."
        )
    return files


def read_adapters(path: str | Path) -> list[Adapter]:
    """
    Read the LoRA of a file or folder, or the two of a pipeline of two experts.

    Raises:
        FileNotFoundError: If there is no such file, or a folder without a clear one.
        ValueError: As [`read_adapter`], and if two files are for the same expert.
    """
    adapters = [read_adapter(file) for file in find_lora_files(path)]
    if len({adapter.expert for adapter in adapters}) < len(adapters):
        raise ValueError(
            f"{path}: the headers of its two files must tell two experts, both tell `{PREFIX}expert` "
            f"{adapters[0].metadata.get(f'{PREFIX}expert')!r}; convert them one by one."
        )
    return adapters


def read_adapter(path: str | Path) -> Adapter:
    """
    Read a LoRA file in any of the formats, which its keys tell.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: Naming the key that is unknown, empty, without its other half or of another shape, and why.
    """
    return parse_adapter(read_safetensors(path), read_header(path), source=str(path))


def parse_adapter(weights: StateDict, header: Mapping[str, str], *, source: str) -> Adapter:
    """Read a LoRA from the tensors and the header of a file; see [`read_adapter`]."""
    prefix = next((prefix for prefix in PREFIXES if next(iter(weights), "").startswith(prefix)), None)
    if prefix is None:
        raise ValueError(
            f"{source}: the keys must start with one of {', '.join(PREFIXES)}, got {next(iter(weights), None)!r}."
        )
    lora_format, _ = PREFIXES[prefix]
    blocks = {int(index) for key in weights for index in re.findall(r"(?<![a-z])blocks[._](\d+)", key)}
    names = {written: name for name, written in _written_names(prefix, blocks).items()}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    num_zeros = 0
    for key, tensor in weights.items():
        layer, part = _split_key(key, prefix, source)
        if tensor.numel() == 0:
            raise ValueError(f"{source}: '{key}' is empty: it was saved while its weights were split over processes.")
        if part in ("diff", "diff_b") and not tensor.any():
            num_zeros += 1
            continue
        if part == "diff":
            raise ValueError(f"{source}: '{key}' is a difference of whole weights, which is not a LoRA.")
        if layer not in names:
            raise ValueError(f"{source}: '{key}': there is no layer '{layer}' in a Wan transformer.")
        if part in parts.setdefault(layer, {}):
            raise ValueError(f"{source}: '{key}' is there twice, under two names.")
        parts[layer][part] = tensor
    if num_zeros:
        logger.info("%s: %d differences that are all zeros are left out.", source, num_zeros)
    lora_config = _read_lora_config(header, lora_format, source)
    layers = {
        names[layer]: _build_layer(names[layer], found, lora_config, f"{source}: '{prefix}{layer}'")
        for layer, found in parts.items()
    }
    if not layers:
        raise ValueError(f"{source}: no layer has weights other than 0.")
    metadata = {name: value for name, value in header.items() if name not in DERIVED}
    return Adapter(layers=layers, metadata=metadata, format=lora_format)


def _written_names(prefix: str, blocks: Iterable[int]) -> dict[str, str]:
    """Layers of `WanTransformer3DModel` -> how they are written behind this prefix."""
    lora_format, underscores = PREFIXES[prefix]
    names = layer_names(blocks)
    if lora_format == "diffusers":
        return {name: name for name in names}
    return {name: native.replace(".", "_") if underscores else native for name, native in names.items()}


def _split_key(key: str, prefix: str, source: str) -> tuple[str, str]:
    """Layer and part that a key tells."""
    for name, method in OTHER_METHODS.items():
        if name in key:
            raise ValueError(f"{source}: '{key}' belongs to {method}, which is not a plain LoRA.")
    suffix = next((suffix for suffix in PARTS if key.endswith(suffix)), None)
    if suffix is None or not key.startswith(prefix):
        raise ValueError(f"{source}: unknown key '{key}' in a LoRA whose keys start with '{prefix}'.")
    return key.removeprefix(prefix).removesuffix(suffix), PARTS[suffix]


def _read_lora_config(header: Mapping[str, str], lora_format: LoraFormat, source: str) -> dict[str, Any] | None:
    """peft's configuration from the header of a file in diffusers' format, if it has one."""
    if LORA_ADAPTER_METADATA_KEY not in header:
        return None
    if lora_format != "diffusers":
        raise ValueError(
            f"{source}: its header has `{LORA_ADAPTER_METADATA_KEY}` but its keys are those of {lora_format}: it is "
            "unclear which alpha counts."
        )
    try:
        entries = json.loads(header[LORA_ADAPTER_METADATA_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: `{LORA_ADAPTER_METADATA_KEY}` is not valid JSON: {error}") from error
    defaults = LoraConfig().to_dict()
    config = dict(defaults)
    for key, value in entries.items():
        name = key.removeprefix("transformer.")
        # What a newer peft added and is off, changes nothing.
        if name not in NEUTRAL_FIELDS and value and value != defaults.get(name):
            raise ValueError(
                f"{source}: peft's metadata has `{key}` = {value!r}: not a plain LoRA of the transformer."
            )
        config[name] = value
    if str(config.get("init_lora_weights")).startswith(CHANGED_BASE):
        raise ValueError(
            f"{source}: `init_lora_weights` is {config['init_lora_weights']!r}: it belongs to a changed base model."
        )
    return config


def _build_layer(
    name: str, parts: Mapping[str, torch.Tensor], lora_config: Mapping[str, Any] | None, source: str
) -> LoraLayer:
    for part, word in (("down", "lora_A (lora_down)"), ("up", "lora_B (lora_up)")):
        if part not in parts:
            raise ValueError(f"{source} has no {word}, only {', '.join(sorted(parts))}.")
    down, up = parts["down"], parts["up"]
    rank = down.shape[0]
    if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != rank:
        raise ValueError(f"{source}: the ranks of {tuple(down.shape)} (down) and {tuple(up.shape)} (up) do not fit.")
    alpha: float = rank
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ValueError(f"{source}: alpha must be one number, got {tuple(parts['alpha'].shape)}.")
        alpha = parts["alpha"].item()
    if lora_config is not None:
        if "alpha" in parts:
            raise ValueError(f"{source} has an alpha, but so has the header: it is unclear which counts.")
        told = _of_layer(lora_config, "r", "rank_pattern", name)
        if told != rank:
            raise ValueError(f"{source} has rank {rank}, but the header says {told}.")
        alpha = _of_layer(lora_config, "lora_alpha", "alpha_pattern", name)
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"{source}: alpha must be a number other than 0, got {alpha}.")
    layer = LoraLayer(down=down, up=up, alpha=alpha, bias=parts.get("bias"))
    if "diff_b" in parts:
        layer = dataclasses.replace(layer, bias=_scale_exactly(parts["diff_b"], 1 / layer.scale, source))
    if layer.bias is not None and layer.bias.shape != up.shape[:1]:
        raise ValueError(f"{source}: the bias must be {tuple(up.shape[:1])}, got {tuple(layer.bias.shape)}.")
    return layer


def _of_layer(lora_config: Mapping[str, Any], name: str, pattern: str, layer: str) -> Any:
    """Rank or alpha of a layer, where peft's patterns win over the value for all."""
    patterns = lora_config[pattern] or {}
    return patterns.get(get_pattern_key(patterns, layer), lora_config[name])


def _scale_exactly(bias: torch.Tensor, factor: float, source: str) -> torch.Tensor:
    """peft scales the bias like the update, ComfyUI does not; a conversion must be able to go back."""
    scaled = bias * factor
    if not torch.equal(scaled / factor, bias):
        raise ValueError(f"{source}: its bias cannot be scaled by {factor:g} and back without rounding.")
    return scaled


def save_adapters(adapters: Sequence[Adapter], output_dir: str | Path, lora_format: LoraFormat) -> list[str]:
    """
    Write a LoRA, or one for each expert, to a new folder, each in one file, or for upstream in its three.

    Upstream's files hold no alpha: there `up` is multiplied by `alpha / rank`, and all is float32, as upstream
    writes it.

    Returns:
        Names of the files.

    Raises:
        ValueError: If the format cannot say what the adapters say, or `output_dir` is not an empty folder.
    """
    files = {name: content for adapter in adapters for name, content in _files_of(adapter, lora_format).items()}
    with new_folder(output_dir) as folder:
        for name, (weights, header) in files.items():
            save_file(weights, folder / name, metadata=header)
    return list(files)


def _files_of(adapter: Adapter, lora_format: LoraFormat) -> dict[str, tuple[StateDict, dict[str, str]]]:
    """Tensors and header of each file of an adapter, by its name."""
    if lora_format == "upstream":
        if adapter.expert == "low_noise":
            raise ValueError(
                "upstream's files know one transformer, a LoRA of the low-noise expert has no name there."
            )
        adapter = _fold_alpha(adapter)
        files = {name: _state_dict(adapter, prefix) for name, prefix in UPSTREAM_FILES.items()}
    else:
        prefix = next(prefix for prefix, (written, _) in PREFIXES.items() if written == lora_format)
        files = {FILE_NAMES[lora_format][adapter.expert]: _state_dict(adapter, prefix)}
    if lora_format == "diffusers":
        header = lora_header(_lora_config(adapter).to_dict(), adapter.metadata)
    else:
        layers = adapter.layers.values()
        described = describe_lora(lora_format, [layer.rank for layer in layers], [layer.alpha for layer in layers])
        header = {"format": "pt", **adapter.metadata, **described}
    return {name: (weights, header) for name, weights in files.items()}


def _state_dict(adapter: Adapter, prefix: str) -> StateDict:
    """Weights of the file whose keys start with `prefix`."""
    lora_format, underscores = PREFIXES[prefix]
    down, up = ("lora_down", "lora_up") if underscores else ("lora_A", "lora_B")
    blocks = {int(name.split(".")[1]) for name in adapter.layers if name.startswith("blocks.")}
    names = _written_names(prefix, blocks)
    has_bias = any(layer.bias is not None for layer in adapter.layers.values())
    weights: StateDict = {}
    for name, layer in adapter.layers.items():
        key = f"{prefix}{names[name]}"
        weights[f"{key}.{down}.weight"] = layer.down.contiguous()
        weights[f"{key}.{up}.weight"] = layer.up.contiguous()
        if lora_format in ("comfyui", "kohya"):
            single = torch.tensor(layer.alpha, dtype=torch.float32)
            weights[f"{key}.alpha"] = (
                single if single.item() == layer.alpha else torch.tensor(layer.alpha, dtype=torch.float64)
            )
        if lora_format == "diffusers" and has_bias:
            # peft gives a bias to all layers or to none.
            weights[f"{key}.lora_B.bias"] = layer.up.new_zeros(len(layer.up)) if layer.bias is None else layer.bias
        elif lora_format == "comfyui" and layer.bias is not None:
            weights[f"{key}.diff_b"] = _scale_exactly(layer.bias, layer.scale, name)
        elif layer.bias is not None:
            raise ValueError(f"'{name}' has a bias on its lora_B, which the format of {lora_format} cannot hold.")
    return weights


def _fold_alpha(adapter: Adapter) -> Adapter:
    """The same adapter in float32 with an alpha that is the rank, which is what a file without alpha means."""
    layers = {
        name: LoraLayer(down=layer.down.float(), up=layer.up.float() * layer.scale, alpha=layer.rank, bias=layer.bias)
        for name, layer in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def _lora_config(adapter: Adapter) -> LoraConfig:
    """peft's configuration of an adapter: the usual rank and alpha, and patterns for the layers that differ."""
    rank = Counter(layer.rank for layer in adapter.layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in adapter.layers.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: layer.rank for name, layer in adapter.layers.items() if layer.rank != rank},
        alpha_pattern={name: layer.alpha for name, layer in adapter.layers.items() if layer.alpha != alpha},
        target_modules=sorted(adapter.layers),
        lora_bias=any(layer.bias is not None for layer in adapter.layers.values()),
    )
