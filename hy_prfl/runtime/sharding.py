"""Weights that are sharded over ranks: loaded block by block, gathered one at a time, written back."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .quantization import Quantizer, dequantized


def forget_deepspeed_in_transformers() -> None:
    """
    Let transformers and diffusers load and treat tensors as whole tensors although ZeRO-3 is on.

    Accelerate tells transformers that ZeRO-3 is on. Models loaded after that would be sharded, and diffusers'
    `EMAModel` would try to gather the shards that it gets.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def fill_weights(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    keep_in_fp32: Sequence[str] = (),
    split: Callable[[nn.Module], None] | None = None,
    quantizer: Quantizer | None = None,
) -> None:
    """
    Load weights into a model on the meta device, one block at a time.

    Args:
        model (`nn.Module`):
            The model. Parameters that are not on the meta device are left as they are.
        weights (`Mapping[str, torch.Tensor]`):
            Weights by name; each is accessed once, so they may be read from disk on access.
        dtype (`torch.dtype`):
            Type to convert to.
        keep_in_fp32 (`Sequence[str]`):
            Names of modules and parameters whose weights become float32 instead.
        split (`Callable[[nn.Module], None]`, *optional*):
            Called with every block as soon as it is loaded, and with the model at the end: `split_for_zero3` or
            `split_frozen`. Then no rank ever holds more than one whole block.
        quantizer (`Quantizer`, *optional*):
            Takes the weights of the blocks' linear layers as they are read.

    Raises:
        ValueError: If a weight is missing, left over, or of another shape.
    """
    expected = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.is_meta}
    different = sorted(set(expected) ^ set(weights))
    if different:
        raise ValueError(f"{len(different)} weights are missing or left over, such as '{different[0]}'.")
    if quantizer is not None:
        quantizer.start(model)
    num_blocks = len(model.get_submodule("blocks")._modules)
    for unit in [*(f"blocks.{index}" for index in range(num_blocks)), ""]:
        module = model.get_submodule(unit)
        for name, parameter in list(module.named_parameters()):
            if not parameter.is_meta:
                continue
            full_name = f"{unit}.{name}" if unit else name
            tensor = weights[full_name]
            if tensor.shape != expected[full_name]:
                raise ValueError(
                    f"'{full_name}' must have the shape {tuple(expected[full_name])}, got {tuple(tensor.shape)}."
                )
            parent, _, leaf = name.rpartition(".")
            # A copy: weights from a file are memory-mapped, and the file may be replaced.
            own_dtype = torch.float32 if set(keep_in_fp32) & set(full_name.split(".")) else dtype
            tensor = tensor.to(own_dtype, copy=True)
            if quantizer is not None and quantizer.place(full_name, tensor):
                continue
            value = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module.get_submodule(parent).register_parameter(leaf, value)
        if split is not None:
            split(module)
    if quantizer is not None:
        quantizer.finish()


def split_for_zero3(module: nn.Module, deepspeed_config: Mapping[str, Any]) -> None:
    """Shard the weights of a module as the ZeRO-3 engine of this configuration expects them. A collective."""
    import deepspeed
    from deepspeed.utils import groups

    # With `zero_hpz_partition_size` the first call creates groups of ranks, which DeepSpeed refuses to create again.
    group = groups._get_zero_param_intra_parallel_group()
    deepspeed.zero.Init(module=module, config_dict_or_path=dict(deepspeed_config), zero_param_parallel_group=group)


def split_frozen(module: nn.Module, device: torch.device, mesh: DeviceMesh | None = None) -> None:
    """
    Shard the weights of a frozen module over ranks; they are gathered only while it computes. A collective of these ranks.

    It uses torch's `fully_shard` and no engine, so it works the same with DDP, ZeRO-2 and ZeRO-3, is not part of their
    checkpoints, and the module is called as before. All of these ranks must call it the same number of times.

    Args:
        mesh (`DeviceMesh`, *optional*):
            The ranks, in one dimension; all of them if left out.
    """
    from torch.distributed.fsdp import fully_shard

    module.requires_grad_(False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),)) if mesh is None else mesh
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def split_frozen_model(
    model: nn.Module, block_classes: Sequence[str], device: torch.device, mesh: DeviceMesh | None = None
) -> None:
    """
    Split the weights of a whole frozen model, see [`split_frozen`]; only one of its blocks is whole at a time.

    Args:
        block_classes (`Sequence[str]`):
            Names of the classes of its blocks: `_no_split_modules` in diffusers and transformers.

    Raises:
        ValueError: If it has no such blocks.
    """
    blocks = [module for module in model.modules() if type(module).__name__ in block_classes]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks of the classes {list(block_classes)}.")
    for block in blocks:
        split_frozen(block, device, mesh)
    split_frozen(model, device, mesh)


@contextmanager
def gathered(parameter: torch.Tensor) -> Iterator[None]:
    """Gather a parameter that ZeRO-3 has sharded, inside the context. A collective."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def full_state_dict(
    accelerator: Accelerator, model: nn.Module, *, trainable_only: bool = False
) -> dict[str, torch.Tensor]:
    """
    Weights by name, on the CPU of the main process; empty on the other ranks. A collective.

    Under DeepSpeed parameters are gathered one after the other, so no rank ever holds more than one besides its own
    shard. Parameters in training are the float32 masters of the optimizer. Quantised weights are dequantised.
    """
    state_dict = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trainable_only and not tensor.requires_grad:
            continue
        master = full_master(tensor)
        with gathered(tensor):
            if accelerator.is_main_process:
                whole = dequantized(tensor) if master is None else master
                state_dict[name] = whole.detach().to("cpu", copy=True)
    return state_dict


def full_master(parameter: torch.Tensor) -> torch.Tensor | None:
    """The whole float32 master of a parameter in training under DeepSpeed, None for any other. A collective."""
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return None
    if not parameter.requires_grad:
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def forget_gradients(optimizer: Any) -> None:
    """
    Set this rank's shard of the gradients to zero, which ZeRO-3 keeps from one update to the next.

    ZeRO-3 overwrites a shard when its parameter gets a gradient, and uses it at the end of the update in any case:
    without this call a parameter without a gradient would be moved by the gradient of an earlier update.

    Args:
        optimizer (`AcceleratedOptimizer`):
            The prepared optimizer.
    """
    shares = getattr(optimizer.optimizer, "grad_partitions_flat_buffer", None)
    if shares is not None:
        shares.zero_()


def fill_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Give parameters without a gradient a gradient of zero. Not under DeepSpeed, which holds gradients itself."""
    for parameter in parameters:
        is_split = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        if parameter.grad is None and not is_split:
            parameter.grad = torch.zeros_like(parameter)


class Masters:
    """
    The float32 values of the parameters in training that this rank keeps: all of them without DeepSpeed, else its
    shard.

    Args:
        named_parameters (`Mapping[str, nn.Parameter]`):
            The parameters in training by name, after `Accelerator.prepare`.
        optimizer (`torch.optim.Optimizer`):
            The prepared optimizer.
    """

    def __init__(self, named_parameters: Mapping[str, Any], optimizer: Any) -> None:
        self.optimizer = optimizer
        self.is_zero3 = any(hasattr(parameter, "ds_id") for parameter in named_parameters.values())
        self.is_zero2 = any(hasattr(parameter, "_hp_mapping") for parameter in named_parameters.values())
        self.shapes = {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in named_parameters.items()}
        # ZeRO-2 cuts one long buffer, so a rank has no part of most parameters.
        self.parameters = {
            name: parameter
            for name, parameter in named_parameters.items()
            if not self.is_zero2 or getattr(parameter, "_hp_mapping", None) is not None
        }

    def values(self) -> list[nn.Parameter]:
        """This rank's shard of each parameter of which it has one."""
        if self.is_zero3:
            from deepspeed.utils import safe_get_local_fp32_param

            return [nn.Parameter(safe_get_local_fp32_param(parameter)) for parameter in self.parameters.values()]
        if self.is_zero2:
            return [nn.Parameter(parameter._hp_mapping.get_hp_fragment()) for parameter in self.parameters.values()]
        return list(self.parameters.values())

    def share_of(self, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """
        Cut whole weights, one for each parameter in training, into shards as in `values`.

        Raises:
            ValueError: If one of them is missing, or has another shape than its parameter.
        """
        missing = sorted(set(self.shapes) - set(weights))
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, such as '{missing[0]}'.")
        shares = []
        for name, parameter in self.parameters.items():
            tensor = weights[name]
            if tensor.shape != self.shapes[name]:
                raise ValueError(
                    f"'{name}' must have the shape {tuple(self.shapes[name])}, got {tuple(tensor.shape)}."
                )
            shares.append(self._cut(parameter, tensor))
        return shares

    def write(self, values: Sequence[torch.Tensor]) -> None:
        """Write values, shaped as `values`, into the parameters: masters and working copies. A collective."""
        for parameter, value in zip(self.parameters.values(), values, strict=True):
            if self.is_zero3:
                from deepspeed.utils import safe_set_local_fp32_param

                safe_set_local_fp32_param(parameter, value)
                parameter.ds_tensor.data.copy_(value.view_as(parameter.ds_tensor))
            elif self.is_zero2:
                parameter._hp_mapping.get_hp_fragment().data.copy_(value)
            else:
                parameter.data.copy_(value)
        if self.is_zero2:
            self.optimizer.optimizer.update_lp_params()

    def _cut(self, parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
        if self.is_zero3:
            # Shards have equal sizes; the last one is padded.
            size = parameter.ds_tensor.numel()
            start = dist.get_rank(parameter.ds_process_group) * size
            share = torch.zeros(size, device=parameter.ds_tensor.device)
            own = tensor.flatten()[start : start + size]
            share[: own.numel()].copy_(own)
            return share
        if self.is_zero2:
            address = parameter._hp_mapping.lp_fragment_address
            tensor = tensor.flatten()[address.start : address.start + address.numel]
        return tensor.to(parameter.device, torch.float32, copy=True)
