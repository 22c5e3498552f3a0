"""
Writes LoRAs in the formats of diffusers, ComfyUI, kohya and upstream.

Weights, ranks and alphas are copied exactly, except that upstream's format stores no alpha. Content that a format
cannot hold is an error.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from .lora import FILE_NAMES, UPSTREAM_FILES, Adapter, LoraLayer
from .lora_metadata import LoraFormat, describe_lora, lora_header
from .wan_native import key_names, layer_names
from .weight_files import StateDict, new_folder


# Format -> prefix of its keys, and whether names of layers have underscores instead of dots.
PREFIXES: dict[str, tuple[str, bool]] = {
    "diffusers": ("transformer.", False),
    "comfyui": ("diffusion_model.", False),
    "kohya": ("lora_unet_", True),
}

# Layers, by diffusers' names, that upstream's loader cannot apply.
NOT_IN_UPSTREAM = re.compile(r"\.add_[kv]_proj$|^patch_embedding$")


def save_adapters(adapters: Sequence[Adapter], output_dir: str | Path, lora_format: LoraFormat) -> list[str]:
    """
    Write a LoRA, or one for each expert, to a new folder: one file for each LoRA, or upstream's three files.

    Upstream's files hold no alpha: `up` is multiplied by `alpha / rank` instead, and all weights become float32, as in
    upstream's own files.

    Returns:
        Names of the files.

    Raises:
        ValueError: If the format cannot hold the adapters, or `output_dir` is not an empty folder.
    """
    files = {name: content for adapter in adapters for name, content in _files_of(adapter, lora_format).items()}
    with new_folder(output_dir) as folder:
        for name, (weights, header) in files.items():
            save_file(weights, folder / name, metadata=header)
    return list(files)


def _files_of(adapter: Adapter, lora_format: LoraFormat) -> dict[str, tuple[StateDict, dict[str, str]]]:
    """Tensors and header of each file of an adapter, by its name."""
    if lora_format != "diffusers" and any(layer.magnitude is not None for layer in adapter.layers.values()):
        raise ValueError(
            f"This LoRA is a DoRA of peft, which the format of {lora_format} cannot hold. `generate --lora_path` and "
            "diffusers read it as it is."
        )
    if lora_format == "diffusers":
        adapter = _with_biases(adapter)
    if adapter.differences and lora_format != "comfyui":
        keys = [key for name in adapter.differences for key in adapter.keys.get(name, [name])]
        shown = ", ".join(f"'{key}'" for key in keys[:5]) + ", ..." * (len(keys) > 5)
        raise ValueError(
            f"The format of {lora_format} has no place for differences of whole weights and biases ({len(keys)}): {shown}. "
            "`generate --lora_path` applies such a file as it is, and `--output_format comfyui` keeps it."
        )
    if lora_format == "upstream":
        if adapter.expert == "low_noise":
            raise ValueError(
                "upstream's files are for one transformer; a LoRA of the low-noise expert has no name there."
            )
        _check_upstream_applies(adapter)
        adapter = _fold_alpha(adapter)
        files = {
            name: _state_dict(adapter, lora_format, prefix, underscores=prefix == "lora_")
            for name, prefix in UPSTREAM_FILES.items()
        }
    else:
        prefix, underscores = PREFIXES[lora_format]
        weights = _state_dict(adapter, lora_format, prefix, underscores=underscores)
        files = {FILE_NAMES[lora_format][adapter.expert]: weights}
    if lora_format == "diffusers":
        header = lora_header(lora_config(adapter).to_dict(), adapter.metadata)
    else:
        layers = adapter.layers.values()
        described = describe_lora(lora_format, [layer.rank for layer in layers], [layer.alpha for layer in layers])
        header = {"format": "pt", **adapter.metadata, **described}
    return {name: (weights, header) for name, weights in files.items()}


def _check_upstream_applies(adapter: Adapter) -> None:
    """Refuse layers that make upstream's `load_lora_for_model` crash."""
    found = [name for name in adapter.layers if NOT_IN_UPSTREAM.search(name)]
    if found:
        raise ValueError(
            f"upstream's loader cannot apply a LoRA of {', '.join(found[:5])}{', ...' * (len(found) > 5)}: it looks for "
            "`k_img` and `v_img` within `k` and `v`, and multiplies matrices only, so not `patch_embedding`. Merge the LoRA "
            "instead: `hy-prfl convert --transformer ... --merge_lora ... --output_format native`, for its "
            "`--transformer_path`."
        )


def upstream_use(adapter: Adapter) -> str:
    """Which of upstream's three files goes to which of its flags, and which other settings upstream needs."""
    trained, kohya, other = UPSTREAM_FILES
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    layers = layer_names({int(name.split(".")[1]) for name in adapter.layers if name.startswith("blocks.")})
    targets = sorted({re.sub(r"^blocks\.\d+\.", "", layers[name]) for name in adapter.layers})
    resumed = (
        f"in a folder whose name ends in a step, such as checkpoint-0, with `lora_rank: {ranks[0]}` and `target_modules: "
        f"[{', '.join(targets)}]`"
    )
    if len(ranks) > 1:
        resumed = f"not usable: it has layers of rank {', '.join(map(str, ranks))}, but upstream trains a single rank"
    return (
        f"{kohya} is for `--lora_path` of upstream's inference (`--distill_lora_path` reads the same); {trained} is for "
        f"`model.lora.resume_lora_path` of its trainings: {resumed}; {other} is for ComfyUI, upstream's code does not read it."
    )


def _state_dict(adapter: Adapter, lora_format: LoraFormat, prefix: str, *, underscores: bool) -> StateDict:
    """Weights of the file whose keys start with `prefix`."""
    down, up = ("lora_down", "lora_up") if underscores else ("lora_A", "lora_B")
    targets = [*adapter.layers, *adapter.differences]
    blocks = {int(name.split(".")[1]) for name in targets if name.startswith("blocks.")}
    names = {name: name for name in targets} if lora_format == "diffusers" else layer_names(blocks) | key_names(blocks)
    has_bias = any(layer.bias is not None for layer in adapter.layers.values())
    weights: StateDict = {}
    for name, layer in adapter.layers.items():
        key = f"{prefix}{names[name].replace('.', '_') if underscores else names[name]}"
        weights[f"{key}.{down}.weight"] = layer.down.contiguous()
        weights[f"{key}.{up}.weight"] = layer.up.contiguous()
        if lora_format in ("comfyui", "kohya"):
            single = torch.tensor(layer.alpha, dtype=torch.float32)
            weights[f"{key}.alpha"] = (
                single if single.item() == layer.alpha else torch.tensor(layer.alpha, dtype=torch.float64)
            )
        if layer.magnitude is not None:
            weights[f"{key}.lora_magnitude_vector"] = layer.magnitude
        if lora_format == "diffusers" and has_bias:
            # In peft all layers have a bias, or none.
            weights[f"{key}.lora_B.bias"] = layer.up.new_zeros(len(layer.up)) if layer.bias is None else layer.bias
        elif lora_format == "comfyui" and layer.bias is not None:
            weights[f"{key}.diff_b"] = _scale_exactly(layer.bias, layer.scale, name)
        elif layer.bias is not None:
            raise ValueError(f"'{name}' has a bias on its lora_B, which the format of {lora_format} cannot hold.")
    for name, difference in adapter.differences.items():
        # A modulation is not the parameter of a layer and does not end in `.weight`.
        layer_name, _, parameter = names[name].rpartition(".")
        end = {"weight": f"{layer_name}.diff", "bias": f"{layer_name}.diff_b"}.get(parameter, f"{names[name]}.diff")
        if f"{prefix}{end}" in weights:
            raise ValueError(f"'{layer_name}' has two biases: one on its lora_B, and one that is added to its own.")
        weights[f"{prefix}{end}"] = difference.contiguous()
    return weights


def _with_biases(adapter: Adapter) -> Adapter:
    """The same adapter with its differences of biases moved into the biases of `lora_B`, the form that peft supports."""
    layers, differences = dict(adapter.layers), dict(adapter.differences)
    for name, layer in adapter.layers.items():
        if f"{name}.bias" in differences and layer.bias is None:
            bias = _scale_exactly(differences.pop(f"{name}.bias"), 1 / layer.scale, name)
            layers[name] = dataclasses.replace(layer, bias=bias)
    return dataclasses.replace(adapter, layers=layers, differences=differences)


def _scale_exactly(bias: torch.Tensor, factor: float, source: str) -> torch.Tensor:
    """Scale a bias for the other format: peft scales it like the update, ComfyUI does not. Refuse it if that rounds."""
    scaled = (bias.double() * factor).to(bias.dtype)
    if not torch.equal((scaled.double() / factor).to(bias.dtype).double(), bias.double()):
        raise ValueError(f"{source}: its bias cannot be scaled by {factor:g} and back without rounding.")
    return scaled


def _fold_alpha(adapter: Adapter) -> Adapter:
    """The same adapter in float32 with alpha equal to the rank: readers assume this for a file without alpha."""
    layers = {
        name: LoraLayer(down=layer.down.float(), up=layer.up.float() * layer.scale, alpha=layer.rank, bias=layer.bias)
        for name, layer in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def lora_config(adapter: Adapter) -> LoraConfig:
    """peft's configuration of an adapter: the most common rank and alpha, and patterns for the layers that differ."""
    rank = Counter(layer.rank for layer in adapter.layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in adapter.layers.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: layer.rank for name, layer in adapter.layers.items() if layer.rank != rank},
        alpha_pattern={name: layer.alpha for name, layer in adapter.layers.items() if layer.alpha != alpha},
        target_modules=sorted(adapter.layers),
        lora_bias=any(layer.bias is not None for layer in adapter.layers.values()),
        use_dora=any(layer.magnitude is not None for layer in adapter.layers.values()),
    )
