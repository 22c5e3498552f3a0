"""What a training starts from in place of a pipeline's transformer: another one, and a LoRA, merged or to train on."""

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
    What one transformer of a run is made of.

    Args:
        weights (`Mapping[str, torch.Tensor]`, *optional*):
            Its weights by the names in `WanTransformer3DModel`, mapped from files; the pipeline's own if left out.
        merged (`Adapter`, *optional*):
            LoRA that is added to them.
        continued (`Adapter`, *optional*):
            LoRA whose weights the adapter in training begins with.
        source (`str`):
            Where the LoRA comes from, for errors.
    """

    weights: Mapping[str, torch.Tensor] | None = None
    merged: Adapter | None = None
    continued: Adapter | None = None
    source: str = ""

    @property
    def is_pipelines_own(self) -> bool:
        """Whether the weights to load are those of the pipeline's transformer."""
        return self.weights is None and self.merged is None

    def merge_into(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The weights, each with the LoRA added when it is asked for, if there is one."""
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
    Read what the options of a training name, and check that it fits. Weights are mapped from their files.

    Args:
        transformer_path (`str`, *optional*):
            Transformer in diffusers' or Wan's format: a folder, or a file with its config.json beside it.
        lora_path (`str`, *optional*):
            LoRA in any format of [`~hy_prfl.formats.lora.read_adapter`], or a folder with one, or with one for each expert.
        lora_start (`str`, *optional*):
            `"merge"` adds it to the weights, `"continue"` leaves it to [`start_adapter`].
        base (`WanTransformer3DModel`):
            The pipeline's transformer, on the meta device.
        expert (`str`, defaults to `"high_noise"`):
            Which of the LoRAs of a folder it is.
        suffix (`str`, defaults to `""`):
            What the options have in their names, `"_2"` for the low-noise expert, for errors.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: Naming what does not fit the pipeline's transformer.
    """
    weights = adapter = None
    if transformer_path is not None:
        option = f"transformer{suffix}_path"
        transformer = read_transformer(transformer_path)
        # The longest positions are a limit of the model, not of its weights, and native files do not tell it.
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
    """The LoRA of an expert; one whose header names none is for any."""
    found = {file.name: read_adapter(file) for file in find_lora_files(path)}
    named = {name: adapter.metadata.get(f"{PREFIX}expert") for name, adapter in found.items()}
    fitting = [found[name] for name, told in named.items() if told in (None, expert)]
    if len(fitting) != 1:
        told = ", ".join(f"{name} is for {each or 'any'}" for name, each in named.items())
        raise ValueError(f"`{option}`: '{path}' must have one LoRA for the {expert} expert: {told}.")
    return fitting[0]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_starts_adapter(model: nn.Module, start: StartingPoint) -> None:
    """
    Check that a LoRA is one that the options of a training make: the same layers, rank and alpha, and nothing else.

    Args:
        model (`nn.Module`):
            The model with its new adapter; it may be on the meta device.

    Raises:
        ValueError: Naming the option that does not fit.
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
            f"{source}: a LoRA with biases, magnitudes (DoRA) or differences of weights cannot train on, such as "
            f"'{others[0]}'. `lora_start` merge adds it to the weights."
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
    """Put the weights of the LoRA that trains on, if there is one, into the model's new adapter, bit for bit."""
    if start.continued is None:
        return
    check_starts_adapter(model, start)
    for name, module in _adapter_layers(model).items():
        layer = start.continued.layers[name]
        module.lora_A[ADAPTER_NAME].weight.copy_(layer.down)
        module.lora_B[ADAPTER_NAME].weight.copy_(layer.up)


def _adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Layers of peft with an adapter, by the names that they have without it."""
    return {name: module for name, module in model.named_modules() if ADAPTER_NAME in getattr(module, "lora_A", {})}
