"""`plan`: memory, FLOPs and time of a recipe, whether it fits, and options with which it would fit."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..configs.base import TrainingConfig, check
from ..configs.prfl import PRFLTrainingConfig
from ..configs.reward import RewardTrainingConfig
from ..formats.pipeline_info import PipelineInfo
from ..models.experts import Experts, choose_experts
from ..models.loading import load_scheduler
from .advice import cheapest_changes
from .engines import Engine
from .estimate import Estimate, Request, default_reward_config, estimate
from .workloads import TEXT_TOKENS, Shape


GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Plan:
    """
    What a run needs. Gigabytes are 10^9 bytes, per GPU.

    Args:
        command (`str`):
            `train_prfl` or `train_reward`.
        model (`str`):
            The pipeline.
        engine (`str`):
            Single process, DDP, or the ZeRO stage.
        num_gpus, context_parallel_degree (`int`):
            GPUs of the run, and GPUs that share a clip.
        num_parameters, num_trained (`int`):
            Parameters of the trained model, and how many of them are trained.
        num_tokens (`int`):
            Tokens per clip.
        memory (`dict[str, float]`):
            Gigabytes that are used all the time, by part.
        phases (`dict[str, float]`):
            Additional gigabytes of each phase of an update. Only the largest counts.
        reserved (`float`):
            Gigabytes assumed for the CUDA context, communication buffers and fragmentation.
        peak, gpu_memory (`float`):
            Gigabytes that are needed, and those of the GPU.
        host_memory (`dict[str, float]`), host_peak (`float`):
            Gigabytes of host memory of each process, by part and at the peak. The memory of `loading` is freed before
            the other parts are allocated.
        checkpoint (`float`), num_checkpoints (`int`, *optional*):
            Gigabytes of a checkpoint on disk, and the largest number of checkpoints at a time; None without a limit.
        teraflops (`dict[str, float]`):
            10^12 FLOPs of a step of the trainer for one replica, by part.
        seconds_per_step (`float`):
            Time of these FLOPs at the given rate, without communication.
        hours (`float`, *optional*):
            Time of the run, if its number of steps is known.
        changes (`list[str]`):
            Options with which the run fits, if it does not fit as it is; empty if there are none.
        changed_peak, changed_seconds_per_step (`float`, *optional*):
            Peak in gigabytes, and time of a step, with these options.
    """

    command: str
    model: str
    engine: str
    num_gpus: int
    context_parallel_degree: int
    num_parameters: int
    num_trained: int
    num_tokens: int
    memory: dict[str, float]
    phases: dict[str, float]
    reserved: float
    peak: float
    gpu_memory: float
    host_memory: dict[str, float]
    host_peak: float
    checkpoint: float
    num_checkpoints: int | None
    teraflops: dict[str, float]
    seconds_per_step: float
    hours: float | None = None
    changes: list[str] = dataclasses.field(default_factory=list)
    changed_peak: float | None = None
    changed_seconds_per_step: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the run fits without changes."""
        return self.peak <= self.gpu_memory

    def to_json(self) -> str:
        """The plan as a JSON object."""
        return json.dumps({**dataclasses.asdict(self), "fits": self.fits}, indent=2)

    def __str__(self) -> str:
        share = "" if self.context_parallel_degree == 1 else f", {self.context_parallel_degree} to a clip"
        lines = [
            f"{self.command} of {self.model}: {self.num_trained:,} of {self.num_parameters:,} parameters train",
            f"{self.num_tokens:,} tokens a clip, {self.num_gpus} GPU(s){share}, {self.engine}",
            "",
            "memory of a GPU, GB",
        ]
        lines += [_row(name, size) for name, size in self.memory.items() if size > 0]
        largest = max(self.phases, key=lambda name: self.phases[name])
        lines += [_row("reserved (assumed)", self.reserved)]
        lines += [
            _row(f"then {name}", size, "  <- counts" if name == largest else "") for name, size in self.phases.items()
        ]
        lines.append(_row("peak", self.peak, f"  of {self.gpu_memory:g}: {'fits' if self.fits else 'DOES NOT FIT'}"))
        lines += ["", "host memory of a process, GB"]
        lines += [_row(name, size) for name, size in self.host_memory.items() if size >= 0.05]
        lines.append(_row("peak", self.host_peak, f"  {self.num_gpus * self.host_peak:,.0f} for all processes"))
        kept = "  all are kept without `checkpoints_total_limit`"
        if self.num_checkpoints is not None:
            kept = f"  {self.num_checkpoints * self.checkpoint:,.0f} for {self.num_checkpoints} at a time"
        lines += ["", "disk, GB", _row("a checkpoint", self.checkpoint, kept)]
        total = sum(self.teraflops.values())
        lines += ["", "FLOPs of a step, TFLOP"]
        lines += [_row(name, count, f"  {count / total:.0%}") for name, count in self.teraflops.items()]
        lines.append(_row("time of a step, s", self.seconds_per_step, "  compute only, at the rate given"))
        if self.hours is not None:
            lines.append(_row("time of the run, h", self.hours))
        return "\n".join([*lines, *self._advice()])

    def _advice(self) -> list[str]:
        if self.fits:
            return []
        if self.changed_peak is None:
            return [
                "",
                "No change of options makes it fit. Use more or larger GPUs, fewer frames or a smaller size.",
            ]
        return [
            "",
            f"It fits with {', '.join(self.changes)}: {self.changed_peak:.1f} GB, {self.changed_seconds_per_step:.1f} s a step.",
        ]


def plan(
    training: TrainingConfig,
    *,
    height: int,
    width: int,
    num_frames: int,
    num_gpus: int = 1,
    gpu_memory: float = 80.0,
    zero_stage: int = 0,
    offload: bool = False,
    tflops: float = 989.0,
    utilization: float = 0.4,
    reserved: float = 3.0,
    num_rows: int | None = None,
    text_tokens: int = TEXT_TOKENS,
    first_frame: bool = False,
    reward_config: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    shared_backbones: Sequence[Sequence[int]] | None = None,
    engine: Engine | None = None,
) -> Plan:
    """
    Plan a recipe. Needs no weights, no data and no GPU.

    The models' own code runs on fake tensors, which gives the memory that it allocates and its FLOPs. The memory of
    engines and optimizers is computed from their rules. Time of communication and data loading is not included.

    Args:
        training (`PRFLTrainingConfig` or `RewardTrainingConfig`):
            The recipe.
        height, width, num_frames (`int`):
            Size of the clips in pixels and frames.
        num_gpus (`int`, defaults to 1):
            Processes of the run.
        gpu_memory (`float`, defaults to 80.0):
            Gigabytes (10^9) of a GPU.
        zero_stage (`int`, defaults to 0):
            0 for a single process or DDP, 2 or 3 for DeepSpeed's ZeRO as configured in `ds_configs/`.
        offload (`bool`, defaults to `False`):
            Keep weights and optimizer states in host memory, as `ds_configs/zero3_offload.json`.
        tflops (`float`, defaults to 989.0):
            Peak rate of a GPU in 10^12 dense bfloat16 FLOPs per second. The default is from the data sheet of an H100.
        utilization (`float`, defaults to 0.4):
            Share of the peak rate that a run reaches. An assumption; replace it by a measurement.
        reserved (`float`, defaults to 3.0):
            Gigabytes assumed for the CUDA context, communication buffers and fragmentation.
        num_rows (`int`, *optional*):
            Rows of the training dataset, or pairs for `bt`. Needed to plan the time of `num_train_epochs`.
        text_tokens (`int`, defaults to 512):
            Length that prompts are padded to.
        first_frame (`bool`, defaults to `False`):
            Whether clips of Wan2.2 TI2V 5B start with a given image.
        reward_config (`Mapping[str, Any]`, *optional*):
            Configuration of the reward model. If left out, it is one made from the first 8 blocks of the generator. For
            several reward models it is a list, with None for one whose configuration is not known.
        shared_backbones (`Sequence[Sequence[int]]`, *optional*):
            Places of reward models in groups with the same blocks; each has its own if left out.
        engine (`Engine`, *optional*):
            Replaces `num_gpus`, `zero_stage` and `offload`.

    Raises:
        ValueError: If clips cannot be divided over the GPUs, the VAE cannot encode a size, or `first_frame` is set for
            a model that takes no images, or takes them in another way.
    """
    check(0 < utilization <= 1, "utilization", utilization, "in (0, 1]")
    path, revision = training.pretrained_model_name_or_path, training.revision
    info = PipelineInfo.known(path, revision)
    config, stride, experts, shift = info.transformer, info.vae_stride, Experts(), 3.0
    if isinstance(training, PRFLTrainingConfig):
        experts = choose_experts(info, training.expert)
        if experts.are_two:
            shift = training.sampler_flow_shift or load_scheduler(path, revision=revision).config.flow_shift
    takes_none = "false: this model does not take an image as the first frame of the latents"
    check(info.takes_first_frame or not first_frame, "first_frame", first_frame, takes_none)
    frames_ok = num_frames % stride[0] == 1
    check(frames_ok, "num_frames", num_frames, f"of the form {stride[0]}k + 1")
    for name, side, multiple in (("height", height, 2 * stride[1]), ("width", width, 2 * stride[2])):
        check(side > 0 and side % multiple == 0, name, side, f"a multiple of {multiple}")
    default = default_reward_config(training, config)
    num_reward_models = len(training.reward_sources) if isinstance(training, PRFLTrainingConfig) else 1
    given = list(reward_config) if isinstance(reward_config, Sequence) else [reward_config] * num_reward_models
    first, *others = [each or default for each in given]
    latents = ((num_frames - 1) // stride[0] + 1, height // stride[1], width // stride[2])
    request = Request(
        training=training,
        transformer_config=config,
        reward_config=first,
        engine=engine or Engine(num_gpus=num_gpus, zero_stage=zero_stage, offload=offload),
        shape=Shape(training.train_batch_size, latents, text_tokens, first_frame),
        experts=experts,
        sampler_shift=shift,
        other_reward_configs=others,
        shared_backbones=shared_backbones,
        vae_stride=stride,
        has_residual_vae=info.has_residual_vae,
    )
    needs = estimate(request, reserved=reserved * GIGA)
    changes: list[str] = []
    changed: Estimate | None = None
    if needs.peak > gpu_memory * GIGA:
        changes, changed = cheapest_changes(request, capacity=gpu_memory * GIGA, reserved=reserved * GIGA)
    rate = tflops * utilization * TERA
    return _to_plan(request, needs, gpu_memory, rate, num_rows, changes, changed)


def _to_plan(
    request: Request,
    needs: Estimate,
    gpu_memory: float,
    rate: float,
    num_rows: int | None,
    changes: list[str],
    changed: Estimate | None,
) -> Plan:
    training, engine = request.training, request.engine
    limit = training.checkpoints_total_limit
    seconds = sum(needs.flops.values()) / training.context_parallel_degree / rate
    num_steps = training.max_train_steps
    if num_steps is None and num_rows is not None:
        replicas = engine.num_gpus // training.context_parallel_degree
        rows_per_step = replicas * training.train_batch_size * training.gradient_accumulation_steps
        num_steps = training.num_train_epochs * -(-num_rows // rows_per_step)
    degree = training.context_parallel_degree
    for change in changes:
        if change.startswith("--context_parallel_degree"):
            degree = int(change.split()[1])
    return Plan(
        command="train_reward" if isinstance(training, RewardTrainingConfig) else "train_prfl",
        model=training.pretrained_model_name_or_path,
        engine=engine.name,
        num_gpus=engine.num_gpus,
        context_parallel_degree=training.context_parallel_degree,
        num_parameters=needs.num_parameters,
        num_trained=needs.num_trained,
        num_tokens=request.num_tokens,
        memory={name: size / GIGA for name, size in needs.held.items()},
        phases={name: size / GIGA for name, size in needs.phases.items()},
        reserved=needs.reserved / GIGA,
        peak=needs.peak / GIGA,
        gpu_memory=gpu_memory,
        host_memory={name: size / GIGA for name, size in needs.host_memory.items()},
        host_peak=needs.host_peak / GIGA,
        checkpoint=needs.checkpoint / GIGA,
        num_checkpoints=None if limit is None else limit + (0 if training.delete_checkpoints_first else 1),
        teraflops={name: count / TERA for name, count in needs.flops.items()},
        seconds_per_step=seconds,
        hours=None if num_steps is None else num_steps * seconds / 3600,
        changes=changes,
        changed_peak=None if changed is None else changed.peak / GIGA,
        changed_seconds_per_step=None if changed is None else sum(changed.flops.values()) / degree / rate,
    )


def _row(name: str, value: float, remark: str = "") -> str:
    return f"  {name:<28}{value:>12,.1f}{remark}"
