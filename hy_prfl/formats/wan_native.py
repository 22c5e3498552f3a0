"""
Wan's native format, used by Wan's and upstream's code and by ComfyUI: names of weights, and configuration.

Only native names are listed here. diffusers' names come from diffusers' own converter, so that both directions of a
conversion use the same names.
"""

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from .weight_files import StateDict, read_json


BLOCK_LINEARS = (
    *(f"{attention}.{layer}" for attention in ("self_attn", "cross_attn") for layer in ("q", "k", "v", "o")),
    "cross_attn.k_img",
    "cross_attn.v_img",
    "ffn.0",
    "ffn.2",
)
BLOCK_NORMS = (
    *(f"{attention}.{layer}" for attention in ("self_attn", "cross_attn") for layer in ("norm_q", "norm_k")),
    "cross_attn.norm_k_img",
    "norm3",
)
LINEARS = (
    "patch_embedding",
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "head.head",
)
NORMS = ("img_emb.proj.0", "img_emb.proj.4")

# Missing in diffusers' converter. Only models that take a first and a last frame have this weight.
POSITIONS = {"condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos"}

# Prefix of the transformer's weights in checkpoints of a whole pipeline.
CHECKPOINT_PREFIX = "model.diffusion_model."

MODEL_TYPES = ("t2v", "i2v", "ti2v", "flf2v")

# Entries of a native config.json with the same value in every Wan model. Another value means another architecture.
FIXED_ENTRIES: dict[str, Any] = {"window_size": [-1, -1], "qk_norm": True, "cross_attn_norm": True}
FIXED_CONFIG = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True}
# Entries that do not describe the model. Upstream's trainer writes all of them.
IGNORED_ENTRIES = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "text_len")

# Native name of an entry -> name in `WanTransformer3DModel.config`; compared with the weights where possible.
ENTRIES = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "patch_size": "patch_size",
}

# Latent channels of Wan 2.2's 5B model, the only one of its type.
TI2V_CHANNELS = 48


def key_names(blocks: Iterable[int]) -> dict[str, str]:
    """
    Keys of `WanTransformer3DModel` -> native keys, for the weights outside of the blocks and in `blocks`.

    The names are for all kinds of models; no single model has all of these keys.
    """
    return dict(_key_names(tuple(sorted(set(blocks)))))


@lru_cache(maxsize=8)
def _key_names(blocks: tuple[int, ...]) -> dict[str, str]:
    layers = [*LINEARS, *NORMS, *(f"blocks.{i}.{name}" for i in blocks for name in (*BLOCK_LINEARS, *BLOCK_NORMS))]
    native = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    native += ["head.modulation", *(f"blocks.{i}.modulation" for i in blocks)]
    # The converter only renames, so strings can stand in for tensors.
    return convert_wan_transformer_to_diffusers({key: key for key in native}) | POSITIONS


def layer_names(blocks: Iterable[int]) -> dict[str, str]:
    """Layers of `WanTransformer3DModel` that an adapter can target -> their native names."""
    blocks = set(blocks)
    layers = {*LINEARS, *(f"blocks.{i}.{name}" for i in blocks for name in BLOCK_LINEARS)}
    pairs = [(name.removesuffix(".weight"), key.removesuffix(".weight")) for name, key in key_names(blocks).items()]
    return {name: layer for name, layer in pairs if layer in layers}


def strip_prefix(weights: Mapping[str, Any]) -> StateDict:
    """Native weights without the prefix of whole checkpoints, if all of them have it."""
    if all(key.startswith(CHECKPOINT_PREFIX) for key in weights):
        return {key.removeprefix(CHECKPOINT_PREFIX): tensor for key, tensor in weights.items()}
    return dict(weights)


def read_native_config(path: str | Path) -> dict[str, Any]:
    """
    Read and check the `config.json` of a native Wan model, given as the file or its folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If an entry is missing, unknown, or describes another architecture.
    """
    path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    config = read_json(path)
    if config.get("_class_name") == "WanTransformer3DModel":
        raise ValueError(f"{path}: this is the configuration of a diffusers model, not of a native one.")
    for name in ("model_type", "dim", "num_heads", "num_layers", "out_dim", "eps"):
        if name not in config:
            raise ValueError(f"{path}: `{name}` is missing.")
    known = {"model_type", "dim", "num_heads", "num_layers", "eps", *ENTRIES, *FIXED_ENTRIES, *IGNORED_ENTRIES}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"{path}: unknown entries {', '.join(unknown)}: not a Wan 2.1 or 2.2 video model.")
    if config["model_type"] not in MODEL_TYPES:
        raise ValueError(
            f"{path}: `model_type` must be one of {', '.join(MODEL_TYPES)}, got {config['model_type']!r}."
        )
    for name, value in FIXED_ENTRIES.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: `{name}` must be {value}, got {config[name]}.")
    if config["dim"] % config["num_heads"]:
        raise ValueError(f"{path}: `num_heads` {config['num_heads']} does not divide `dim` {config['dim']}.")
    return config


def transformer_config(native_config: Mapping[str, Any], weights: StateDict, *, source: str) -> dict[str, Any]:
    """
    diffusers' configuration, inferred from native weights and, where they are not enough, from `native_config`.

    Wan's config.json is not enough either: it lacks `image_dim` and `added_kv_proj_dim`, for example. `num_layers` is
    the number of blocks in the weights.

    Raises:
        ValueError: If a weight that determines a size is missing, or weights and `native_config` disagree.
    """
    for key, ndim in (
        ("patch_embedding.weight", 5),
        ("text_embedding.0.weight", 2),
        ("time_embedding.0.weight", 2),
        ("blocks.0.ffn.0.weight", 2),
    ):
        if key not in weights:
            raise ValueError(f"{source}: the weight '{key}' is missing: not a Wan transformer in its native format.")
        if weights[key].ndim != ndim:
            raise ValueError(f"{source}: '{key}' must have {ndim} dimensions, got {tuple(weights[key].shape)}.")
    dim, in_channels, *patch_size = weights["patch_embedding.weight"].shape
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    image_key, position_key = "img_emb.proj.0.weight", "img_emb.emb_pos"
    config = {
        "patch_size": tuple(patch_size),
        "num_attention_heads": native_config["num_heads"],
        "attention_head_dim": dim // native_config["num_heads"],
        "in_channels": in_channels,
        "out_channels": native_config["out_dim"],
        "text_dim": weights["text_embedding.0.weight"].shape[1],
        "freq_dim": weights["time_embedding.0.weight"].shape[1],
        "ffn_dim": weights["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": len(blocks),
        **FIXED_CONFIG,
        "eps": native_config["eps"],
        "image_dim": weights[image_key].shape[0] if image_key in weights else None,
        "added_kv_proj_dim": dim if "blocks.0.cross_attn.k_img.weight" in weights else None,
        "pos_embed_seq_len": weights[position_key].shape[1] if position_key in weights else None,
    }
    sizes = {
        native_name: (native_config.get(native_name, config[name]), config[name])
        for native_name, name in ENTRIES.items()
    }
    sizes["dim"] = native_config["dim"], dim
    if "head.head.weight" in weights:
        sizes["out_dim"] = native_config["out_dim"], weights["head.head.weight"].shape[0] // math.prod(patch_size)
    for native_name, (expected, found) in sizes.items():
        if (tuple(expected) if isinstance(expected, list) else expected) != found:
            raise ValueError(f"{source}: config.json says `{native_name}` {expected}, the weights have {found}.")
    return config


def native_config(config: Mapping[str, Any], *, text_len: int = 512, source: str) -> dict[str, Any]:
    """
    The `config.json` that Wan's own code reads, from a diffusers configuration.

    Args:
        config (`Mapping`):
            Configuration of a `WanTransformer3DModel`, or of a reward model made from one.
        text_len (`int`, defaults to 512):
            Tokens that native code pads a prompt to. It is not in diffusers' files; every Wan model has 512.

    Raises:
        ValueError: If an entry has no native counterpart. The message names it.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    image_to_video = config["image_dim"] is not None
    expected = {**FIXED_CONFIG, "added_kv_proj_dim": dim if image_to_video else None}
    for name, value in expected.items():
        if config[name] != value:
            raise ValueError(f"{source}: `{name}` must be {value} in Wan's native format, got {config[name]}.")
    if config["pos_embed_seq_len"] is not None:
        model_type = "flf2v"
    elif image_to_video or config["in_channels"] > config["out_channels"]:
        model_type = "i2v"
    else:
        model_type = "ti2v" if config["in_channels"] == TI2V_CHANNELS else "t2v"
    return {
        "_class_name": "WanModel",
        "model_type": model_type,
        "text_len": text_len,
        "dim": dim,
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "eps": config["eps"],
        **{name: config[entry] for name, entry in ENTRIES.items()},
        **FIXED_ENTRIES,
    }
