"""One training step of a recipe at its real size, with the trainers' own code on the pretended device."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import UniPCMultistepScheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from examples.real_size.pretended_cuda import DeviceMeter, put_on_device
from examples.real_size.quantized import quantize_layers
from hy_prfl.configs.base import TrainingConfig
from hy_prfl.configs.prfl import UPDATES, PRFLTrainingConfig
from hy_prfl.data.collators import LabeledBatch, LatentBatch, PreferenceBatch
from hy_prfl.flow_matching import noise_levels
from hy_prfl.models.experts import Experts
from hy_prfl.planning.models import build_reward_model, build_transformer, reward_model_config, set_dtypes
from hy_prfl.planning.workloads import IMAGE_TOKENS, TEXT_TOKENS
from hy_prfl.rollout.reward_feedback import RewardFeedback, always_in_use
from hy_prfl.runtime.activation_checkpointing import HostBuffers, checkpoint_activations
from hy_prfl.runtime.context_parallel import ContextParallelGroup
from hy_prfl.runtime.host_weights import HostWeights
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer
from hy_prfl.trainers.updates import Updates


# Type of the tensors in a dataset.
STORED = torch.float16


@dataclass(frozen=True)
class Setting:
    """
    A recipe, its models and its engine.

    Args:
        training (`TrainingConfig`):
            The recipe.
        transformer_config (`Mapping[str, Any]`):
            Configuration of the generator.
        experts (`Experts`):
            The experts of its pipeline.
        latents_shape (`tuple[int, int, int, int]`):
            `(num_channels, num_frames, height, width)` of a clip.
        zero_stage (`int`):
            0 is DDP or one process, with bfloat16 autocast. With 2 or 3 all weights are in bfloat16. They are not
            sharded here, and gradients are freed as soon as they are computed: the memory of the engine is not
            measured.
        num_gpus (`int`):
            GPUs of the run. With more than one, DDP keeps the memory of gradients from one update to the next.
        first_frame (`bool`):
            Whether clips start with a given image (TI2V 5B).
    """

    training: TrainingConfig
    transformer_config: Mapping[str, Any]
    experts: Experts
    latents_shape: tuple[int, int, int, int]
    zero_stage: int
    num_gpus: int
    first_frame: bool = False


@dataclass(frozen=True)
class Measurement:
    """
    Memory and FLOPs of a step.

    Args:
        weights, peak (`int`):
            Bytes on the device before the step, and at its peak.
        flops (`int`):
            FLOPs of the step on one GPU.
        num_syncs (`int`):
            How often the host waited for the device.
        sync_places (`dict[str, int]`):
            Number of waits by file and line.
        step_range (`tuple[int, int]`, *optional*):
            PRFL: first and last step of a chain that may take gradient. The gradient is that of the second.
        host_buffers (`int`):
            Bytes of page-locked host memory.
        metrics (`dict[str, str]`):
            Types of the metrics that the step returned.
    """

    weights: int
    peak: int
    flops: int
    num_syncs: int
    sync_places: dict[str, int]
    step_range: tuple[int, int] | None
    host_buffers: int
    metrics: dict[str, str]


def measure(setting: Setting) -> Measurement:
    """Run one step of a recipe without gradient accumulation. PRFL's gradient is at the second possible step."""
    meter = DeviceMeter()
    group = _context_parallel_group(setting.training.context_parallel_degree)
    with FakeTensorMode(allow_non_fake_inputs=True), meter:
        is_prfl = isinstance(setting.training, PRFLTrainingConfig)
        build = _build_prfl if is_prfl else _build_reward
        trainer, in_host_memory = build(setting, group)
        weights = meter.live
        trainer.updates.optimizer.allocate()
        meter.peak = meter.live
        meter.flops, meter.num_syncs = 0, 0
        meter.sync_places.clear()
        metrics = trainer.train_step()
    return Measurement(
        weights=weights,
        peak=meter.peak,
        flops=meter.flops,
        num_syncs=meter.num_syncs,
        sync_places=dict(meter.sync_places),
        step_range=trainer.step_range if is_prfl else None,
        host_buffers=sum(each.nbytes for each in in_host_memory),
        metrics={name: str(value.dtype) for name, value in metrics.items()},
    )


def _context_parallel_group(degree: int) -> ContextParallelGroup | None:
    """A group of pretended ranks. Like all tensors here, what they send has no values."""
    if degree == 1:
        return None
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with _disable_current_modes():
        if not dist.is_initialized():
            dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
        return ContextParallelGroup(degree)


class OneProcess:
    """The part of Accelerate that the trainers use, for one process of a run."""

    def __init__(self, *, autocast: bool) -> None:
        self.uses_autocast = autocast
        self.mixed_precision = "bf16"
        self.device = torch.device("cuda", 0)
        self.num_processes, self.process_index, self.is_main_process = 1, 0, True
        self.sync_gradients = False
        self.gradient_accumulation_steps, self.step = 1, 0

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.uses_autocast)

    @contextmanager
    def accumulate(self, model: torch.nn.Module) -> Iterator[None]:
        self.step += 1
        self.sync_gradients = self.step % self.gradient_accumulation_steps == 0
        yield

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        return tensor

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.gradient_accumulation_steps).backward()

    def clip_grad_norm_(self, parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


class OneShareOfZeRO(OneProcess):
    """The same under DeepSpeed. Its engine takes each gradient as soon as it is computed."""

    def clip_grad_norm_(self, parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
        return torch.zeros((), device=self.device)


class Optimizer:
    """AdamW with the interface of Accelerate's wrapper. Does nothing under DeepSpeed, whose engine makes the step."""

    def __init__(
        self, accelerator: OneProcess, parameters: list[torch.Tensor], *, is_sharded: bool, keeps_gradients: bool
    ) -> None:
        self.accelerator, self.parameters = accelerator, parameters
        self.keeps_gradients = keeps_gradients
        self.optimizer = None if is_sharded else torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def allocate(self) -> None:
        """Allocate what is there from the first update on: the optimizer's states, and gradients that are kept."""
        if self.optimizer is not None:
            for parameter in self.parameters:
                parameter.grad = torch.empty_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def zero_grad(self) -> None:
        if self.optimizer is not None and self.accelerator.sync_gradients:
            self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)


class _WithoutLaunch:
    """Replaces what a trainer's constructor reads from the launch configuration."""

    weight_dtype = torch.bfloat16

    def generators(self, stream: int, micro_step: int, batch_size: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(index) for index in range(batch_size)]


class RealSizeRewardTrainer(_WithoutLaunch, RewardTrainer):
    """`RewardTrainer` with given models."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class RealSizePRFLTrainer(_WithoutLaunch, PRFLTrainer):
    """`PRFLTrainer` with given models. Gradients start at the second of the possible steps."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def draw_step_indices(self, micro_step: int) -> list[int]:
        first = self.step_range[0] + 1
        return list(range(first, first + self.config.num_gradient_steps))

    def draw_expert(self, micro_step: int) -> Any:
        return self.experts.trained[0]


def _numerics(setting: Setting) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Types of trained parameters, of the base of an adapter, and of frozen models."""
    half = torch.bfloat16
    if setting.zero_stage:
        return half, half, half
    return torch.float32, half if setting.training.lora_rank is not None else torch.float32, half


def _wrap(setting: Setting, model: Any) -> Any:
    """Without DeepSpeed, put autocast around a model's forward as Accelerate does."""
    if setting.zero_stage == 0:
        forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(forward)
    return model


def _set_up(setting: Setting, model: Any, num_blocks: int | None, group: Any, buffers: HostBuffers) -> None:
    training = setting.training
    if training.gradient_checkpointing:
        checkpoint_activations(model, num_blocks=num_blocks, offload=training.offload_activations, buffers=buffers)
    if group is not None:
        group.split(model)


def _common(
    setting: Setting, model: Any, group: Any, parameters: list[torch.Tensor], backwards_per_update: int = 1
) -> dict[str, Any]:
    """Attributes that both trainers have."""
    accelerator = (OneShareOfZeRO if setting.zero_stage else OneProcess)(autocast=setting.zero_stage == 0)
    if setting.zero_stage:
        for parameter in parameters:
            parameter._hp_mapping = None
            parameter.register_post_accumulate_grad_hook(_take_gradient)
    # DDP keeps them from one update to the next, and gradient accumulation from one micro-batch to the next.
    keeps_gradients = setting.num_gpus > 1 or setting.training.gradient_accumulation_steps * backwards_per_update > 1
    updates = Updates(
        accelerator,  # type: ignore[arg-type]
        Optimizer(accelerator, parameters, is_sharded=setting.zero_stage > 0, keeps_gradients=keeps_gradients),
        parameters,
        max_grad_norm=1.0,
        max_skipped_updates=3,
    )
    return {
        "config": dataclasses.replace(setting.training, gradient_accumulation_steps=1),
        "accelerator": accelerator,
        "updates": updates,
        "unwrapped": model,
        "context_parallel": group,
        "noise_levels": noise_levels(setting.training),
        "global_step": 0,
        "run": SimpleNamespace(engine="whole", backwards_per_update=backwards_per_update, num_replicas=1, replica=0),
    }


def _take_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _clips(setting: Setting, *, batch_size: int) -> LatentBatch:
    """Clips as a data loader returns them: in the stored type and in host memory."""
    config, (channels, frames, height, width) = setting.transformer_config, setting.latents_shape
    num_condition = config["in_channels"] - config["out_channels"]
    condition_frames = frames
    if setting.first_frame:
        num_condition, condition_frames = channels, 1
    empty = functools.partial(torch.empty, dtype=STORED)
    text = (batch_size, TEXT_TOKENS, config["text_dim"])
    both = config["pos_embed_seq_len"]
    images = (1, IMAGE_TOKENS) if both is None else (2, both // 2)
    return LatentBatch(
        ids=["clip"] * batch_size,
        latents_shape=setting.latents_shape,
        latents=empty(batch_size, *setting.latents_shape),
        prompt_embeds=empty(*text),
        long_prompt_embeds=empty(*text),
        null_prompt_embeds=empty(*text),
        num_tokens=TEXT_TOKENS,
        image_embeds=empty(images[0] * batch_size, images[1], config["image_dim"]) if config["image_dim"] else None,
        condition=empty(batch_size, num_condition, condition_frames, height, width) if num_condition else None,
    )


def _forever(make: Any) -> Iterator[Any]:
    while True:
        yield make()


def _build_reward(setting: Setting, group: Any) -> tuple[Any, list[HostBuffers | HostWeights]]:
    training, buffers = setting.training, HostBuffers()
    assert not isinstance(training, PRFLTrainingConfig)
    config = reward_model_config(setting.transformer_config, training)  # type: ignore[arg-type]
    with _disable_current_modes():
        model = build_reward_model(config, training)  # type: ignore[arg-type]
        trained = torch.bfloat16 if setting.zero_stage else torch.float32
        set_dtypes(model, frozen=trained, trained=trained, keep_in_fp32=False)
        quantize_layers(model, "base_quantization", training.base_quantization)
    put_on_device(model)
    _set_up(setting, model, training.gradient_checkpointing_blocks, group, buffers)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch_size = training.train_batch_size

    def batch() -> LabeledBatch | PreferenceBatch:
        clips = functools.partial(_clips, setting, batch_size=batch_size)
        if training.loss == "bce":  # type: ignore[attr-defined]
            return LabeledBatch(clips=clips(), labels=torch.empty(batch_size))
        return PreferenceBatch(chosen=clips(), rejected=clips())

    attributes = _common(setting, model, group, parameters)
    trainer = RealSizeRewardTrainer(**attributes, wrapped=_wrap(setting, model), average=None, batches=_forever(batch))
    model.train()
    return trainer, [buffers]


def _build_prfl(setting: Setting, group: Any) -> tuple[Any, list[HostBuffers | HostWeights]]:
    training, experts = setting.training, setting.experts
    # As in a run, the reward model has its own buffers.
    buffers, reward_buffers = HostBuffers(), HostBuffers()
    assert isinstance(training, PRFLTrainingConfig)
    trained, base, frozen = _numerics(setting)
    transformers = {}
    names = [*experts.trained, experts.frozen(rolls_out=training.update_schedule != "flow_matching", samples=False)]
    for name in (each for each in names if each is not None):
        is_trained = name in experts.trained
        with _disable_current_modes():
            model = build_transformer(setting.transformer_config, training, frozen=not is_trained)
            keeps = setting.zero_stage == 0 or not is_trained
            set_dtypes(model, frozen=base if is_trained else frozen, trained=trained, keep_in_fp32=keeps)
            option = "base_quantization" if is_trained else "frozen_expert_quantization"
            quantize_layers(model, option, getattr(training, option))
        put_on_device(model)
        blocks = training.gradient_checkpointing_blocks if is_trained else 0
        _set_up(setting, model, blocks, group, buffers)
        transformers[name] = model
    with _disable_current_modes():
        reward_model = build_reward_model(reward_model_config(setting.transformer_config)).eval()
        set_dtypes(reward_model, frozen=frozen, trained=frozen, keep_in_fp32=True)
        quantize_layers(reward_model, "reward_model_quantization", training.reward_model_quantization)
    put_on_device(reward_model)
    offloads = training.offload_reward_model
    hosts = {reward_model: HostWeights(reward_model, torch.device("cuda", 0))} if offloads else {}
    _set_up(setting, reward_model, training.reward_gradient_checkpointing_blocks, group, reward_buffers)
    unwrapped = experts.join({name: transformers[name] for name in experts.trained})
    parameters = [parameter for parameter in unwrapped.parameters() if parameter.requires_grad]
    unwrapped.train()
    transformer = _wrap(setting, unwrapped)
    frozen_experts = {name: model for name, model in transformers.items() if name not in experts.trained}
    generator = transformer
    if frozen_experts:
        generator = experts.join({experts.trained[0]: transformer, **frozen_experts})
    shift = training.sampler_flow_shift or 3.0
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    with _disable_current_modes():
        scheduler.set_timesteps(training.num_inference_steps)
        step_range = experts.gradient_steps(
            scheduler.timesteps.tolist(),
            training.step_range,
            training.num_gradient_steps,
            training.num_chained_steps,
        )
    num = {"flow": 1, "reward": training.num_gradient_steps * training.num_chained_steps}
    most = max(sum(num[loss] for loss in losses) for losses in UPDATES[training.update_schedule])
    common = _common(setting, unwrapped, group, parameters, most)
    trainer = RealSizePRFLTrainer(
        **common,
        reward=RewardFeedback(
            training,
            [reward_model],
            names=["reward"],
            autocast=common["accelerator"].autocast,
            context_parallel=group,
            in_use=(lambda model: hosts[model].on_device()) if hosts else always_in_use,
        ),
        wrapped=transformer,
        generator=generator,
        average=None,
        rollouts=None,
        as_base=None,
        experts=experts,
        num_backwards=num,
        step_range=step_range,
        high_noise_probability=0.5,
        scheduler=scheduler,
        flow_batches=_forever(lambda: _clips(setting, batch_size=training.train_batch_size)),
        reward_batches=_forever(lambda: _clips(setting, batch_size=training.train_batch_size)),
    )
    return trainer, [buffers, reward_buffers, *hosts.values()]
