"""
Adds LoRAs to a model's weights, one layer at a time, by peft's own merge.

Only one layer is in float32 at any time, so a model can be read and sharded layer by layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import nn

from .lora import Adapter
from .lora_writing import lora_config


@dataclass(frozen=True)
class ScaledAdapter:
    """
    A LoRA and how strongly it is applied.

    Args:
        scale (`float`):
            Factor of the update, in addition to the LoRA's own `alpha / rank`.
    """

    adapter: Adapter
    scale: float = 1.0


class MergedWeights(Mapping[str, torch.Tensor]):
    """
    Weights of a `WanTransformer3DModel` by name. LoRAs are added to a weight when it is read.

    A weight that a LoRA changes is returned as float32; the others are returned unchanged. Layers of a LoRA that are not
    in `weights` are ignored, so that `weights` may be only the first blocks. Check before that each LoRA fits the whole
    model, see [`~hy_prfl.formats.lora_loading.check_adapter_fits`].

    Args:
        weights (`Mapping[str, torch.Tensor]`):
            Weights by the names of the parameters in `WanTransformer3DModel`.
        adapters (`Sequence[ScaledAdapter]`):
            LoRAs, in the order in which they are added. The order matters for a DoRA: its update depends on the weight.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], adapters: Sequence[ScaledAdapter]) -> None:
        self.weights = weights
        self.adapters = adapters

    def changed(self) -> set[str]:
        """Names of the weights that the LoRAs change."""
        names = set()
        for each in self.adapters:
            names |= set(each.adapter.differences)
            for name, layer in each.adapter.layers.items():
                names |= {f"{name}.weight"} if layer.bias is None else {f"{name}.weight", f"{name}.bias"}
        return names & set(self.weights)

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        value = self.weights[name]
        layer_name, _, part = name.rpartition(".")
        for each in self.adapters:
            if name in each.adapter.differences:
                value = value.float() + each.scale * each.adapter.differences[name].float()
            layer = each.adapter.layers.get(layer_name)
            if layer is not None and (part == "weight" or layer.bias is not None):
                value = _merge(each, layer_name, part, self.weights[f"{layer_name}.weight"], value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _merge(each: ScaledAdapter, name: str, part: str, weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """
    Weight or bias of one layer after peft has merged a LoRA into it, float32.

    Args:
        part (`str`):
            `"weight"` or `"bias"`.
        weight (`torch.Tensor`):
            The layer's weight in the model. Only its shape is used.
        value (`torch.Tensor`):
            The weight or bias that the LoRA is added to.
    """
    layer = each.adapter.layers[name]
    with torch.device("meta"):
        base: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
        if weight.ndim > 2:
            kernel = weight.shape[2], weight.shape[3], weight.shape[4]
            base = nn.Conv3d(weight.shape[1], weight.shape[0], kernel, stride=kernel)
    shapes = {"weight": weight, "bias": weight.flatten(1)[:, 0]}
    # A copy: peft adds in place, and the weight may be mapped from a file.
    for own, example in shapes.items():
        filled = value if own == part else torch.zeros_like(example)
        base.register_parameter(own, nn.Parameter(filled.to(torch.float32, copy=True)))
    holder = nn.ModuleDict({"layer": base})
    config = lora_config(Adapter({"layer": layer}))
    inject_adapter_in_model(config, holder, adapter_name="merged")
    module: Any = holder["layer"]
    module.lora_A["merged"].weight.data = layer.down.float()
    module.lora_B["merged"].weight.data = layer.up.float()
    if layer.bias is not None:
        module.lora_B["merged"].bias.data = layer.bias.float()
    if layer.magnitude is not None:
        module.lora_magnitude_vector["merged"].weight.data = layer.magnitude.float()
    module.set_scale("merged", each.scale)
    module.merge(adapter_names=["merged"])
    return module.base_layer.get_parameter(part).detach()
