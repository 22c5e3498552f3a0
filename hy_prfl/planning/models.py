"""Models on the meta device: their configurations, and the number and types of their parameters."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from ..configs.base import Quantization, TrainingConfig
from ..configs.prfl import PRFLTrainingConfig
from ..configs.reward import RewardTrainingConfig
from ..models.reward_model import BACKBONE_CONFIG, WanRewardModel
from ..models.trainable import select_trainable
from ..runtime.quantization import quantized_bytes, quantized_names


# Options of a recipe that the models depend on.
GENERATOR_OPTIONS = ("lora_rank", "lora_target_modules", "base_quantization")
REWARD_OPTIONS = (*GENERATOR_OPTIONS, "freeze_blocks", "loss")
# Required options of a recipe that the models do not depend on.
UNUSED: dict[str, Any] = {"output_dir": "-", "pretrained_model_name_or_path": "-", "train_dataset": "-"}

# Values that can be the key of a cache.
Frozen = tuple[tuple[str, Any], ...]


def freeze(values: Mapping[str, Any]) -> Frozen:
    """Values of a mapping as tuples."""
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in values.items())


def thaw(frozen: Frozen) -> dict[str, Any]:
    """The mapping that was frozen."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in frozen}


def options_of(training: TrainingConfig, names: Sequence[str]) -> Frozen:
    """Options of a recipe, frozen."""
    return freeze({name: getattr(training, name) for name in names})


def prfl_recipe(options: Frozen) -> PRFLTrainingConfig:
    """A recipe of PRFL with these options."""
    return PRFLTrainingConfig(**thaw(options), **UNUSED, reward_model="-")


def reward_recipe(options: Frozen) -> RewardTrainingConfig:
    """A recipe of the reward model's own training with these options."""
    return RewardTrainingConfig(**thaw(options), **UNUSED)


def reward_model_config(
    transformer_config: Mapping[str, Any], training: RewardTrainingConfig | None = None
) -> dict[str, Any]:
    """Configuration of the reward model that `train_reward` makes from a generator; 8 blocks by default (paper)."""
    config = {name: transformer_config[name] for name in BACKBONE_CONFIG}
    if training is None:
        return {**config, "num_layers": min(8, transformer_config["num_layers"])}
    names = ("num_layers", "pooling", "num_query_heads", "query_residual")
    return {**config, **{name: getattr(training, name) for name in names}}


def build_transformer(
    config: Mapping[str, Any], training: TrainingConfig, *, frozen: bool = False
) -> WanTransformer3DModel:
    """A generator on the meta device: with the trained parameters of `training`, or frozen and without an adapter."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(dict(config))
        if frozen:
            return transformer.requires_grad_(False)
        select_trainable(transformer, training, dtype=torch.float32)
    return transformer


def build_reward_model(config: Mapping[str, Any], training: RewardTrainingConfig | None = None) -> WanRewardModel:
    """A reward model on the meta device: frozen, or with the trained parameters of `training`."""
    with torch.device("meta"):
        reward_model = WanRewardModel.from_config(dict(config)).requires_grad_(False)
        if training is not None:
            select_trainable(reward_model, training, dtype=torch.float32)
    return reward_model


def materialize(model: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by new, uninitialised ones on the default device."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def set_dtypes(model: Any, *, frozen: torch.dtype, trained: torch.dtype, keep_in_fp32: bool) -> None:
    """
    Cast the parameters to the types that they have in a run.

    Args:
        keep_in_fp32 (`bool`):
            Keep frozen parameters in `_keep_in_fp32_modules` in float32. Loading does so, a DeepSpeed engine does not.
    """
    kept = set(model._keep_in_fp32_modules) if keep_in_fp32 else set()
    for name, parameter in model.named_parameters():
        is_kept = bool(kept & set(name.split("."))) and not parameter.requires_grad
        dtype = torch.float32 if is_kept else (trained if parameter.requires_grad else frozen)
        parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class ParameterSizes:
    """
    Numbers and bytes of the parameters of a model.

    Args:
        total, trained (`int`):
            Number of all parameters, and of the trained ones.
        num_bytes, trained_bytes (`int`):
            Bytes of all parameters, and of the trained ones, in their types.
        persistent (`int`):
            Number of parameters in tensors that are too small for ZeRO-3 to shard.
        block, rest (`int`):
            Number of parameters in one transformer block, and outside the blocks.
    """

    total: int
    trained: int
    num_bytes: int
    trained_bytes: int
    persistent: int
    block: int
    rest: int

    def times(self, count: int) -> "ParameterSizes":
        """Sizes of `count` such models together. `block` stays the size of one block."""
        values = dataclasses.asdict(self)
        return ParameterSizes(**{name: size * (1 if name == "block" else count) for name, size in values.items()})


def count_parameters(
    model: nn.Module, *, persistence_threshold: int = 0, quantization: Quantization | None = None
) -> ParameterSizes:
    """
    Count the parameters of a model. It may be on the meta device.

    Args:
        persistence_threshold (`int`, defaults to 0):
            Number of elements in the largest tensor that ZeRO-3 does not shard.
        quantization (`str`, *optional*):
            Quantisation of the frozen weights of the blocks' linear layers in a run. `model` itself is not quantised.
    """
    saved = 0.0
    if quantization is not None:
        weights = [model.get_parameter(name) for name in quantized_names(model)]
        saved = sum(weight.nbytes - quantized_bytes(quantization, tuple(weight.shape)) for weight in weights)
    parameters = list(model.parameters())
    blocks: Sequence[nn.Module] = list(model.get_submodule("blocks").children())
    in_blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    total = sum(parameter.numel() for parameter in parameters)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return ParameterSizes(
        total=total,
        trained=sum(parameter.numel() for parameter in trained),
        num_bytes=round(sum(parameter.nbytes for parameter in parameters) - saved),
        trained_bytes=sum(parameter.nbytes for parameter in trained),
        persistent=sum(each.numel() for each in parameters if each.numel() <= persistence_threshold),
        block=max(in_blocks),
        rest=total - sum(in_blocks),
    )


@dataclass(frozen=True)
class Counting:
    """
    How parameters are counted.

    Args:
        frozen, trained (`torch.dtype`):
            Types of frozen and of trained parameters.
        keeps_in_fp32 (`bool`):
            Whether frozen parameters that are sensitive to rounding stay in float32. Those of a model that is not in
            training always do.
        persistence_threshold (`int`), quantization (`str`, *optional*):
            See [`count_parameters`].
    """

    frozen: torch.dtype
    trained: torch.dtype
    keeps_in_fp32: bool
    persistence_threshold: int
    quantization: Quantization | None = None

    def count(self, model: Any) -> ParameterSizes:
        """Sizes of a model, whose parameters get the types."""
        keeps = self.keeps_in_fp32 or not any(parameter.requires_grad for parameter in model.parameters())
        set_dtypes(model, frozen=self.frozen, trained=self.trained, keep_in_fp32=keeps)
        return count_parameters(
            model, persistence_threshold=self.persistence_threshold, quantization=self.quantization
        )


@functools.cache
def generator_sizes(config: Frozen, options: Frozen | None, counting: Counting) -> ParameterSizes:
    """Sizes of a generator, cached: it takes seconds to build one. No options: frozen and without an adapter."""
    training = prfl_recipe(options or ())
    return counting.count(build_transformer(thaw(config), training, frozen=options is None))


@functools.cache
def reward_model_sizes(config: Frozen, options: Frozen | None, counting: Counting) -> ParameterSizes:
    """Sizes of a reward model, cached. No options: frozen."""
    return counting.count(build_reward_model(thaw(config), None if options is None else reward_recipe(options)))
