"""
Reads LoRA files of diffusers, peft, ComfyUI, kohya, DiffSynth, VideoX-Fun and upstream into one form.

A layer adds `alpha / rank * up @ down` to a weight. Programs store the alpha in different places: diffusers in the
header of the file (as peft's configuration), peft in a separate file, ComfyUI and kohya as a tensor for each layer,
upstream nowhere. Without an alpha, all of them use the rank. A file that is not a LoRA of a Wan transformer is an
error that says what it is.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from .layout import LORA_FILES, ExpertName
from .lora_keys import DIFFERENCES, PARTS, LoraKeys, parse_keys
from .lora_metadata import (
    DERIVED,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PREFIX,
    has_unclaimed_config,
    parse_lora_config,
    rank_and_alpha,
    read_lora_config,
)
from .weight_files import StateDict, check_finite, read_header, read_weights


logger = logging.getLogger(__name__)

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

# Entry of kohya's headers. Its loaders do not read it; they use the alphas of the layers.
KOHYA_ALPHA = "ss_network_alpha"

# Types that an alpha may have besides those of floating-point numbers.
WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# Patches of every Wan model; in LoRAs of ComfyUI's trainer the convolution over them is a matrix.
PATCH_SIZE = (1, 2, 2)


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
        magnitude (`torch.Tensor`, *optional*):
            `lora_magnitude_vector` of peft's DoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

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
        differences (`dict[str, torch.Tensor]`):
            Tensors that are added to whole weights, such as those of norms, and to biases, by the names of the
            parameters in `WanTransformer3DModel`.
        metadata (`dict[str, str]`):
            Other entries of the file's header that do not depend on the format.
        format (`str`):
            The format that it was read from.
        keys (`dict[str, list[str]]`):
            Keys in the file of each layer and difference.
    """

    layers: dict[str, LoraLayer]
    differences: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    format: str = "diffusers"
    keys: dict[str, list[str]] = field(default_factory=dict)

    @property
    def expert(self) -> ExpertName:
        """The transformer that it is for, from its header; `high_noise` if the pipeline has only one."""
        return "low_noise" if self.metadata.get(f"{PREFIX}expert") == "low_noise" else "high_noise"

    @property
    def names_expert(self) -> bool:
        """Whether its header says which of two transformers it is for. Files of other programs do not."""
        return f"{PREFIX}expert" in self.metadata


def find_lora_files(path: str | Path) -> list[Path]:
    """
    The files to read LoRAs from: the path itself, or the files of diffusers, upstream or `save_adapters` in a folder.

    There are two files if a pipeline has two experts and each has its own.

    Raises:
        FileNotFoundError: If there is none, or if it is ambiguous which file to read.
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
            f"file, found {len(files)}{': ' * bool(files)}{', '.join(file.name for file in files[:5])}."
        )
    return files


def lora_sources(path: str | Path) -> list[str]:
    """All files that LoRAs at a path are read from, with peft's configuration beside them if there is one."""
    files = find_lora_files(path)
    configs = {file.parent / PEFT_CONFIG for file in files if (file.parent / PEFT_CONFIG).is_file()}
    return [str(file) for file in (*files, *sorted(configs))]


def read_adapters(path: str | Path) -> list[Adapter]:
    """
    Read the LoRA of a file or folder, or the two LoRAs of a pipeline with two experts.

    Raises:
        FileNotFoundError: If there is no such file, or if it is ambiguous which file of the folder to read.
        ValueError: For the reasons in [`read_adapter`], or if two files are for the same expert.
    """
    adapters = [read_adapter(file) for file in find_lora_files(path)]
    if len({adapter.expert for adapter in adapters}) < len(adapters):
        raise ValueError(
            f"{path}: the headers of its two files must name different experts, both have `{PREFIX}expert` "
            f"{adapters[0].metadata.get(f'{PREFIX}expert')!r}; convert them one by one."
        )
    return adapters


def read_adapter(path: str | Path) -> Adapter:
    """
    Read a LoRA file; its format is recognised by its keys.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a LoRA of a Wan transformer. Or if a key is unknown, or its tensor is empty, has no
            counterpart (`lora_A` without `lora_B`), has the wrong shape or is not finite; the message names the key. Or if
            it is unclear which alpha counts.
    """
    header = read_header(path) if Path(path).suffix == ".safetensors" else {}
    weights, config = read_weights(path), read_lora_config(path, header)
    has_alpha = config is not None or any(PARTS["alpha"].search(key) for key in weights)
    if not has_alpha and has_unclaimed_config(path):
        suffix = Path(path).suffix
        raise ValueError(
            f"{path}: it has no alpha, and it is unclear whether it is the file that the {PEFT_CONFIG} beside it belongs "
            f"to. If so, name it {PEFT_WEIGHTS}{suffix}, as peft does; if not, move it to another folder."
        )
    return _build_adapter(weights, header, config, source=str(path))


def parse_adapter(weights: StateDict, header: Mapping[str, str], *, source: str) -> Adapter:
    """Read a LoRA from the tensors and the header of a file; see [`read_adapter`]."""
    return _build_adapter(weights, header, parse_lora_config(header, source=source), source=source)


def _build_adapter(
    weights: StateDict, header: Mapping[str, str], lora_config: Mapping[str, Any] | None, *, source: str
) -> Adapter:
    keys = parse_keys(weights, source=source)
    if LORA_ADAPTER_METADATA_KEY in header and keys.is_native:
        raise ValueError(
            f"{source}: its header has `{LORA_ADAPTER_METADATA_KEY}` but its keys are those of {keys.format}: it is "
            "unclear which alpha counts."
        )
    parts, differences, keys_of = _sort_tensors(weights, keys, source)
    if keys.format == "peft" and lora_config is None and not any("alpha" in found for found in parts.values()):
        logger.warning(
            "%s: there is no alpha in the file and no %s for it; the rank is used as alpha, as diffusers and "
            "ComfyUI do.",
            source,
            PEFT_CONFIG,
        )
    if lora_config is None and KOHYA_ALPHA in header:
        _warn_of_kohyas_alpha(parts, header[KOHYA_ALPHA], source)
    layers = {}
    for name, found in parts.items():
        stem = _stem(keys_of[name][0])
        expected = None if lora_config is None else rank_and_alpha(lora_config, stem.removeprefix(keys.prefix))
        layers[name] = _build_layer(name, found, expected, f"{source}: '{stem}'")
        for bias in (layers[name].bias, differences.get(f"{name}.bias")):
            if bias is not None and bias.shape != layers[name].up.shape[:1]:
                raise ValueError(
                    f"{source}: '{stem}': the bias must be {tuple(layers[name].up.shape[:1])}, got {tuple(bias.shape)}."
                )
    if not layers and not differences:
        raise ValueError(f"{source}: no layer has weights other than 0.")
    if lora_config is not None:
        _check_switches(layers, lora_config, keys_of, source)
    with_magnitude = [name for name, layer in layers.items() if layer.magnitude is not None]
    uses_dora = lora_config is not None and lora_config["use_dora"]
    if (uses_dora or with_magnitude) and len(with_magnitude) < len(layers):
        raise ValueError(
            f"{source}: {len(with_magnitude)} of {len(layers)} layers have a lora_magnitude_vector; with peft's "
            "`use_dora` all of them have one."
        )
    metadata = {name: value for name, value in header.items() if name not in DERIVED}
    return Adapter(layers, differences, metadata, keys.format, keys_of)


def _check_switches(
    layers: Mapping[str, LoraLayer], lora_config: Mapping[str, Any], keys_of: Mapping[str, list[str]], source: str
) -> None:
    """Refuse tensors that peft's configuration says are off: peft would ignore them."""
    for option, part in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        names = [name for name, layer in layers.items() if getattr(layer, part) is not None]
        if names and not lora_config[option]:
            keys = [key for name in names for key in keys_of[name] if PARTS[part].search(key)]
            raise ValueError(
                f"{source}: peft's `{option}` is {lora_config[option]}, but the file has '{keys[0]}' ({len(keys)} such "
                "tensors): it is unclear which counts. Set it to true, or remove these tensors."
            )


def _warn_of_kohyas_alpha(parts: Mapping[str, Mapping[str, torch.Tensor]], header_alpha: str, source: str) -> None:
    ranks = {len(found["down"]) for found in parts.values() if "down" in found and "alpha" not in found}
    if any(header_alpha not in ("None", f"{rank}", f"{rank:.1f}") for rank in ranks):
        logger.warning(
            "%s: the header has `%s` %s, but the file has no alpha for layers of rank %s; there the rank is used as "
            "alpha, as kohya's own loaders and ComfyUI do. If %s was meant, choose the strength accordingly: alpha / rank.",
            source,
            KOHYA_ALPHA,
            header_alpha,
            ", ".join(str(rank) for rank in sorted(ranks)),
            header_alpha,
        )


def _sort_tensors(
    weights: StateDict, keys: LoraKeys, source: str
) -> tuple[dict[str, dict[str, torch.Tensor]], StateDict, dict[str, list[str]]]:
    """
    Parts of each layer, differences by parameter, and the keys of both.

    Differences that are all zeros are left out.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    differences: StateDict = {}
    keys_of: dict[str, list[str]] = {}
    num_zeros = 0
    for key, (target, part) in keys.entries.items():
        tensor = weights[key]
        if tensor.numel() == 0:
            raise ValueError(
                f"{source}: '{key}' is empty: it was saved while its weights were sharded over processes."
            )
        is_number = tensor.is_floating_point() or (part == "alpha" and tensor.dtype in WHOLE_NUMBERS)
        if not is_number:
            raise ValueError(f"{source}: '{key}' must have floating-point numbers, got {tensor.dtype}.")
        # `_build_layer` checks that an alpha is finite.
        if part != "alpha":
            check_finite([(key, tensor)], source=source)
        if part in DIFFERENCES and not tensor.double().any():
            num_zeros += 1
            continue
        found, name = (differences, target) if part in DIFFERENCES else (parts.setdefault(target, {}), part)
        if name in found:
            raise ValueError(f"{source}: '{key}' appears twice, under two names.")
        found[name] = tensor
        keys_of.setdefault(target, []).append(key)
    if num_zeros:
        logger.info("%s: %d differences that are all zeros are left out.", source, num_zeros)
    return parts, differences, keys_of


def _stem(key: str) -> str:
    """The key without its part."""
    return next(key[: match.start()] for pattern in PARTS.values() if (match := pattern.search(key)))


def _build_layer(
    name: str, parts: Mapping[str, torch.Tensor], expected: tuple[int, float] | None, source: str
) -> LoraLayer:
    """
    The adapter of one layer.

    Args:
        expected (`tuple[int, float]`, *optional*):
            Rank and alpha in peft's configuration.
    """
    for part, word in (("down", "lora_A (lora_down)"), ("up", "lora_B (lora_up)")):
        if part not in parts:
            raise ValueError(f"{source} has no {word}, only {', '.join(sorted(parts))}.")
    down, up = parts["down"], parts["up"]
    rank = down.shape[0]
    if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != rank:
        raise ValueError(f"{source}: the ranks of {tuple(down.shape)} (down) and {tuple(up.shape)} (up) do not fit.")
    if name == "patch_embedding" and down.ndim == 2:
        if down.shape[1] % math.prod(PATCH_SIZE):
            raise ValueError(f"{source}: {down.shape[1]} inputs cannot be channels of patches of {PATCH_SIZE}.")
        down, up = down.reshape(rank, -1, *PATCH_SIZE), up.reshape(-1, rank, 1, 1, 1)
    alpha: float = rank
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ValueError(f"{source}: alpha must be one number, got {tuple(parts['alpha'].shape)}.")
        alpha = parts["alpha"].item()
    if expected is not None:
        if "alpha" in parts:
            raise ValueError(f"{source} has an alpha, but so has peft's configuration: it is unclear which counts.")
        if expected[0] != rank:
            raise ValueError(f"{source} has rank {rank}, but peft's configuration says {expected[0]}.")
        alpha = expected[1]
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"{source}: alpha must be a number other than 0, got {alpha}.")
    return LoraLayer(down=down, up=up, alpha=alpha, bias=parts.get("bias"), magnitude=parts.get("magnitude"))
