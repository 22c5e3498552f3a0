"""Start a training from other weights than the pipeline's, and from a LoRA that is merged or trained further."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from ..configs.base import check
from ..formats.layout import ExpertName
from ..formats.lora import Adapter, find_lora_files, read_adapter
from ..formats.lora_loading import check_adapter_fits
from ..formats.lora_merging import MergedWeights, ScaledAdapter
from ..formats.lora_metadata import PREFIX
from .conversion import read_transformer


LoraStart = Literal["continue", "merge"]

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class StartingPoint:
    """
    Weights and LoRA that one transformer of a run starts from.

    Args:
        weights (`Mapping[str, torch.Tensor]`, *optional*):
            Weights by their names in `WanTransformer3DModel`, memory-mapped; the pipeline's own if left out.
        merged (`Adapter`, *optional*):
            LoRA that is added to the weights.
        continued (`Adapter`, *optional*):
            LoRA whose weights the trained adapter starts from.
        source (`str`):
            Option and path of the LoRA, for error messages.
    """

    weights: Mapping[str, torch.Tensor] | None = None
    merged: Adapter | None = None
    continued: Adapter | None = None
    source: str = ""

    @property
    def is_pipelines_own(self) -> bool:
        """Whether the weights to load are those of the pipeline's transformer, unchanged."""
        return self.weights is None and self.merged is None

    def merge_into(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The weights, with the LoRA to merge, if any, added to each on access."""
        return weights if self.merged is None else MergedWeights(weights, [ScaledAdapter(self.merged)])


def read_starting_point(
    transformer_path: str | None,
    lora_path: str | None,
    lora_start: LoraStart | None,
    *,
    base: WanTransformer3DModel,
    expert: ExpertName = "high_noise",
    suffix: str = "",
) -> StartingPoint:
    """
    Read the transformer and the LoRA of a run's options, and check that they fit. Weights are memory-mapped.

    Args:
        transformer_path (`str`, *optional*):
            Transformer in diffusers' or Wan's format: a folder, or a file with config.json in the same folder.
        lora_path (`str`, *optional*):
            LoRA in any format of [`~hy_prfl.formats.lora.read_adapter`], or a folder with one LoRA or one per expert.
        lora_start (`str`, *optional*):
            `"merge"` adds it to the weights, `"continue"` keeps it for [`start_adapter`].
        base (`WanTransformer3DModel`):
            The pipeline's transformer, on the meta device.
        expert (`str`, defaults to `"high_noise"`):
            Expert whose LoRA is taken from a folder with several.
        suffix (`str`, defaults to `""`):
            Suffix in the names of the options, for error messages: `"_2"` for the low-noise expert.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If something does not fit the pipeline's transformer; the message names it.
    """
    weights = adapter = None
    if transformer_path is not None:
        option = f"transformer{suffix}_path"
        transformer = read_transformer(transformer_path)
        # `rope_max_seq_len` does not depend on the weights, and native files do not have it.
        different = [
            f"`{name}` {transformer.config[name]} against {value}"
            for name, value in base.config.items()
            if not name.startswith("_")
            and name != "rope_max_seq_len"
            and _plain(transformer.config[name]) != _plain(value)
        ]
        if different:
            raise ValueError(
                f"`{option}`: '{transformer_path}' is not of the kind and size of the pipeline's transformer: "
                f"{', '.join(different)}. Give the pipeline that it was made from."
            )
        weights = transformer.state_dict()
    source = ""
    if lora_path is not None:
        adapter = _read_lora(lora_path, expert, f"lora{suffix}_path")
        source = f"`lora{suffix}_path` '{lora_path}'"
        check_adapter_fits(adapter, base, source=source)
    merges = lora_start == "merge"
    return StartingPoint(weights, adapter if merges else None, None if merges else adapter, source)


def _read_lora(path: str, expert: ExpertName, option: str) -> Adapter:
    """The LoRA of an expert. A LoRA whose header names no expert fits any."""
    found = {file.name: read_adapter(file) for file in find_lora_files(path)}
    named = {name: adapter.metadata.get(f"{PREFIX}expert") for name, adapter in found.items()}
    fitting = [found[name] for name, each in named.items() if each in (None, expert)]
    if len(fitting) != 1:
        listed = ", ".join(f"{name} is for {each or 'any'}" for name, each in named.items())
        raise ValueError(f"`{option}`: '{path}' must have one LoRA for the {expert} expert: {listed}.")
    return fitting[0]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_starts_adapter(model: nn.Module, start: StartingPoint) -> None:
    """
    Check that the LoRA to train further has the layers, rank and alpha of the run's options, and nothing else.

    Args:
        model (`nn.Module`):
            The model with its new adapter. It may be on the meta device.

    Raises:
        ValueError: If the LoRA does not fit; the message names the option.
    """
    adapter, source = start.continued, start.source
    if adapter is None:
        return
    layers = _adapter_layers(model)
    others = sorted(adapter.differences) + [
        name for name, layer in adapter.layers.items() if layer.bias is not None or layer.magnitude is not None
    ]
    if others:
        raise ValueError(
            f"{source}: a LoRA with biases, magnitudes (DoRA) or differences of weights cannot be trained further: "
            f"'{others[0]}'. With `lora_start` merge it is added to the weights."
        )
    for names, problem in (
        (sorted(set(adapter.layers) - set(layers)), "has layers that `lora_target_modules` does not select"),
        (sorted(set(layers) - set(adapter.layers)), "lacks layers that `lora_target_modules` selects"),
    ):
        if names:
            raise ValueError(f"{source} {problem}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}.")
    for name, layer in adapter.layers.items():
        rank, scale = layers[name].r[ADAPTER_NAME], layers[name].scaling[ADAPTER_NAME]
        check(rank == layer.rank, "lora_rank", rank, f"{layer.rank}, as that of '{name}' in {source}")
        same = math.isclose(scale, layer.scale, rel_tol=1e-6)
        check(same, "lora_alpha", scale * rank, f"{layer.alpha:g}, as that of '{name}' in {source}")


@torch.no_grad()
def start_adapter(model: nn.Module, start: StartingPoint) -> None:
    """Copy the LoRA to train further, if any, into the model's new adapter, bit for bit."""
    if start.continued is None:
        return
    check_starts_adapter(model, start)
    for name, module in _adapter_layers(model).items():
        layer = start.continued.layers[name]
        module.lora_A[ADAPTER_NAME].weight.copy_(layer.down)
        module.lora_B[ADAPTER_NAME].weight.copy_(layer.up)


def _adapter_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers that have the adapter, by the names of the layers in the model without it."""
    return {name: module for name, module in model.named_modules() if ADAPTER_NAME in getattr(module, "lora_A", {})}
