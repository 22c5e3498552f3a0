"""Memory of an engine on each GPU besides activations: weights, gradients, optimizer states, and its buffers."""

from dataclasses import dataclass

import torch

from ..configs.base import check
from .models import ParameterSizes
from .workloads import Numerics


FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Engine:
    """
    How a run is distributed over GPUs.

    Bucket sizes are those of `ds_configs/`; where these do not set one, it is DeepSpeed's default.

    Args:
        num_gpus (`int`):
            Processes.
        zero_stage (`int`, defaults to 0):
            0 is a single process or DDP, with bfloat16 autocast. 2 and 3 are DeepSpeed's ZeRO, with all weights in
            bfloat16 and float32 masters in the optimizer.
        offload (`bool`, defaults to `False`):
            With ZeRO-3, keep weights, gradients and optimizer states in host memory between uses.
        mixed_precision (`bool`, defaults to `True`):
            Use bfloat16. If false, everything is float32, as on the CPU.
        on_gpu (`bool`, defaults to `True`):
            Count the allocations of a GPU's kernels instead of a CPU's.
    """

    num_gpus: int = 1
    zero_stage: int = 0
    offload: bool = False
    mixed_precision: bool = True
    on_gpu: bool = True

    zero2_reduce_bucket = 200_000_000
    zero3_reduce_bucket = 100_000_000
    zero3_prefetch_bucket = 100_000_000
    zero3_persistence_threshold = 100_000
    zero3_max_live_parameters = 1_000_000_000
    zero3_sub_group = 1_000_000_000

    def __post_init__(self) -> None:
        check(self.num_gpus >= 1, "num_gpus", self.num_gpus, "at least 1")
        check(self.zero_stage in (0, 2, 3), "zero_stage", self.zero_stage, "0, 2 or 3")
        check(self.zero_stage == 3 or not self.offload, "offload", self.offload, "false without `zero_stage` 3")
        is_bf16 = self.mixed_precision or self.zero_stage == 0
        check(is_bf16, "mixed_precision", self.mixed_precision, "true: with DeepSpeed only bfloat16 can be planned")

    @property
    def name(self) -> str:
        """Short name for tables."""
        if self.zero_stage:
            return f"ZeRO-{self.zero_stage}{' with offload' if self.offload else ''}"
        return "DDP" if self.num_gpus > 1 else "one process"

    def numerics(self, *, is_lora: bool) -> Numerics:
        """Types of parameters and computation in a run."""
        half = torch.bfloat16 if self.mixed_precision else torch.float32
        is_whole = self.zero_stage == 0
        trained = torch.float32 if is_whole else half
        return Numerics(
            frozen=half if is_lora or not is_whole else torch.float32,
            trained=trained,
            compute=half,
            autocast=self.mixed_precision and is_whole,
            keeps_in_fp32=is_whole,
            on_gpu=self.on_gpu,
        )

    def held(self, sizes: ParameterSizes) -> dict[str, float]:
        """Bytes that a trained model takes on each GPU all the time, by part."""
        if self.zero_stage == 0:
            # DDP's buckets take no extra memory: gradients are views of them (`gradient_as_bucket_view`).
            return {
                "weights": sizes.num_bytes,
                "gradients": sizes.trained_bytes,
                "optimizer states": 2 * FLOAT32 * sizes.trained,
            }
        share = sizes.trained / self.num_gpus
        # With `ds_configs/`, gradients are accumulated in float32, and a bucket is reduced in a float32 copy.
        states = {"gradients": FLOAT32 * share, "optimizer states": 3 * FLOAT32 * share}
        if self.zero_stage == 2:
            # Two buckets: one is filled while the other is reduced.
            return {
                "weights": BFLOAT16 * sizes.total,
                **states,
                "gradient buckets": (2 * BFLOAT16 + FLOAT32) * self.zero2_reduce_bucket,
            }
        whole = sizes.persistent + (0 if self.offload else (sizes.total - sizes.persistent) / self.num_gpus)
        gathered = min(sizes.total, self.zero3_max_live_parameters) + min(sizes.total, self.zero3_prefetch_bucket)
        return {
            "weights": BFLOAT16 * whole,
            **(dict.fromkeys(states, 0.0) if self.offload else states),
            "gradient buckets": (BFLOAT16 + FLOAT32) * self.zero3_reduce_bucket,
            "gathered weights": BFLOAT16 * gathered,
        }

    def step_memory(self, sizes: ParameterSizes) -> float:
        """Bytes that the optimizer's step allocates, after the activations are freed."""
        # The fused AdamW makes no copies. ZeRO-2 passes it the accumulated gradients, ZeRO-3 a copy of one group.
        if self.zero_stage != 3 or not self.on_gpu or self.offload:
            return 0
        return FLOAT32 * min(sizes.trained / self.num_gpus, self.zero3_sub_group)

    def average(self, sizes: ParameterSizes) -> float:
        """Bytes of the averaged weights (EMA) of each process: on its GPU, or in host memory with `offload`."""
        return FLOAT32 * sizes.trained / (self.num_gpus if self.zero_stage else 1)

    def host_memory(self, sizes: ParameterSizes) -> float:
        """Bytes of host memory that each process takes all the time: with `offload`, weights, gradients and states."""
        if not self.offload:
            return 0
        return (BFLOAT16 * sizes.total + 4 * FLOAT32 * sizes.trained) / self.num_gpus

    def loading_memory(self, sizes: ParameterSizes, *, is_frozen: bool, is_quantized: bool = False) -> float:
        """
        Bytes of host memory that each process takes while it loads a model: the whole model, or one block with ZeRO-3.

        Args:
            is_frozen (`bool`):
                Whether the model is the frozen base of an adapter and is loaded in half precision. ZeRO-2 loads other
                models in float32, and casts them when the engine is set up.
            is_quantized (`bool`, defaults to `False`):
                Whether its blocks are quantised during loading.
        """
        if self.zero_stage == 3:
            return BFLOAT16 * sizes.block
        if is_quantized:
            # Quantised weights are moved to the GPU one by one, those outside the blocks stay in host memory.
            return FLOAT32 * sizes.rest
        return sizes.num_bytes if self.zero_stage == 0 else sizes.total * (BFLOAT16 if is_frozen else FLOAT32)

    def checkpoint_size(self, sizes: ParameterSizes, *, is_lora: bool, has_average: bool) -> float:
        """
        Bytes of a checkpoint on disk.

        It has the model or the adapter in float32, the same again for averaged weights, and AdamW's two moments. With
        DeepSpeed it also has the float32 masters.
        """
        model = FLOAT32 * (sizes.trained if is_lora else sizes.total)
        optimizer = FLOAT32 * sizes.trained * (3 if self.zero_stage else 2)
        return optimizer + model * (2 if has_average else 1)


def frozen_memory(sizes: ParameterSizes, *, num_gpus: int, is_sharded: bool) -> tuple[float, float]:
    """
    Bytes of a frozen model's weights on each GPU, and of what is gathered, whole or sharded by torch's `fully_shard`.

    A sharded model gathers the weights outside its blocks, the current block and the next one. Gathering a block takes
    a buffer of its size.
    """
    if not is_sharded or num_gpus == 1:
        return sizes.num_bytes, 0.0
    per_parameter = sizes.num_bytes / sizes.total
    return sizes.num_bytes / num_gpus, per_parameter * (sizes.rest + 3 * sizes.block)
