"""
Converts whole models between diffusers' folders and the files of Wan's and upstream's own code.

Every format is read into a model, and a model can be written in every format. Weights are memory-mapped from the files
in their stored types and written file by file, so a conversion needs no copy of them in memory.

Nothing is guessed or skipped: an unknown key, shape or configuration entry is an error that names it.
"""

import inspect
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin, WanTransformer3DModel
from huggingface_hub import save_torch_state_dict

from ..formats.layout import EXPERT_FOLDERS, NATIVE_EXPERT_FOLDERS, ExpertName
from ..formats.lora import read_adapters
from ..formats.lora_loading import check_adapter_fits
from ..formats.lora_merging import MergedWeights, ScaledAdapter
from ..formats.wan_native import key_names, native_config, read_native_config, strip_prefix, transformer_config
from ..formats.weight_files import (
    StateDict,
    check_finite,
    check_keys,
    new_folder,
    read_checkpoint,
    read_json,
    read_weights,
)
from .reward_model import WanRewardModel


logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=ModelMixin)

MLP_NAMES = {"fc1": "head.linear_1", "fc2": "head.linear_2", "fc3": "head.linear_3"}

# Hidden widths of upstream's `MLP`, constants of its code.
UPSTREAM_HEAD_DIMS = (1024, 512)

WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"


def read_transformer(path: str | Path, config: str | Path | None = None) -> WanTransformer3DModel:
    """
    Read a generator. Its format is read from config.json.

    Args:
        path (`str` or `Path`):
            A folder with `config.json` and safetensors, one file or shards; or a file, safetensors or pickled.
        config (`str` or `Path`, *optional*):
            The `config.json` of a single file; the one in the same folder if left out.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: Naming the key or entry that is missing, unknown, of another shape or not finite.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder '{path}'.")
    if (path / "model_index.json").is_file():
        raise ValueError(
            f"'{path}' is a whole pipeline. Give one of its transformers, such as '{path / 'transformer'}'."
        )
    config_path = Path(config) if config is not None else (path if path.is_dir() else path.parent) / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(
            f"There is no file '{config_path}'. The number of heads cannot be read from the weights: give Wan's "
            "config.json as `transformer_config`."
        )
    class_name = read_json(config_path).get("_class_name")
    if class_name == WanTransformer3DModel.__name__:
        return read_diffusers(WanTransformer3DModel, path, config_path)
    if class_name == WanRewardModel.__name__:
        raise ValueError(f"{config_path}: this is a reward model. Give it as `reward_model`.")
    return convert_transformer(path, config_path)


def convert_transformer(path: str | Path, config: str | Path | None = None) -> WanTransformer3DModel:
    """Read a generator in Wan's native format. The arguments are those of [`read_transformer`]."""
    entries = read_native_config(config if config is not None else path)
    weights = strip_prefix(read_weights(path))
    model_config = transformer_config(entries, weights, source=str(path))
    if entries["num_layers"] != model_config["num_layers"]:
        raise ValueError(
            f"{path}: config.json has `num_layers` {entries['num_layers']}, but the weights have "
            f"{model_config['num_layers']} blocks. Give the transformer of a reward model as `reward_transformer`."
        )
    return build_model(WanTransformer3DModel, model_config, weights, key_names(range(entries["num_layers"])), path)


def read_diffusers(model_class: type[ModelT], path: str | Path, config: str | Path | None = None) -> ModelT:
    """
    Read a model in diffusers' format, in the types of its files. `from_pretrained` would cast some weights.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: Naming the key or entry that is missing, unknown, of another shape or not finite.
    """
    config_path = Path(path) / "config.json" if config is None else Path(config)
    entries = read_json(config_path)
    if entries.get("_class_name") != model_class.__name__:
        raise ValueError(
            f"{config_path}: `_class_name` must be {model_class.__name__}, got {entries.get('_class_name')!r}."
        )
    entries = {name: value for name, value in entries.items() if not name.startswith("_")}
    unknown = sorted(set(entries) - set(inspect.signature(model_class.__init__).parameters))
    if unknown:
        raise ValueError(f"{config_path}: unknown entries {', '.join(unknown)}.")
    return build_model(model_class, entries, read_weights(path), {}, path)


def save_native(
    model: WanTransformer3DModel,
    output_dir: str | Path,
    *,
    max_shard_size: str | None = None,
    text_len: int = 512,
) -> None:
    """
    Write a generator to a new folder, in the format that Wan's and upstream's inference code and ComfyUI read.

    Args:
        max_shard_size (`str`, *optional*):
            Size of the largest file, such as `"5GB"`; one file if left out, as ComfyUI needs it.
        text_len (`int`, defaults to 512):
            See [`~hy_prfl.formats.wan_native.native_config`].
    """
    config = native_config(model.config, text_len=text_len, source=str(output_dir))
    names = key_names(range(model.config.num_layers))
    weights = model.state_dict()
    check_keys(weights, set(names) & set(weights), source=str(output_dir))
    with new_folder(output_dir) as folder:
        _write_native(folder, config, {names[key]: tensor for key, tensor in weights.items()}, max_shard_size)


def _write_native(folder: Path, config: Mapping[str, Any], weights: StateDict, max_shard_size: str | None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict(
        weights, folder, filename_pattern=WEIGHTS_PATTERN, max_shard_size=max_shard_size or sys.maxsize
    )


def save_converted(model: ModelMixin, output_dir: str | Path, *, max_shard_size: str | None = None) -> None:
    """Save a model in diffusers' format to a new folder. The folder appears only when it is complete."""
    with new_folder(output_dir) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size or "10GB")


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
    Read upstream's reward checkpoint, which has three parts, into one model.

    Args:
        reward_transformer (`str` or `Path`):
            Folder with the first blocks of a native Wan transformer. `num_layers` in its config.json is that of the
            original model; the number of blocks is read from the weights.
        mlp (`str` or `Path`):
            `mlp_step_N.ckpt`.
        query_attention (`str` or `Path`):
            `query_attention_step_N.ckpt`.
        num_query_heads (`int`, defaults to 8):
            Heads of the query attention. No file holds the number; the default of upstream's code is 8.
        query_residual (`bool`, defaults to `True`):
            Whether the query is added to the pooled vector, as in upstream's code.
        task (`str`, defaults to `"motion_quality"`):
            The label that the model was trained on.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: Naming the key or entry that is missing, unknown, of another shape or not finite.
    """
    entries, weights = read_native_config(reward_transformer), strip_prefix(read_weights(reward_transformer))
    config = transformer_config(entries, weights, source=str(reward_transformer))
    if config["num_layers"] > entries["num_layers"]:
        raise ValueError(
            f"{reward_transformer}: the weights have {config['num_layers']} blocks, more than "
            f"`num_layers` {entries['num_layers']} in config.json."
        )
    head = rename_mlp_keys(read_checkpoint(mlp), source=str(mlp))
    pooler = rename_query_attention_keys(read_checkpoint(query_attention), source=str(query_attention))
    config |= {
        "base_num_layers": entries["num_layers"],
        "pooling": "query",
        "num_query_heads": num_query_heads,
        "query_residual": query_residual,
        "head_dims": (head["head.linear_1.weight"].shape[0], head["head.linear_2.weight"].shape[0]),
        "task": task,
    }
    names = key_names(range(config["num_layers"]))
    source = f"{reward_transformer}, {mlp}, {query_attention}"
    return build_model(WanRewardModel, config, {**weights, **pooler, **head}, names, source)


def save_reward_parts(model: WanRewardModel, output_dir: str | Path) -> None:
    """
    Write a reward model to a new folder, in upstream's three parts.

    The parts are `checkpoint-0`, `mlp_step_0.ckpt` and `query_attention_step_0.ckpt`: upstream reads a step from the
    name. Upstream's format does not store `task`, `vae_fingerprint` and `num_query_heads`. If the number of heads is
    not 8, upstream's configuration must set it.

    Raises:
        ValueError: If upstream's code could not compute the same score.
    """
    config = model.config
    for name, value in (("pooling", "query"), ("query_residual", True)):
        if config[name] != value:
            raise ValueError(f"{output_dir}: `{name}` must be {value!r} in upstream's format, got {config[name]!r}.")
    if tuple(config.head_dims) != UPSTREAM_HEAD_DIMS:
        raise ValueError(
            f"{output_dir}: `head_dims` must be {UPSTREAM_HEAD_DIMS}, the widths of upstream's `MLP`, got "
            f"{tuple(config.head_dims)}."
        )
    entries = native_config(config, source=str(output_dir))
    if entries["model_type"] == "ti2v":
        raise ValueError(
            f"{output_dir}: upstream's code has no model of type 'ti2v' (Wan2.2 TI2V 5B), only t2v, i2v and flf2v of Wan2.1."
        )
    if entries["model_type"] == "i2v" and config.image_dim is None:
        raise ValueError(
            f"{output_dir}: upstream's code reads every image-to-video model as Wan2.1, with layers for image "
            "embeddings (`img_emb`, `k_img`, `v_img`). This model has none (`image_dim` is null), like Wan2.2 I2V."
        )
    state_dict = model.state_dict()
    names = key_names(range(config.num_layers))
    backbone = {key: value for key, value in state_dict.items() if not key.startswith(("pooler.", "head."))}
    check_keys(backbone, set(names) & set(backbone), source=str(output_dir))
    entries["num_layers"] = config.base_num_layers or config.num_layers

    query_attention = {"queries": state_dict["pooler.query"]}
    for part in ("weight", "bias"):
        stacked = [state_dict[f"pooler.{layer}.{part}"] for layer in ("to_q", "to_k", "to_v")]
        query_attention[f"multihead_attn.in_proj_{part}"] = torch.cat(stacked)
        query_attention[f"multihead_attn.out_proj.{part}"] = state_dict[f"pooler.to_out.{part}"]
    mlp = {
        f"{old}.{part}": state_dict[f"{new}.{part}"] for old, new in MLP_NAMES.items() for part in ("weight", "bias")
    }
    with new_folder(output_dir) as folder:
        _write_native(folder / "checkpoint-0", entries, {names[key]: value for key, value in backbone.items()}, None)
        # Clones, because `torch.save` writes the whole storage of a view.
        torch.save({key: value.clone() for key, value in mlp.items()}, folder / "mlp_step_0.ckpt")
        torch.save(
            {key: value.clone() for key, value in query_attention.items()}, folder / "query_attention_step_0.ckpt"
        )


def rename_mlp_keys(weights: Mapping[str, torch.Tensor], *, source: str) -> StateDict:
    """Rename the keys of upstream's MLP (`fc1`, `fc2`, `fc3`) to those of the head of [`WanRewardModel`]."""
    expected = {f"{old}.{part}": f"{new}.{part}" for old, new in MLP_NAMES.items() for part in ("weight", "bias")}
    check_keys(weights, expected, source=source)
    check_finite(weights.items(), source=source)
    return {expected[key]: tensor for key, tensor in weights.items()}


def rename_query_attention_keys(weights: Mapping[str, torch.Tensor], *, source: str) -> StateDict:
    """
    Rename the keys of upstream's query attention, a `torch.nn.MultiheadAttention`, to those of the pooling.

    `in_proj` stacks the projections of query, key and value. It becomes three layers.
    """
    names = [
        f"multihead_attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    check_keys(weights, ["queries", *names], source=source)
    check_finite(weights.items(), source=source)
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
    model_class: type[ModelT],
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    source: str | Path,
) -> ModelT:
    """
    Build a model with exactly these weights, in their types. Nothing is initialised at random.

    Args:
        names (`Mapping[str, str]`):
            Maps keys of the model to keys of `weights`, where they differ.

    Raises:
        ValueError: Naming the keys of `weights` that are missing, unexpected, of another shape or not finite.
    """
    with init_empty_weights(include_buffers=False):
        model = model_class(**config)
    expected = {names.get(key, key): (key, tensor.shape) for key, tensor in model.state_dict().items()}
    check_keys(weights, expected, source=str(source))
    for key, tensor in weights.items():
        shape = expected[key][1]
        if tensor.shape != shape:
            raise ValueError(f"{source}: '{key}' must have the shape {tuple(shape)}, got {tuple(tensor.shape)}.")
    check_finite(weights.items(), source=str(source))
    model.load_state_dict({expected[key][0]: tensor for key, tensor in weights.items()}, strict=True, assign=True)
    return model.eval()


@torch.no_grad()
def merge_loras(transformer: WanTransformer3DModel, adapters: Sequence[ScaledAdapter], *, source: str) -> None:
    """
    Add LoRAs to the weights of a generator, in place. The weights keep their types; each sum is rounded once.

    Args:
        source (`str`):
            Where the LoRAs come from, for errors.

    Raises:
        ValueError: Naming the keys of a LoRA that do not fit the model. The model is then unchanged.
    """
    for each in adapters:
        check_adapter_fits(each.adapter, transformer, source=source)
    weights = transformer.state_dict()
    merged = MergedWeights(weights, adapters)
    for name in sorted(merged.changed()):
        parent, _, leaf = name.rpartition(".")
        value = merged[name].to(weights[name].dtype)
        check_finite([(name, value)], source=source)
        transformer.get_submodule(parent).register_parameter(leaf, torch.nn.Parameter(value))


def find_transformers(path: str | Path) -> dict[ExpertName, Path]:
    """
    Find the transformers at a path: one or two in a pipeline of diffusers' or Wan's format, or the path itself.

    The path of a single transformer is returned as the high-noise expert.
    """
    path = Path(path)
    for names in (EXPERT_FOLDERS, NATIVE_EXPERT_FOLDERS):
        if (path / names["high_noise"]).is_dir():
            return {expert: path / name for expert, name in names.items() if (path / name).is_dir()}
    return {"high_noise": path}


def assign_loras(
    paths: Sequence[str], scales: Sequence[float], transformers: Mapping[ExpertName, Path]
) -> dict[ExpertName, list[ScaledAdapter]]:
    """
    Read LoRAs and assign each to a transformer.

    Of a pipeline of two experts the header of a LoRA names its own. Without one it goes into the high-noise expert,
    with a warning. A single transformer takes every LoRA.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is not a LoRA, or has LoRAs for two experts and there is one transformer.
    """
    assigned: dict[ExpertName, list[ScaledAdapter]] = {}
    for path, scale in zip(paths, scales, strict=True):
        adapters = read_adapters(path)
        if len(adapters) > len(transformers):
            raise ValueError(
                f"`merge_lora`: '{path}' has LoRAs for two experts, but there is one transformer. Give the pipeline's "
                "folder as `transformer`, or the file of one LoRA."
            )
        for adapter in adapters:
            if len(transformers) > 1 and not adapter.names_expert:
                logger.warning(
                    "`merge_lora`: '%s' does not say which expert it is for, and is added to the high-noise one. If it is "
                    "for the other one, give that one's folder as `transformer`.",
                    path,
                )
            expert = adapter.expert if len(transformers) > 1 else next(iter(transformers))
            assigned.setdefault(expert, []).append(ScaledAdapter(adapter, scale))
    return assigned
