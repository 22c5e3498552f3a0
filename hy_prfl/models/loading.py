"""Loads transformers, reward models and schedulers from folders and Hub repositories in diffusers' format."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from ..formats.layout import EXPERT_FOLDERS
from ..formats.sources import reading
from ..formats.weight_files import check_finite, read_header
from ..runtime.quantization import Quantizer
from ..runtime.sharding import fill_weights
from .reward_model import BACKBONE_CONFIG, WanRewardModel
from .starting_points import StartingPoint


Shard = Callable[[nn.Module], None]
ModelT = TypeVar("ModelT", bound=nn.Module)

TRANSFORMER_FOLDER = EXPERT_FOLDERS["high_noise"]
WEIGHTS_NAME = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Deferred(Generic[ModelT]):
    """
    A model on disk. Its configuration can be checked before its weights are read.

    Args:
        config (`Mapping[str, Any]`):
            Configuration of the model.
        load (`Callable[[], nn.Module]`):
            Reads the model.
        start (`StartingPoint`, *optional*):
            Weights and LoRA that it starts from, if not the pipeline's own transformer.
    """

    config: Mapping[str, Any]
    load: Callable[[], ModelT]
    start: StartingPoint = StartingPoint()


def loaded(model: ModelT | Deferred[ModelT]) -> ModelT:
    """The model itself. A deferred model is read now."""
    return model.load() if isinstance(model, Deferred) else model


def start_of(model: nn.Module | Deferred[Any]) -> StartingPoint:
    """The starting point of a deferred model; an empty one for a model that is already loaded."""
    return model.start if isinstance(model, Deferred) else StartingPoint()


class WeightFiles(Mapping[str, torch.Tensor]):
    """
    Weights of a diffusers model by name. Each is read from its safetensors file on access.

    Reading a weight with a NaN or an infinity raises a `ValueError` that names it.

    Args:
        pretrained_model_name_or_path (`str`):
            A local folder or a Hub id.
        subfolder (`str`, *optional*):
            Subfolder of the model.
        revision (`str`, *optional*):
            Hub revision.
        variant (`str`, *optional*):
            Variant of the files, such as `fp16`.

    Raises:
        FileNotFoundError: If there are no safetensors files of that variant.
        ValueError: If one of the files is not a safetensors file, or is cut off.
    """

    def __init__(
        self,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        root = Path(pretrained_model_name_or_path)
        if not root.is_dir():
            patterns = [f"{subfolder}/*" if subfolder else "*"]
            root = Path(
                snapshot_download(str(pretrained_model_name_or_path), revision=revision, allow_patterns=patterns)
            )
        folder = root / subfolder if subfolder else root
        stem = f"{WEIGHTS_NAME}.{variant}" if variant else WEIGHTS_NAME
        index = folder / f"{WEIGHTS_NAME}.safetensors.index{f'.{variant}' if variant else ''}.json"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {name: folder / file for name, file in weight_map.items()}
            for shard in dict.fromkeys(self.files.values()):
                read_header(shard)
        else:
            file = folder / f"{stem}.safetensors"
            if not file.is_file():
                raise FileNotFoundError(f"{folder}: there is neither '{file.name}' nor '{index.name}'.")
            read_header(file)
            with safe_open(file, framework="pt") as opened:
                self.files = dict.fromkeys(opened.keys(), file)

    def select(self, names: Iterable[str]) -> "WeightFiles":
        """
        Keep only these weights.

        Raises:
            ValueError: If one of them is missing.
        """
        selection = copy(self)
        missing = [name for name in names if name not in self.files]
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, such as '{missing[0]}'.")
        selection.files = {name: self.files[name] for name in names}
        return selection

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
        check_finite([(name, tensor)], source=str(self.files[name]))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def load_transformer(
    pretrained_model_name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    subfolder: str = TRANSFORMER_FOLDER,
    shard: Shard | None = None,
    quantizer: Quantizer | None = None,
    keep_in_fp32: bool = False,
    start: StartingPoint | None = None,
) -> WanTransformer3DModel:
    """
    Load the generator of a Wan pipeline.

    Args:
        shard (`Callable[[nn.Module], None]`, *optional*):
            Shards a module's weights over the ranks, see [`~hy_prfl.runtime.sharding.fill_weights`]. Without it, every
            process loads the whole model.
        quantizer (`Quantizer`, *optional*):
            Quantises the weights of the blocks' linear layers. Not together with `shard`.
        keep_in_fp32 (`bool`, defaults to `False`):
            With `shard`, keep the parts that are sensitive to rounding in float32. Without `shard` they always are.
        start (`StartingPoint`, *optional*):
            Weights that replace the pipeline's, and a LoRA to merge. The sum is rounded once, to `dtype`.

    Raises:
        ValueError: If a weight is not finite; the message names it.
    """
    files: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    start = start or StartingPoint()
    if shard is None and quantizer is None and start.is_pipelines_own:
        transformer = WanTransformer3DModel.from_pretrained(
            pretrained_model_name_or_path, variant=variant, dtype=dtype, **files
        )
        check_finite(transformer.named_parameters(), source=f"{pretrained_model_name_or_path}/{subfolder}")
        return transformer
    with init_empty_weights(include_buffers=False):
        transformer = WanTransformer3DModel.from_config(
            WanTransformer3DModel.load_config(pretrained_model_name_or_path, **files)
        )
    weights = start.weights or WeightFiles(pretrained_model_name_or_path, variant=variant, **files)
    kept = WanTransformer3DModel._keep_in_fp32_modules if keep_in_fp32 or shard is None else ()
    merged = start.merge_into(weights)
    fill_weights(transformer, merged, dtype=dtype, keep_in_fp32=kept, shard=shard, quantizer=quantizer)
    if shard is None and quantizer is None:
        check_finite(transformer.named_parameters(), source=f"{pretrained_model_name_or_path}/{subfolder}")
    return transformer.eval()


def empty_transformer(
    pretrained_model_name_or_path: str, *, revision: str | None = None, subfolder: str = TRANSFORMER_FOLDER
) -> WanTransformer3DModel:
    """The generator of a Wan pipeline on the meta device. It has names, shapes and a configuration, but no weights."""
    config = WanTransformer3DModel.load_config(pretrained_model_name_or_path, subfolder=subfolder, revision=revision)
    # Building it draws random numbers. They must not change those of the run.
    with torch.random.fork_rng(devices=[]), init_empty_weights():
        return WanTransformer3DModel.from_config(config)


def make_reward_model(
    pretrained_model_name_or_path: str,
    *,
    num_layers: int,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    subfolder: str = TRANSFORMER_FOLDER,
    shard: Shard | None = None,
    start: StartingPoint | None = None,
    quantizer: Quantizer | None = None,
    **kwargs: Any,
) -> WanRewardModel:
    """
    [`WanRewardModel.from_transformer`] for a transformer on disk. Only the blocks that are kept are read.

    Args:
        kwargs:
            Any other argument of [`WanRewardModel`] (`pooling`, `task`, `vae_fingerprint`, ...).

        The other arguments are those of [`load_transformer`].

    Raises:
        ValueError: If the transformer has fewer than `num_layers` blocks.
    """
    files: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    start = start or StartingPoint()
    # Building it draws random numbers before the head does. They are part of what a seed reproduces.
    with init_empty_weights():
        base = WanTransformer3DModel.from_config(
            WanTransformer3DModel.load_config(pretrained_model_name_or_path, **files)
        ).config
    if num_layers > base.num_layers:
        raise ValueError(f"`num_layers` is {num_layers}, but the transformer has only {base.num_layers} blocks.")
    backbone = {name: base[name] for name in BACKBONE_CONFIG}
    with init_empty_weights(include_buffers=False):
        model = WanRewardModel(**backbone, num_layers=num_layers, base_num_layers=base.num_layers, **kwargs)
    model.reset_head()
    model.pooler.to(dtype)
    model.head.to(dtype)
    kept = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    weights: Mapping[str, torch.Tensor]
    if start.weights is None:
        weights = WeightFiles(pretrained_model_name_or_path, variant=variant, **files).select(kept)
    else:
        weights = {name: start.weights[name] for name in kept}
    fill_weights(model, start.merge_into(weights), dtype=dtype, shard=shard, quantizer=quantizer)
    return model.eval()


def read_reward_config(source: str, *, option: str, revision: str | None = None) -> dict[str, Any]:
    """
    Configuration of a reward model on disk or on the Hub.

    Args:
        option (`str`):
            Option that names it, for errors.

    Raises:
        FileNotFoundError: If it cannot be read.
        ValueError: If it is another kind of model.
    """
    try:
        with reading(option, source):
            return WanRewardModel.load_own_config(source, revision=revision)
    except ValueError as error:
        raise ValueError(f"`{option}` '{source}' is not a reward model: {error}") from error


def load_reward_model(
    pretrained_model_name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    shard: Shard | None = None,
    quantizer: Quantizer | None = None,
    keep_in_fp32: bool = True,
) -> WanRewardModel:
    """
    Load a reward model, frozen and in evaluation mode. Gradients flow to its input, not to its weights.

    Args:
        shard (`Callable[[nn.Module], None]`, *optional*):
            Shards a module's weights over the ranks, see [`~hy_prfl.runtime.sharding.fill_weights`].
        quantizer (`Quantizer`, *optional*):
            Quantises the weights of the blocks' linear layers. Not together with `shard`.
        keep_in_fp32 (`bool`, defaults to `True`):
            Keep the parts that are sensitive to rounding in float32 for any `dtype`. A ZeRO-3 engine needs one
            type for all weights.

    Raises:
        ValueError: If a weight is missing, left over or not finite; the message names it. A broken model can give
            rewards that look normal.
    """
    if shard is None and quantizer is None:
        model = WanRewardModel.from_pretrained(pretrained_model_name_or_path, revision=revision, dtype=dtype)
    else:
        with init_empty_weights(include_buffers=False):
            model = WanRewardModel.from_config(
                WanRewardModel.load_own_config(pretrained_model_name_or_path, revision=revision)
            )
        fill_weights(
            model,
            WeightFiles(pretrained_model_name_or_path, revision=revision),
            dtype=dtype,
            keep_in_fp32=WanRewardModel._keep_in_fp32_modules if keep_in_fp32 else (),
            shard=shard,
            quantizer=quantizer,
        )
    return model.requires_grad_(False).eval()


def load_scheduler(
    pretrained_model_name_or_path: str, *, revision: str | None = None, flow_shift: float | None = None
) -> UniPCMultistepScheduler:
    """
    Load the sampler of a Wan pipeline, so that rollouts use the same timesteps as inference.

    Args:
        flow_shift (`float`, *optional*):
            Replaces the pipeline's own shift (3 for 480P, 5 for 720P in Wan's recipes).

    Raises:
        ValueError: If the pipeline's scheduler is not UniPC on flow sigmas.
    """
    config = UniPCMultistepScheduler.load_config(
        pretrained_model_name_or_path, subfolder="scheduler", revision=revision
    )
    name = config.get("_class_name")
    if name != "UniPCMultistepScheduler" or not config.get("use_flow_sigmas"):
        raise ValueError(
            f"{pretrained_model_name_or_path}: the scheduler must be a UniPCMultistepScheduler with "
            f"`use_flow_sigmas: true`, got {name} with `use_flow_sigmas: {config.get('use_flow_sigmas')}`."
        )
    overrides = {} if flow_shift is None else {"flow_shift": flow_shift}
    return UniPCMultistepScheduler.from_config(config, **overrides)
