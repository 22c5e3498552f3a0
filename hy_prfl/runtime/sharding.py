"""Sharding of weights over ranks: loading block by block, gathering one parameter at a time, writing shards back."""

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
    Make transformers and diffusers load and use whole tensors although ZeRO-3 is on.

    Accelerate informs transformers about ZeRO-3. Models loaded after that would be sharded, and diffusers' `EMAModel`
    would try to gather shards.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def fill_weights(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    keep_in_fp32: Sequence[str] = (),
    shard: Callable[[nn.Module], None] | None = None,
    quantizer: Quantizer | None = None,
) -> None:
    """
    Load weights into a model on the meta device, one block at a time.

    Args:
        model (`nn.Module`):
            The model. Parameters that are not on the meta device are left as they are.
        weights (`Mapping[str, torch.Tensor]`):
            Weights by name. Each is accessed once, so a mapping may read them from disk on access.
        dtype (`torch.dtype`):
            Type to convert to.
        keep_in_fp32 (`Sequence[str]`):
            Names of modules and parameters whose weights are converted to float32 instead.
        shard (`Callable[[nn.Module], None]`, *optional*):
            `shard_for_zero3` or `shard_frozen`. Called with each block as soon as it is loaded, and with the model at
            the end, so that no rank holds more than one whole block.
        quantizer (`Quantizer`, *optional*):
            Quantises the weights of the blocks' linear layers when they are read.

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
            # Copied, because weights from a file are memory-mapped and the file may be replaced.
            own_dtype = torch.float32 if set(keep_in_fp32) & set(full_name.split(".")) else dtype
            tensor = tensor.to(own_dtype, copy=True)
            if quantizer is not None and quantizer.place(full_name, tensor):
                continue
            value = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module.get_submodule(parent).register_parameter(leaf, value)
        if shard is not None:
            shard(module)
    if quantizer is not None:
        quantizer.finish()


def shard_for_zero3(module: nn.Module, deepspeed_config: Mapping[str, Any], device: torch.device) -> None:
    """
    Shard the weights of a module for the ZeRO-3 engine of this configuration, and move its buffers. A collective.

    Args:
        device (`torch.device`):
            Device of the engine. It does not move a model that is sharded already, and sharding moves only weights.
    """
    import deepspeed
    from deepspeed.utils import groups

    # With `zero_hpz_partition_size` the first call creates groups of ranks. It raises if they are created again.
    group = groups._get_zero_param_intra_parallel_group()
    deepspeed.zero.Init(module=module, config_dict_or_path=dict(deepspeed_config), zero_param_parallel_group=group)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))


def shard_frozen(module: nn.Module, device: torch.device, mesh: DeviceMesh | None = None) -> None:
    """
    Shard the weights of a frozen module over ranks. They are gathered only while it runs. A collective of these ranks.

    It uses torch's `fully_shard` and no engine. So it works with DDP, ZeRO-2 and ZeRO-3, is not part of their
    checkpoints, and the module is called as before. All of these ranks must call the module the same number of times.

    Args:
        mesh (`DeviceMesh`, *optional*):
            One-dimensional mesh of the ranks; all ranks if left out.
    """
    from torch.distributed.fsdp import fully_shard

    module.requires_grad_(False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),)) if mesh is None else mesh
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def shard_frozen_model(
    model: nn.Module, block_classes: Sequence[str], device: torch.device, mesh: DeviceMesh | None = None
) -> None:
    """
    Shard all weights of a frozen model, see [`shard_frozen`]. Only one of its blocks is gathered at a time.

    Args:
        block_classes (`Sequence[str]`):
            Class names of its blocks: `_no_split_modules` in diffusers and transformers.

    Raises:
        ValueError: If the model has no such blocks.
    """
    blocks = [module for module in model.modules() if type(module).__name__ in block_classes]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks of the classes {list(block_classes)}.")
    for block in blocks:
        shard_frozen(block, device, mesh)
    shard_frozen(model, device, mesh)


@contextmanager
def gathered(parameter: torch.Tensor) -> Iterator[None]:
    """Inside the context, gather a parameter if ZeRO-3 has sharded it. A collective."""
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

    With DeepSpeed, parameters are gathered one after the other, so a rank holds one of them besides its own shard.
    Trained parameters are taken from the optimizer's float32 masters. Quantised weights are dequantised.
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
    """The whole float32 master of a trained parameter under DeepSpeed; None for other parameters. A collective."""
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return None
    if not parameter.requires_grad:
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def forget_gradients(optimizer: Any) -> None:
    """
    Set this rank's shard of the gradients to zero. ZeRO-3 keeps it from one update to the next.

    ZeRO-3 overwrites a parameter's part of the shard when the parameter gets a gradient, and the optimizer always uses
    the shard. Without this call, a parameter that gets no gradient would be updated with one of an earlier update.

    Args:
        optimizer (`AcceleratedOptimizer`):
            The prepared optimizer.
    """
    shares = getattr(optimizer.optimizer, "grad_partitions_flat_buffer", None)
    if shares is not None:
        shares.zero_()


def fill_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Give parameters without a gradient a zero gradient. Not those of DeepSpeed, which holds gradients itself."""
    for parameter in parameters:
        is_sharded = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        if parameter.grad is None and not is_sharded:
            parameter.grad = torch.zeros_like(parameter)


class Masters:
    """
    The float32 values of the trained parameters on this rank: whole parameters without DeepSpeed, its shards with it.

    Args:
        named_parameters (`Mapping[str, nn.Parameter]`):
            The trained parameters by name, after `Accelerator.prepare`.
        optimizer (`torch.optim.Optimizer`):
            The prepared optimizer.
    """

    def __init__(self, named_parameters: Mapping[str, Any], optimizer: Any) -> None:
        self.optimizer = optimizer
        self.is_zero3 = any(hasattr(parameter, "ds_id") for parameter in named_parameters.values())
        self.is_zero2 = any(hasattr(parameter, "_hp_mapping") for parameter in named_parameters.values())
        self.shapes = {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in named_parameters.items()}
        # ZeRO-2 shards one flat buffer of all parameters, so a rank has no part of most of them.
        self.parameters = {
            name: parameter
            for name, parameter in named_parameters.items()
            if not self.is_zero2 or getattr(parameter, "_hp_mapping", None) is not None
        }

    def values(self) -> list[nn.Parameter]:
        """This rank's shards, one for each parameter that it has a part of, on the device where they are kept."""
        if self.is_zero3:
            from deepspeed.utils import safe_get_local_fp32_param

            # It copies shards that are kept on the host to the GPU.
            return [
                nn.Parameter(safe_get_local_fp32_param(parameter).to(self._device(parameter)))
                for parameter in self.parameters.values()
            ]
        if self.is_zero2:
            return [nn.Parameter(parameter._hp_mapping.get_hp_fragment()) for parameter in self.parameters.values()]
        return list(self.parameters.values())

    def share_of(self, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """
        This rank's shards, as in `values`, of the given whole weights.

        Raises:
            ValueError: If the weight of a trained parameter is missing or has another shape.
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
            shares.append(self._cut(parameter, tensor).to(self._device(parameter)))
        return shares

    def write(self, values: Sequence[torch.Tensor]) -> None:
        """Write shards, as from `values`, into the parameters: float32 masters and working copies. A collective."""
        if self.is_zero3:
            # Small parameters are always gathered, others may be: their whole copies would keep the old values.
            self.optimizer.optimizer.checkpoint_event_prologue()
        for parameter, value in zip(self.parameters.values(), values, strict=True):
            if self.is_zero3:
                from deepspeed.utils import safe_set_local_fp32_param

                safe_set_local_fp32_param(parameter, value)
                parameter.ds_tensor.data.copy_(value.view_as(parameter.ds_tensor))
            elif self.is_zero2:
                parameter._hp_mapping.get_hp_fragment().data.copy_(value)
            else:
                parameter.data.copy_(value)
        if self.is_zero3:
            self.optimizer.optimizer.checkpoint_event_epilogue()
        if self.is_zero2:
            self.optimizer.optimizer.update_lp_params()

    def _device(self, parameter: Any) -> torch.device:
        """Where this rank's shard is kept."""
        if self.is_zero3:
            return parameter._z3_optimizer.get_hp_param_device(parameter)
        return parameter._hp_mapping.get_hp_fragment().device if self.is_zero2 else parameter.device

    def _cut(self, parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
        if self.is_zero3:
            # Shards have equal sizes; the last one is padded.
            size = parameter.ds_tensor.numel()
            start = dist.get_rank(parameter.ds_process_group) * size
            share = torch.zeros(size)
            own = tensor.flatten()[start : start + size]
            share[: own.numel()].copy_(own)
            return share
        if self.is_zero2:
            address = parameter._hp_mapping.lp_fragment_address
            tensor = tensor.flatten()[address.start : address.start + address.numel]
        return tensor.to(torch.float32, copy=True)
