"""
Reads checkpoints in the format of Wan's and upstream's own code and turns them into diffusers models.

Nothing is guessed and nothing is skipped: a key, a shape or a configuration entry that is not understood is an error
that names it.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .reward_model import WanRewardModel


ModelT = TypeVar("ModelT", bound=ModelMixin)

StateDict = dict[str, torch.Tensor]

MODEL_TYPES = ("t2v", "i2v", "ti2v", "flf2v")

# Entries of a native config.json that only say what every Wan model is; another value is another architecture.
FIXED_ENTRIES: dict[str, Any] = {"window_size": [-1, -1], "qk_norm": True, "cross_attn_norm": True}
IGNORED_ENTRIES = ("_class_name", "_diffusers_version", "text_len")

# Native name of an entry -> name in `WanTransformer3DModel.config`; checked against the weights where they tell.
ENTRIES = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "patch_size": "patch_size",
}

MLP_NAMES = {"fc1": "head.linear_1", "fc2": "head.linear_2", "fc3": "head.linear_3"}


def convert_transformer(folder: str | Path) -> WanTransformer3DModel:
    """
    Read a generator in Wan's native format: a folder with `config.json` and safetensors, one file or shards.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: Naming the key or entry that is missing, unknown or of another shape.
    """
    native_config, weights = read_native_config(folder), read_weights(folder)
    config = transformer_config(native_config, weights)
    if native_config["num_layers"] != config["num_layers"]:
        raise ValueError(
            f"{folder}: config.json counts {native_config['num_layers']} blocks (`num_layers`), the weights have "
            f"{config['num_layers']}. Parts of a reward model go to `--reward_transformer`."
        )
    return build_model(WanTransformer3DModel, config, rename_transformer_keys(weights), source=str(folder))


def convert_reward_model(
    reward_transformer: str | Path,
    mlp: str | Path,
    query_attention: str | Path,
    *,
    num_query_heads: int = 8,
    query_residual: bool = True,
    task: str = "motion_quality",
) -> WanRewardModel:
    """
    Read upstream's reward checkpoint, which comes in three parts, as one model.

    Args:
        reward_transformer (`str` or `Path`):
            Folder with the first blocks of a native Wan transformer. Its config.json counts the blocks of the
            original model; how many are left is read from the weights.
        mlp (`str` or `Path`):
            `mlp_step_N.ckpt`.
        query_attention (`str` or `Path`):
            `query_attention_step_N.ckpt`.
        num_query_heads (`int`, defaults to 8):
            Heads of the query attention; no file holds it, upstream's code always has 8.
        query_residual (`bool`, defaults to `True`):
            Whether the query is added to the pooled vector; upstream's code does.
        task (`str`, defaults to `"motion_quality"`):
            The label that the model was trained on.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: Naming the key or entry that is missing, unknown or of another shape.
    """
    native_config, weights = read_native_config(reward_transformer), read_weights(reward_transformer)
    config = transformer_config(native_config, weights)
    if config["num_layers"] > native_config["num_layers"]:
        raise ValueError(
            f"{reward_transformer}: the weights have {config['num_layers']} blocks, more than the "
            f"{native_config['num_layers']} that config.json counts (`num_layers`)."
        )
    mlp_weights = rename_mlp_keys(read_checkpoint(mlp), source=str(mlp))
    config |= {
        "base_num_layers": native_config["num_layers"],
        "pooling": "query",
        "num_query_heads": num_query_heads,
        "query_residual": query_residual,
        "head_dims": (mlp_weights["head.linear_1.weight"].shape[0], mlp_weights["head.linear_2.weight"].shape[0]),
        "task": task,
    }
    state_dict = {
        **rename_transformer_keys(weights),
        **rename_query_attention_keys(read_checkpoint(query_attention), source=str(query_attention)),
        **mlp_weights,
    }
    return build_model(WanRewardModel, config, state_dict, source=str(reward_transformer))


def read_native_config(folder: str | Path) -> dict[str, Any]:
    """
    Read and check the `config.json` of a native Wan model.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If an entry is missing, unknown, or describes another architecture.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(config).__name__}.")
    if config.get("_class_name") == "WanTransformer3DModel":
        raise ValueError(f"{path}: this is a diffusers model already, nothing to convert.")
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


def transformer_config(native_config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    Configuration in diffusers' words, read from native weights, and from `native_config` what they cannot tell.

    `image_dim` and `added_kv_proj_dim`, for one, are in no config.json of Wan's. `num_layers` is the number of blocks
    in the weights.

    Raises:
        ValueError: If a weight that tells a size is missing, or weights and `native_config` disagree.
    """
    for key in (
        "patch_embedding.weight",
        "text_embedding.0.weight",
        "time_embedding.0.weight",
        "blocks.0.ffn.0.weight",
    ):
        if key not in weights:
            raise ValueError(f"The weight '{key}' is missing: not a Wan transformer in its native format.")
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
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": native_config["eps"],
        "image_dim": weights[image_key].shape[0] if image_key in weights else None,
        "added_kv_proj_dim": dim if "blocks.0.cross_attn.k_img.weight" in weights else None,
        "pos_embed_seq_len": weights[position_key].shape[1] if position_key in weights else None,
    }
    if native_config["dim"] != dim:
        raise ValueError(f"config.json says `dim` {native_config['dim']}, the weights have {dim}.")
    for native_name, name in ENTRIES.items():
        expected = native_config.get(native_name, config[name])
        expected = tuple(expected) if isinstance(expected, list) else expected
        if expected != config[name]:
            raise ValueError(f"config.json says `{native_name}` {expected}, the weights have {config[name]}.")
    if "head.head.weight" in weights:
        out_channels = weights["head.head.weight"].shape[0] // math.prod(patch_size)
        if out_channels != config["out_channels"]:
            raise ValueError(f"config.json says `out_dim` {config['out_channels']}, the weights have {out_channels}.")
    return config


def rename_transformer_keys(weights: Mapping[str, torch.Tensor]) -> StateDict:
    """Native keys of a Wan transformer -> the keys of `WanTransformer3DModel`, with diffusers' own converter."""
    renamed = convert_wan_transformer_to_diffusers(dict(weights))
    position = renamed.pop("img_emb.emb_pos", None)
    if position is not None:
        renamed["condition_embedder.image_embedder.pos_embed"] = position
    return renamed


def rename_mlp_keys(weights: Mapping[str, torch.Tensor], *, source: str) -> StateDict:
    """Keys of upstream's MLP (`fc1`, `fc2`, `fc3`) -> those of the head of [`WanRewardModel`]."""
    expected = {f"{old}.{part}": f"{new}.{part}" for old, new in MLP_NAMES.items() for part in ("weight", "bias")}
    check_keys(weights, expected, source=source)
    return {expected[key]: tensor for key, tensor in weights.items()}


def rename_query_attention_keys(weights: Mapping[str, torch.Tensor], *, source: str) -> StateDict:
    """
    Keys of upstream's query attention, a `torch.nn.MultiheadAttention`, -> those of the pooling of [`WanRewardModel`].

    `in_proj` stacks the projections of query, key and value; they become three layers.
    """
    names = [
        f"multihead_attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    check_keys(weights, ["queries", *names], source=source)
    if weights["queries"].ndim != 2 or weights["queries"].shape[0] != 1:
        raise ValueError(f"{source}: 'queries' must be one query, (1, dim), got {tuple(weights['queries'].shape)}.")
    dim = weights["queries"].shape[1]
    for key, shape in zip(names[:2], [(3 * dim, dim), (3 * dim,)], strict=True):
        if tuple(weights[key].shape) != shape:
            raise ValueError(f"{source}: '{key}' must be {shape}, got {tuple(weights[key].shape)}.")
    state_dict = {"pooler.query": weights["queries"]}
    for part in ("weight", "bias"):
        for layer, tensor in zip(
            ("to_q", "to_k", "to_v"), weights[f"multihead_attn.in_proj_{part}"].chunk(3), strict=True
        ):
            state_dict[f"pooler.{layer}.{part}"] = tensor.contiguous()
        state_dict[f"pooler.to_out.{part}"] = weights[f"multihead_attn.out_proj.{part}"]
    return state_dict


def build_model(
    model_class: type[ModelT], config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], *, source: str
) -> ModelT:
    """
    Make a model whose weights are exactly `state_dict`, in the types they have; nothing is initialised at random.

    Raises:
        ValueError: Naming the keys that are missing, unexpected, or of another shape.
    """
    with init_empty_weights(include_buffers=False):
        model = model_class(**config)
    expected = model.state_dict()
    check_keys(state_dict, expected, source=source)
    for key, tensor in state_dict.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{source}: '{key}' must have the shape {tuple(expected[key].shape)}, got {tuple(tensor.shape)}."
            )
    model.load_state_dict(state_dict, strict=True, assign=True)
    return model.eval()


def check_keys(found: Mapping[str, Any], expected: Mapping[str, Any] | list[str], *, source: str) -> None:
    """Raise a `ValueError` that names missing and unexpected keys."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    problems = [
        f"{len(keys)} {word} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
        for word, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if problems:
        raise ValueError(f"{source}: keys do not fit: {' and '.join(problems)}.")


def read_weights(folder: str | Path) -> StateDict:
    """
    Read the safetensors of a folder: one file, or shards with their `*.safetensors.index.json`.

    Raises:
        FileNotFoundError: If the folder, its weights or one shard is missing.
        ValueError: If it is unclear which file counts, or a shard does not hold what the index says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    files = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        if not files:
            raise FileNotFoundError(f"{folder}: there is no safetensors file.")
        usual = [path for path in files if path.name == SAFETENSORS_WEIGHTS_NAME]
        if len(files) > 1 and not usual:
            raise ValueError(f"{folder}: {len(files)} safetensors files without an index; which one is the model?")
        return read_safetensors((usual or files)[0])
    if len(indices) > 1:
        raise ValueError(f"{folder}: {len(indices)} index files: {', '.join(path.name for path in indices)}.")
    weight_map: dict[str, str] = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
    weights: StateDict = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: the shard '{name}' of {indices[0].name} is missing.")
        shard = read_safetensors(folder / name)
        check_keys(shard, [key for key, file in weight_map.items() if file == name], source=str(folder / name))
        weights |= shard
    return weights


def read_safetensors(path: Path) -> StateDict:
    """All tensors of one safetensors file, mapped from disk rather than copied."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def read_checkpoint(path: str | Path) -> StateDict:
    """
    Read a `.ckpt` state dict, without running code from it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything but tensors by name.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path}: expected a state dict, tensors by name, got {type(weights).__name__}.")
    return dict(weights)


def check_output_dir(output_dir: str | Path) -> None:
    """Raise a `ValueError` if `output_dir` exists and is not an empty folder."""
    path = Path(output_dir)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"`output_dir` '{output_dir}' exists and is not an empty folder.")


def save_converted(model: ModelMixin, output_dir: str | Path) -> None:
    """Save a model to a new folder that appears only when it is complete."""
    check_output_dir(output_dir)
    output_dir = Path(output_dir)
    unfinished = output_dir.with_name(f".{output_dir.name}.tmp")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(unfinished)
    os.replace(unfinished, output_dir)
