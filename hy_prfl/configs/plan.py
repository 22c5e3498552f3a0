"""Options of `plan`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import Config, check


@dataclass(kw_only=True)
class PlanConfig(Config):
    """Options of `plan --config recipe.yaml`. Options of the recipe may be given too; they replace its values."""

    recipe: str = field(
        metadata={"help": "Recipe of train_prfl, train_reward or generate. On the command line also `--config`."}
    )
    recipe_command: Literal["train_prfl", "train_reward", "generate"] | None = field(
        default=None, metadata={"help": "Command that the recipe is for; inferred from its keys if left out."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write the plan to."})

    # Parameters of the clips
    height: int = field(default=480, metadata={"help": "Height of the clips in pixels."})
    width: int = field(default=832, metadata={"help": "Width of the clips in pixels."})
    num_frames: int = field(default=81, metadata={"help": "Frames of the clips, 4k + 1."})
    first_frame: bool = field(
        default=False,
        metadata={
            "help": "For Wan2.2 TI2V 5B: clips start from a given image. For other models this is inferred from the pipeline."
        },
    )
    num_rows: int | None = field(
        default=None, metadata={"help": "Clips, or pairs, in the training dataset, to estimate the hours of a run."}
    )

    # Parameters of the machine
    num_gpus: int = field(default=1, metadata={"help": "GPUs of the run."})
    gpu_memory: float = field(default=80.0, metadata={"help": "Memory of a GPU in GB, 10^9 bytes."})
    zero_stage: int = field(
        default=0, metadata={"help": "0 for a single process or DDP, 2 or 3 for ZeRO as in ds_configs/."}
    )
    offload: bool = field(
        default=False,
        metadata={"help": "Keep weights and optimizer states in host memory, as in ds_configs/zero3_offload.json."},
    )
    tflops: float = field(
        default=989.0, metadata={"help": "Peak of a GPU in dense bfloat16 TFLOP/s; the default is an H100's."}
    )
    utilization: float = field(default=0.4, metadata={"help": "Assumed share of that peak that is reached."})
    reserved_memory: float = field(
        default=3.0,
        metadata={"help": "Assumed GB for the CUDA context, communication buffers and fragmentation."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("height", "width", "num_frames", "num_gpus"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("gpu_memory", "tflops"):
            check(getattr(self, name) > 0, name, getattr(self, name), "greater than 0")
        check(self.zero_stage in (0, 2, 3), "zero_stage", self.zero_stage, "0, 2 or 3")
        check(self.zero_stage == 3 or not self.offload, "offload", self.offload, "false without `zero_stage` 3")
        check(0 < self.utilization <= 1, "utilization", self.utilization, "in (0, 1]")
        check(self.reserved_memory >= 0, "reserved_memory", self.reserved_memory, "at least 0")
        check(self.num_rows is None or self.num_rows >= 1, "num_rows", self.num_rows, "at least 1, or left out")
