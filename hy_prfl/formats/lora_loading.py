"""
Loads a LoRA into a transformer, completely or not at all.

diffusers' `load_lora_weights` ignores tensors that it has no rule for. Here all names and shapes are compared with
the model before anything is changed. Afterwards the loaded weights are compared with the file.
"""

import math
import re
from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel
from peft import get_peft_model_state_dict

from .lora import Adapter
from .lora_keys import PARTS
from .lora_writing import lora_config
from .weight_files import is_finite


def check_adapter_fits(adapter: Adapter, transformer: WanTransformer3DModel, *, source: str) -> None:
    """
    Check that each tensor of a LoRA has a place in a model, which may be on the meta device.

    Raises:
        ValueError: If tensors have no place in the model, or one has the wrong shape or is not finite. The message
            names their keys in the file.
    """
    shapes = {_without_adapters(name): tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    wanted = {f"{name}.weight": name for name in adapter.layers} | {name: name for name in adapter.differences}
    missing = [name for parameter, name in wanted.items() if parameter not in shapes]
    if missing:
        keys = [key for name in missing for key in adapter.keys.get(name, [name])]
        shown = ", ".join(f"'{key}'" for key in keys[:6]) + ", ..." * (len(keys) > 6)
        reason = _why_missing(missing, transformer)
        raise ValueError(f"{source}: {len(keys)} tensors have no place in the model: {shown}.{reason}")
    for name, layer in adapter.layers.items():
        out_features, *inputs = shapes[f"{name}.weight"]
        ones = [1] * (len(inputs) - 1)
        tensors = {
            "down": (layer.down, (layer.rank, *inputs)),
            "up": (layer.up, (out_features, layer.rank, *ones)),
            "bias": (layer.bias, (out_features,)),
            "magnitude": (layer.magnitude, (1, out_features, *ones) if ones else (out_features,)),
        }
        for part, (tensor, shape) in tensors.items():
            if tensor is not None:
                _check_tensor(adapter, name, tensor, shape, part, source)
    for name, difference in adapter.differences.items():
        _check_tensor(adapter, name, difference, shapes[name], "difference", source)


def _without_adapters(name: str) -> str:
    """Name of a parameter without an adapter: peft moves the layer's own parameters into `base_layer`."""
    return name.replace(".base_layer.", ".")


def _why_missing(names: Sequence[str], transformer: WanTransformer3DModel) -> str:
    num_layers = transformer.config.num_layers
    blocks = {int(match.group(1)) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    reasons = []
    if blocks and max(blocks) >= num_layers:
        reasons.append(f"The model has {num_layers} blocks, from 0 on; the file has block {max(blocks)}.")
    is_image_to_video = transformer.config.image_dim is not None
    if is_image_to_video and any(name.endswith("image_embedder.pos_embed") for name in names):
        reasons.append(
            "Only models of Wan2.1 for a first and a last frame have positions of image tokens (`emb_pos`)."
        )
    elif any(re.search(r"add_[kv]_proj|norm_added_k|image_embedder", name) for name in names):
        reasons.append("Only image-to-video models of Wan2.1 have layers for an image (`k_img`, `v_img`, `img_emb`).")
    return "".join(f" {reason}" for reason in reasons)


def _check_tensor(
    adapter: Adapter, name: str, tensor: torch.Tensor, shape: tuple[int, ...], part: str, source: str
) -> None:
    pattern = PARTS.get(part)
    keys = (
        ", ".join(f"'{key}'" for key in adapter.keys.get(name, []) if pattern is None or pattern.search(key)) or name
    )
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{source}: the {part} of '{name}' ({keys}) must be {shape} for this model, got {tuple(tensor.shape)}: it "
            "belongs to a model of another size or kind."
        )
    if not is_finite(tensor):
        raise ValueError(f"{source}: the {part} of '{name}' ({keys}) holds a NaN or an infinity.")


@torch.no_grad()
def load_adapter(
    transformer: WanTransformer3DModel, adapter: Adapter, adapter_name: str, *, scale: float = 1.0, source: str
) -> bool:
    """
    Load a LoRA into a transformer.

    Its layers become a new adapter of peft, in addition to those that the model already has. Its strength is set with
    `set_adapters` as usual. Differences of whole weights and biases are multiplied by `scale` and added immediately.

    Args:
        source (`str`):
            Where the LoRA comes from, for errors.

    Returns:
        `bool`: Whether an adapter of peft was added. A file may hold nothing but differences.

    Raises:
        ValueError: If a part of the LoRA has no place in the model; the model is unchanged then. Or if peft or diffusers
            did not load a part.
    """
    check_adapter_fits(adapter, transformer, source=source)
    parameters = {_without_adapters(name): parameter for name, parameter in transformer.named_parameters()}
    for name, difference in adapter.differences.items():
        weight = parameters[name]
        weight.copy_(weight.float() + scale * difference.to(weight.device).float())
    if not adapter.layers:
        return False
    dtype = transformer.dtype
    weights = {}
    for name, layer in adapter.layers.items():
        tensors = {
            "lora_A.weight": layer.down,
            "lora_B.weight": layer.up,
            "lora_B.bias": layer.bias,
            "lora_magnitude_vector": layer.magnitude,
        }
        for part, tensor in tensors.items():
            if tensor is not None:
                # float8 cannot be used in computations.
                weights[f"{name}.{part}"] = (tensor.to(dtype) if tensor.itemsize == 1 else tensor).contiguous()
    has_bias = any(layer.bias is not None for layer in adapter.layers.values())
    for name, layer in adapter.layers.items():
        if has_bias and layer.bias is None:
            weights[f"{name}.lora_B.bias"] = torch.zeros(len(layer.up), dtype=weights[f"{name}.lora_B.weight"].dtype)
    transformer.load_lora_adapter(
        weights,
        prefix=None,
        adapter_name=adapter_name,
        metadata=lora_config(adapter).to_dict(),
        low_cpu_mem_usage=True,
    )
    _check_arrived(transformer, adapter, adapter_name, weights, source)
    return True


def _check_arrived(
    transformer: WanTransformer3DModel,
    adapter: Adapter,
    adapter_name: str,
    weights: dict[str, torch.Tensor],
    source: str,
) -> None:
    """Compare the weights in the model with those of the file, and the scale of each layer."""
    # Without the model's own weights, peft would take a bias for a part of a sharded weight.
    arrived = get_peft_model_state_dict(transformer, transformer.state_dict(), adapter_name=adapter_name)
    lost = [
        name
        for name, tensor in weights.items()
        if name not in arrived or not torch.equal(arrived[name].cpu(), tensor.cpu().to(arrived[name].dtype))
    ]
    scales = {name: transformer.get_submodule(name).scaling[adapter_name] for name in adapter.layers if not lost}
    lost += [name for name, scale in scales.items() if not math.isclose(scale, adapter.layers[name].scale)]
    lost += sorted(set(arrived) - set(weights))
    if lost:
        raise ValueError(
            f"{source}: {len(lost)} of {len(weights)} tensors of the LoRA were not loaded into the model, such as "
            f"{', '.join(lost[:5])}. The installed peft or diffusers handles this LoRA differently."
        )
