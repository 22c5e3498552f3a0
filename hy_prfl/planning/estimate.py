"""Memory of a GPU and FLOPs of an update, for one recipe on one engine."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from ..configs.base import Quantization, TrainingConfig, check
from ..configs.prfl import PRFLTrainingConfig
from ..configs.reward import RewardTrainingConfig
from ..evaluation.drift import DRIFT_SIGMAS
from ..formats.pipeline_info import VAE_STRIDE
from ..losses import RewardCombination
from ..models.experts import Experts
from ..models.shared_backbone import own_parts
from ..rollout.step_cache import forward_steps
from ..runtime.context_parallel import check_divisible
from ..runtime.vae_tiling import pass_memory, tiled_decoding_memory
from .engines import BFLOAT16, FLOAT32, Engine, frozen_memory
from .models import (
    GENERATOR_OPTIONS,
    REWARD_OPTIONS,
    Counting,
    build_reward_model,
    freeze,
    generator_sizes,
    options_of,
    reward_model_config,
    reward_model_sizes,
    set_dtypes,
)
from .simulation import Phase
from .workloads import Numerics, Shape, generator_phases, reward_phases, reward_training_phases


# Bytes of a VAE's weights: whether it is residual -> bytes.
VAE_BYTES = {False: 507_570_124, True: 2_818_754_672}


@dataclass(frozen=True)
class Request:
    """
    What is to be estimated.

    Args:
        training (`PRFLTrainingConfig` or `RewardTrainingConfig`):
            The recipe.
        transformer_config (`Mapping[str, Any]`):
            Configuration of the generator, or of what the reward model is made from.
        reward_config (`Mapping[str, Any]`):
            Configuration of the reward model.
        engine (`Engine`):
            How the run is spread over GPUs.
        shape (`Shape`):
            Clips of a micro-batch.
        experts (`Experts`, *optional*):
            The experts of the pipeline, both as large as the generator; one transformer if left out.
        sampler_shift (`float`, defaults to 3.0):
            Shift of the sampler's grid, which divides a chain's steps between two experts.
        other_reward_configs (`Sequence[Mapping[str, Any]]`, *optional*):
            Configurations of the reward models beside the first, of a recipe with several.
        shared_backbones (`Sequence[Sequence[int]]`, *optional*):
            Places of reward models in groups with the same backbone, see
            [`~hy_prfl.models.shared_backbone.group_by_backbone`]; each has its own if left out.
        vae_stride (`tuple[int, int, int]`), has_residual_vae (`bool`):
            Properties of the pipeline's VAE, see [`~hy_prfl.formats.pipeline_info.PipelineInfo`]; Wan 2.1's if left out.
    """

    training: TrainingConfig
    transformer_config: Mapping[str, Any]
    reward_config: Mapping[str, Any]
    engine: Engine
    shape: Shape
    experts: Experts = Experts()
    sampler_shift: float = 3.0
    other_reward_configs: Sequence[Mapping[str, Any]] = ()
    shared_backbones: Sequence[Sequence[int]] | None = None
    vae_stride: tuple[int, int, int] = VAE_STRIDE
    has_residual_vae: bool = False

    @property
    def reward_configs(self) -> list[Mapping[str, Any]]:
        """Configurations of all reward models."""
        return [self.reward_config, *self.other_reward_configs]

    @property
    def reward_groups(self) -> list[list[Mapping[str, Any]]]:
        """Configurations of the reward models that are called together. Sharded ones are called one by one."""
        configs = self.reward_configs
        if self.shared_backbones is None or getattr(self.training, "shard_reward_model", False):
            return [[each] for each in configs]
        return [[configs[place] for place in places] for places in self.shared_backbones]

    @property
    def num_tokens(self) -> int:
        """Tokens of one clip."""
        return self.shape.num_tokens(self.transformer_config["patch_size"])

    @property
    def width(self) -> int:
        """Width of a token."""
        return int(self.transformer_config["num_attention_heads"] * self.transformer_config["attention_head_dim"])

    def check(self) -> None:
        """Raise a `ValueError` if clips do not divide over GPUs, or the engine does not take the recipe."""
        for option in ("base_quantization", "frozen_expert_quantization", "reward_model_quantization"):
            kind = getattr(self.training, option, None)
            check(self.engine.zero_stage == 0 or kind is None, option, kind, "left out under ZeRO")
        compiles = self.training.compile
        check(self.engine.zero_stage == 0 or not compiles, "compile", compiles, "false under ZeRO")
        degree, num_gpus = self.training.context_parallel_degree, self.engine.num_gpus
        fits = num_gpus % degree == 0
        check(fits, "context_parallel_degree", degree, f"a divisor of `num_gpus`, {num_gpus}")
        check_divisible(
            degree,
            num_heads=self.transformer_config["num_attention_heads"],
            patch_size=self.transformer_config["patch_size"],
            shapes=[(self.transformer_config["out_channels"], *self.shape.latents)],
            source="the plan",
        )


@dataclass(frozen=True)
class Estimate:
    """
    Needs of a run. Memory is in bytes on each GPU, FLOPs are those of one update of a whole replica.

    Args:
        held (`dict[str, float]`):
            Bytes that are allocated all the time, by part.
        phases (`dict[str, float]`):
            Additional bytes at the peak of each phase of an update. Only the largest phase counts.
        flops (`dict[str, float]`):
            FLOPs of an update, by part. Context parallelism divides them over its GPUs.
        host_memory (`dict[str, float]`):
            Bytes of host memory of each process, by part. `loading` is freed before the others are allocated.
        checkpoint (`float`):
            Bytes of a checkpoint on disk.
        num_parameters, num_trained (`int`):
            Parameters of the model in training, and how many of them train.
    """

    held: dict[str, float]
    phases: dict[str, float]
    flops: dict[str, float]
    host_memory: dict[str, float]
    checkpoint: float
    num_parameters: int
    num_trained: int
    reserved: float = 0.0

    @property
    def peak(self) -> float:
        """Most bytes needed at a time."""
        return sum(self.held.values()) + max(self.phases.values()) + self.reserved

    @property
    def host_peak(self) -> float:
        """Most bytes of host memory that a process needs at a time, besides Python and its libraries."""
        loading = self.host_memory["loading"]
        return max(loading, sum(self.host_memory.values()) - loading)


def estimate(request: Request, *, reserved: float = 0.0) -> Estimate:
    """
    Estimate one recipe.

    Args:
        reserved (`float`):
            Bytes that are not allocations of the program: the CUDA context, NCCL's buffers, fragmentation.
    """
    request.check()
    if isinstance(request.training, PRFLTrainingConfig):
        return _estimate_prfl(request, request.training, reserved)
    assert isinstance(request.training, RewardTrainingConfig)
    return _estimate_reward(request, request.training, reserved)


def _estimate_prfl(request: Request, training: PRFLTrainingConfig, reserved: float) -> Estimate:
    engine, config = request.engine, request.transformer_config
    numerics = engine.numerics(is_lora=training.lora_rank is not None)
    experts = request.experts
    frozen_config, options = freeze(config), options_of(training, GENERATOR_OPTIONS)
    counting = _counting(numerics, numerics.frozen, engine, training.base_quantization)
    sizes = generator_sizes(frozen_config, options, counting).times(len(experts.trained))
    uses_reward, uses_flow = training.update_schedule != "flow_matching", training.update_schedule != "reward"
    average = engine.average(sizes) if training.use_ema else 0.0
    held = engine.held(sizes) | {"averaged weights": 0.0 if engine.offload else average}
    part = request.shape.part(training.context_parallel_degree, config["patch_size"])
    generator = generator_phases(config, training, numerics, part)
    flow_peak = max(generator["forward"].peak, generator["backward"].peak)
    phases = {"optimizer step": engine.step_memory(sizes)}
    # Also without reward updates: it scores the validation samples.
    weights = []
    for config_of_one, *others in request.reward_groups:
        counting = _counting(numerics, numerics.compute, engine, training.reward_model_quantization)
        reward_sizes = reward_model_sizes(freeze(config_of_one), None, counting)
        size, gathered = frozen_memory(reward_sizes, num_gpus=engine.num_gpus, is_sharded=training.shard_reward_model)
        weights.append((size + sum(_own_bytes(each, numerics) for each in others), gathered))
    # Only one of them computes at a time.
    whole, most_gathered = sum(size for size, _ in weights), max(gathered for _, gathered in weights)
    on_host = whole if training.offload_reward_model else 0.0
    # Assumes that the monitor's reward models have the same size. Offloaded ones are on the device one at a time.
    num_monitors = len(training.monitor_reward_models)
    held |= {"reward model": whole - on_host, "reward model, gathered": most_gathered}
    if num_monitors:
        held["monitor's reward models"] = num_monitors * (whole - on_host)
    host_memory = {
        "loading": engine.loading_memory(
            sizes, is_frozen=training.lora_rank is not None, is_quantized=training.base_quantization is not None
        ),
        "weights and optimizer states": engine.host_memory(sizes),
        "averaged weights": average if engine.offload else 0.0,
        "reward model in host memory": (1 + num_monitors) * on_host,
    }
    block_inputs = generator["forward"].offloaded
    if uses_flow:
        phases["flow matching"] = flow_peak
    if uses_reward:
        needs = []
        for (config_of_one, *others), (size, _) in zip(request.reward_groups, weights, strict=True):
            reward = reward_phases(config_of_one, training, numerics, part, others=others)
            copied = size if training.offload_reward_model else 0.0
            needs.append(copied + max(reward["forward"].peak, reward["backward"].peak))
            # Generator and reward models do not share buffers, and keep them for the next update.
            block_inputs += reward["forward"].offloaded
        runs_again = training.rerun_gradient_step or training.num_chained_steps > 1
        beside = 0.0 if runs_again else generator["forward"].kept
        phases |= {
            "rollout": generator["rollout"].peak,
            "reward": beside + max(needs),
            "gradient step": flow_peak,
        }
    if experts.frozen(rolls_out=uses_reward, samples=training.validation_dataset is not None):
        counting = _counting(numerics, numerics.compute, engine, training.frozen_expert_quantization)
        other_sizes = generator_sizes(frozen_config, None, counting)
        is_sharded = training.shard_frozen_expert
        held["frozen expert"], expert_gathered = frozen_memory(
            other_sizes, num_gpus=engine.num_gpus, is_sharded=is_sharded
        )
        phases["rollout"] = expert_gathered + generator["rollout"].peak
    if training.validation_videos:
        held["VAE"], phases["validation videos"] = _decoding(request, training)
    held |= _held_by_batch(request)
    _take_turns(request, held, phases, generator, config["num_layers"], num_backwards=training.backwards_per_update)
    host_memory["block inputs"] = block_inputs
    if uses_reward:
        latents = math.prod((request.shape.batch_size, config["out_channels"], *request.shape.latents))
        if training.num_chained_steps > 1:
            # The starting point of each step: the latents and the solver's history.
            size = training.num_chained_steps * 4 * FLOAT32 * latents
            (host_memory if training.offload_activations else held)["chained steps"] = size
        if training.rollout_cache_interval > 1:
            # The last two velocities.
            held["step cache"] = 2 * FLOAT32 * latents
        if training.anchor_scale > 0:
            # The base's velocity, and the gradient in the generator's.
            held["anchor"] = 2 * FLOAT32 * latents
        if training.rollout_interval > 1:
            num_states = min(training.rollout_states or math.inf, _num_states(request, training))
            host_memory["rollouts"] = training.rollout_buffer_size * num_states * 2 * BFLOAT16 * latents
    flops = _prfl_flops(request, training, numerics, uses_flow=uses_flow, uses_reward=uses_reward)
    checkpoint = engine.checkpoint_size(sizes, is_lora=training.lora_rank is not None, has_average=training.use_ema)
    # Every process writes its own.
    checkpoint += engine.num_gpus * host_memory.get("rollouts", 0.0)
    if training.uses_monitor:
        # The base's samples and velocities in half precision.
        sample = math.prod((config["out_channels"], *request.shape.latents))
        base = training.num_validation_samples * (1 + len(DRIFT_SIGMAS)) * BFLOAT16 * sample
        host_memory["monitor's samples of the base"] = base
        checkpoint += base
    return Estimate(held, phases, flops, host_memory, checkpoint, sizes.total, sizes.trained, reserved)


def _decoding(request: Request, training: PRFLTrainingConfig) -> tuple[float, float]:
    """Bytes of the VAE's weights, and of decoding a batch of samples, in tiles unless the recipe refuses them."""
    (frames, rows, columns), stride = request.shape.latents, request.vae_stride
    size = {"height": stride[1] * rows, "width": stride[2] * columns, "num_frames": stride[0] * (frames - 1) + 1}
    weights, vae = float(VAE_BYTES[request.has_residual_vae]), {"is_residual": request.has_residual_vae}
    if training.vae_tiling != "off":
        return weights, tiled_decoding_memory(**size, batch_size=request.shape.batch_size)
    return weights, pass_memory(vae, "decode", **size, batch_size=request.shape.batch_size)


def _estimate_reward(request: Request, training: RewardTrainingConfig, reserved: float) -> Estimate:
    engine, config = request.engine, request.reward_config
    # The reward trainer loads frozen weights in the type of those that train.
    numerics = engine.numerics(is_lora=False)
    whole = Numerics(**{**vars(numerics), "compute": numerics.trained})
    counting = _counting(whole, whole.trained, engine, training.base_quantization)
    sizes = reward_model_sizes(freeze(config), options_of(training, REWARD_OPTIONS), counting)
    part = request.shape.part(training.context_parallel_degree, config["patch_size"])
    phases = reward_training_phases(config, training, whole, part)
    average = engine.average(sizes) if training.use_ema else 0.0
    held = engine.held(sizes) | {"averaged weights": 0.0 if engine.offload else average}
    held |= _held_by_batch(request)
    peaks = {
        "optimizer step": engine.step_memory(sizes),
        "forward and backward": max(phases["forward"].peak, phases["backward"].peak),
    }
    num_backwards = training.gradient_accumulation_steps
    _take_turns(request, held, peaks, phases, config["num_layers"], num_backwards=num_backwards)
    full = reward_training_phases(config, training, whole, request.shape)
    flops = {"reward": num_backwards * _both(full)}
    host_memory = {
        "loading": engine.loading_memory(sizes, is_frozen=False, is_quantized=training.base_quantization is not None),
        "weights and optimizer states": engine.host_memory(sizes),
        "averaged weights": average if engine.offload else 0.0,
        "block inputs": phases["forward"].offloaded,
    }
    checkpoint = engine.checkpoint_size(sizes, is_lora=training.lora_rank is not None, has_average=training.use_ema)
    return Estimate(held, peaks, flops, host_memory, checkpoint, sizes.total, sizes.trained, reserved)


def _counting(
    numerics: Numerics, frozen: torch.dtype, engine: Engine, quantization: Quantization | None = None
) -> Counting:
    threshold = engine.zero3_persistence_threshold
    return Counting(frozen, numerics.trained, numerics.keeps_in_fp32, threshold, quantization)


def _own_bytes(config: Mapping[str, Any], numerics: Numerics) -> int:
    """Bytes of the pooling and the head of a reward model."""
    model = build_reward_model(config)
    set_dtypes(model, frozen=numerics.compute, trained=numerics.compute, keep_in_fp32=True)
    return sum(each.nbytes for part in own_parts(model) for each in part.parameters())


def _held_by_batch(request: Request) -> dict[str, float]:
    """Inputs and the float32 tensors of the size of latents: clean, noise, noisy, target, and the sampler's last two."""
    shape, config, degree = request.shape, request.transformer_config, request.training.context_parallel_degree
    num_channels = config["in_channels"] - config["out_channels"] + 6 * config["out_channels"]
    latents = FLOAT32 * shape.batch_size * num_channels
    for side in shape.latents:
        latents *= side
    text = FLOAT32 * shape.batch_size * shape.text_tokens * config["text_dim"] * 3
    parts = {"batch and loss buffers": float(latents + text)}
    if degree > 1:
        # Every rank embeds all patches. Its share is a view, so all of them stay in memory. Queries, keys, values and
        # outputs are copied for the exchange.
        exchange = 4 * BFLOAT16 * shape.batch_size * request.width * request.num_tokens / degree
        others = BFLOAT16 * shape.batch_size * request.width * request.num_tokens * (1 - 1 / degree)
        parts["context parallel"] = others + exchange
    return parts


def _take_turns(
    request: Request,
    held: dict[str, float],
    peaks: dict[str, float],
    model: Mapping[str, Phase],
    num_layers: int,
    *,
    num_backwards: int,
) -> None:
    """
    Account for gradients that are allocated while activations are freed.

    This holds in one process with one backward pass per update. The peak is then not the sum of both, but the largest of:
    all activations (the other phases); nearly all gradients, in the backward pass of the first block; all gradients and
    the memory of the optimizer's step.
    """
    if request.engine.num_gpus > 1 or request.engine.zero_stage or num_backwards > 1:
        return
    gradients = held["gradients"]
    held["gradients"] = 0.0
    in_first_block = model["backward"].peak - model["forward"].kept * (1 - 1 / num_layers)
    peaks["optimizer step"] += gradients
    peaks["end of backward"] = gradients * (1 - 1 / num_layers) + max(0.0, in_first_block)


def _prfl_flops(
    request: Request, training: PRFLTrainingConfig, numerics: Numerics, *, uses_flow: bool, uses_reward: bool
) -> dict[str, float]:
    """FLOPs of one update, averaged over the steps that may take gradient."""
    micro_batches = training.gradient_accumulation_steps
    generator = generator_phases(request.transformer_config, training, numerics, request.shape)
    step = _both(generator)
    flops = {"flow matching": micro_batches * step} if uses_flow else {}
    if not uses_reward:
        return flops
    first, last = _gradient_steps(request, training)
    interval, boundary = training.rollout_cache_interval, request.experts.boundary
    called = forward_steps(_timesteps(request, training), interval, boundary=boundary)
    without_gradient = forwards_without_gradient(training, first, last, called)
    num_gradient_steps = training.num_gradient_steps
    rewards = [
        reward_phases(each, training, numerics, request.shape, others=others)
        for each, *others in request.reward_groups
    ]
    reward_flops = sum(_both(each) for each in rewards)
    num_models = len(request.reward_configs)
    combination = RewardCombination([1.0] * num_models, training.reward_combination, training.reward_disagreement)
    if not combination.is_separable(training.reward_loss):
        reward_flops += sum(each["forward"].flops for each in rewards[:-1])
    flops |= {
        "rollout": micro_batches * without_gradient * generator["rollout"].flops,
        "gradient step": micro_batches * num_gradient_steps * training.num_chained_steps * step,
        "reward": micro_batches * num_gradient_steps * reward_flops,
    }
    if training.anchor_scale > 0:
        flops["anchor"] = micro_batches * num_gradient_steps * generator["rollout"].flops
    return flops


def forwards_without_gradient(
    training: PRFLTrainingConfig, first: int, last: int, called: Collection[int] | None = None
) -> float:
    """
    Mean number of forward passes without gradient of the generator for a micro-batch of a reward update.

    The mean is over the random choice of steps.

    Args:
        first, last (`int`):
            First and last step that may take gradient.
        called (`Collection[int]`, *optional*):
            Steps of a rollout that call the generator, see [`~hy_prfl.rollout.step_cache.forward_steps`]; those of a
            pipeline with one transformer if left out.
    """
    chained, num_gradient_steps = training.num_chained_steps, training.num_gradient_steps
    if called is None:
        called = forward_steps(range(training.num_inference_steps, 0, -1), training.rollout_cache_interval)
    runs_again = training.rerun_gradient_step or chained > 1
    if training.rollout_interval == 1:
        return _walked(first, last, num_gradient_steps, called, window=chained, counts_last=runs_again)
    # A chain up to the last state that is kept, for `rollout_interval` updates.
    start, end = first - chained + 1, last - chained + 1
    kept = min(training.rollout_states or math.inf, end - start + 1)
    walked = _walked(start, end, int(kept), called, window=1, counts_last=True) / training.rollout_interval
    return walked + (chained * num_gradient_steps if runs_again else 0)


def _walked(
    first: int, last: int, num_draws: int, called: Collection[int], *, window: int, counts_last: bool
) -> float:
    """
    Mean number of forwards of a chain that ends at the last of `num_draws` different steps in `[first, last]`.

    A step calls the model if it is one of `called`, or in the `window` of steps that ends at a drawn one. With
    `counts_last` false the drawn steps themselves do not count.
    """
    num_steps = last - first + 1

    def share_with_one_in(low: int, high: int) -> float:
        """Share of the draws that have a step in `[low, high]`."""
        inside = max(0, min(high, last) - max(low, first) + 1)
        return 1 - math.comb(num_steps - inside, num_draws) / math.comb(num_steps, num_draws)

    walked = 0.0
    for index in range(last + 1):
        walked += share_with_one_in(index, last if index in called else index + window - 1)
    return walked if counts_last else walked - num_draws


def _num_states(request: Request, training: PRFLTrainingConfig) -> int:
    """States of a chain that an update may start from."""
    first, last = _gradient_steps(request, training)
    return last - first + 1


def _gradient_steps(request: Request, training: PRFLTrainingConfig) -> tuple[int, int]:
    """First and last step that may take gradient."""
    timesteps = _timesteps(request, training)
    return request.experts.gradient_steps(
        timesteps, training.step_range, training.num_gradient_steps, training.num_chained_steps
    )


def _timesteps(request: Request, training: PRFLTrainingConfig) -> list[float]:
    """Timesteps of the sampler."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=request.sampler_shift
    )
    scheduler.set_timesteps(training.num_inference_steps)
    return scheduler.timesteps.tolist()


def _both(phases: Mapping[str, Phase]) -> float:
    return phases["forward"].flops + phases["backward"].flops


def default_reward_config(training: TrainingConfig, transformer_config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the reward model that a recipe trains, or, if it uses one, of the paper's 8 blocks."""
    return reward_model_config(transformer_config, training if isinstance(training, RewardTrainingConfig) else None)
