"""Runs the phases of an update on fake tensors: generator, frozen reward model, and training of a reward model."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from ..configs.base import Quantization, TrainingConfig
from ..configs.prfl import PRFLTrainingConfig
from ..configs.reward import RewardTrainingConfig
from ..models.conditioning import Conditioning
from ..models.reward_model import reward_training_loss
from ..models.shared_backbone import own_parts, share_backbone
from ..rollout.chain import walk_with_gradient
from ..rollout.gradient_steps import GradientStep, surrogate
from ..rollout.reward_feedback import RewardFeedback
from ..rollout.sampling import predict_velocity
from ..runtime.activation_checkpointing import checkpoint_activations
from .models import (
    GENERATOR_OPTIONS,
    REWARD_OPTIONS,
    Frozen,
    build_reward_model,
    build_transformer,
    freeze,
    materialize,
    options_of,
    prfl_recipe,
    reward_recipe,
    set_dtypes,
    thaw,
)
from .simulation import (
    MemoryMeter,
    Phase,
    autocast,
    drop_gradients,
    extrapolated,
    use_gpu_kernels,
    use_quantized_layers,
)


# Length of the text, and tokens of CLIP's image embedding, that Wan was trained with.
TEXT_TOKENS, IMAGE_TOKENS = 512, 257


@dataclass(frozen=True)
class Numerics:
    """
    Types of parameters and computation in a run.

    Args:
        frozen, trained (`torch.dtype`):
            Types of frozen and of trained parameters.
        compute (`torch.dtype`):
            Type of the models' inputs.
        autocast (`bool`):
            Whether matrix products run in bfloat16.
        keeps_in_fp32 (`bool`):
            Whether frozen parameters that are sensitive to rounding stay in float32.
        on_gpu (`bool`):
            Whether to count allocations of a GPU's kernels instead of a CPU's.
    """

    frozen: torch.dtype
    trained: torch.dtype
    compute: torch.dtype
    autocast: bool
    keeps_in_fp32: bool
    on_gpu: bool


@dataclass(frozen=True)
class Shape:
    """
    Shape of the clips of a micro-batch.

    Args:
        batch_size (`int`):
            Number of clips.
        latents (`tuple[int, int, int]`):
            Frames, height and width of their latents.
        text_tokens (`int`):
            Length of the padded prompt.
        first_frame (`bool`):
            Whether a given image replaces the first frame. Then each token has its own timestep.
        num_parts (`int`):
            Number of GPUs that share each clip. `latents` has the tokens of one GPU.
    """

    batch_size: int
    latents: tuple[int, int, int]
    text_tokens: int = TEXT_TOKENS
    first_frame: bool = False
    num_parts: int = 1

    def num_tokens(self, patch_size: Sequence[int]) -> int:
        """Tokens of one clip."""
        return math.prod(size // patch for size, patch in zip(self.latents, patch_size, strict=True))

    def part(self, degree: int, patch_size: Sequence[int]) -> "Shape":
        """Clips with `1 / degree` of the tokens. Height and width may change: memory depends only on the number."""
        if degree == 1:
            return self
        num_tokens = self.num_tokens(patch_size) // degree
        width = next(size for size in range(min(1024, num_tokens), 0, -1) if num_tokens % size == 0)
        rows = num_tokens // width
        height = next(size for size in range(min(1024, rows), 0, -1) if rows % size == 0)
        frames, rows, columns = patch_size
        latents = (num_tokens // (width * height) * frames, height * rows, width * columns)
        return replace(self, latents=latents, num_parts=degree)


def images_of_clip(config: Mapping[str, Any]) -> tuple[int, int]:
    """Number of images per clip (1 or 2) of an image-to-video model, and the tokens of each."""
    both = config["pos_embed_seq_len"]
    return (1, IMAGE_TOKENS) if both is None else (2, both // 2)


class _GatherTokens(torch.autograd.Function):
    """Allocates the same as gathering the tokens of all GPUs: a buffer stacked by rank, then one in token order."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, num_parts: int) -> torch.Tensor:
        ctx.num_parts = num_parts
        gathered = hidden_states.new_empty((num_parts * hidden_states.shape[0], *hidden_states.shape[1:]))
        return torch.cat(gathered.chunk(num_parts), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.chunk(ctx.num_parts, dim=1)[0], None


def _set_up(model: Any, quantization: Quantization | None, numerics: Numerics, *, checkpointed: bool) -> None:
    """Set up a fake model as a run does: quantised layers, kernels of the device, and activation checkpointing."""
    materialize(model)
    if quantization is not None:
        use_quantized_layers(model, quantization)
    if numerics.on_gpu:
        use_gpu_kernels(model)
    if checkpointed:
        checkpoint_activations(model)


def _gather_tokens(reward_model: Any, shape: Shape) -> None:
    """Give pooling and head the tokens of all GPUs, as in a run."""
    if shape.num_parts > 1:
        reward_model.token_gather.forward = lambda hidden_states: _GatherTokens.apply(hidden_states, shape.num_parts)


class Inputs:
    """Fake inputs of a micro-batch."""

    def __init__(self, config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        batch, image_dim = shape.batch_size, config["image_dim"]
        num_condition, num_frames = config["in_channels"] - config["out_channels"], shape.latents[0]
        if shape.first_frame:
            num_condition, num_frames = config["out_channels"], 1
        self.latents = torch.empty(batch, config["out_channels"], *shape.latents)
        condition = torch.empty(batch, num_condition, num_frames, *shape.latents[1:]) if num_condition else None
        text = torch.empty(batch, shape.text_tokens, config["text_dim"], dtype=dtype)
        image = None
        if image_dim is not None:
            num_images, num_tokens = images_of_clip(config)
            image = torch.empty(num_images * batch, num_tokens, image_dim, dtype=dtype)
        self.conditioning = Conditioning(text, image, condition)
        self.timestep = torch.empty(batch)

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        given = self.conditioning
        every = (self.latents, given.condition, given.prompt_embeds, given.image_embeds, self.timestep)
        return [tensor for tensor in every if tensor is not None]


def generator_phases(
    config: Mapping[str, Any], training: PRFLTrainingConfig, numerics: Numerics, shape: Shape
) -> dict[str, Phase]:
    """
    Needs of the generator for a rollout step, and for the forward and backward of a step with gradient.

    A flow-matching update has the same forward and backward: the sampler has no matrix products.
    """
    simulate_blocks = _runner(_simulate_generator, config, training, GENERATOR_OPTIONS, numerics, shape)
    return _with_activation_checkpointing(simulate_blocks, config, training, training.gradient_checkpointing_blocks)


def reward_phases(
    config: Mapping[str, Any],
    training: PRFLTrainingConfig,
    numerics: Numerics,
    shape: Shape,
    *,
    others: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Phase]:
    """
    Needs of the frozen reward model for its forward and its backward to the latents.

    Args:
        others (`Sequence[Mapping[str, Any]]`, *optional*):
            Configurations of other reward models on the same backbone, which are called with it.
    """
    simulate = partial(_simulate_reward, others=tuple(_without_depth(each) for each in others))
    simulate_blocks = _runner(simulate, config, training, ("reward_model_quantization",), numerics, shape)
    return _with_activation_checkpointing(
        simulate_blocks, config, training, training.reward_gradient_checkpointing_blocks
    )


def reward_training_phases(
    config: Mapping[str, Any], training: RewardTrainingConfig, numerics: Numerics, shape: Shape
) -> dict[str, Phase]:
    """Needs of the forward and backward of a micro-batch in the reward model's own training."""
    simulate_blocks = _runner(_simulate_reward_training, config, training, REWARD_OPTIONS, numerics, shape)
    return _with_activation_checkpointing(simulate_blocks, config, training, training.gradient_checkpointing_blocks)


def scoring_phase(config: Mapping[str, Any], numerics: Numerics, shape: Shape) -> Phase:
    """Needs of a forward of the reward model without gradient."""
    values = _without_depth(config)
    phases = extrapolated(
        lambda count: {"forward": _simulate_scoring(values, numerics, shape, count)}, config["num_layers"]
    )
    return phases["forward"]


SimulateBlocks = Callable[[int, bool], dict[str, Phase]]


def _runner(
    simulate: Callable[..., dict[str, Phase]],
    config: Mapping[str, Any],
    training: TrainingConfig,
    names: Sequence[str],
    numerics: Numerics,
    shape: Shape,
) -> SimulateBlocks:
    """Phases as a function of the number of blocks, and of activation checkpointing. Simulations are cached."""
    values = _without_depth(config)
    options = options_of(training, names)

    def simulate_blocks(num_layers: int, checkpointing: bool) -> dict[str, Phase]:
        frozen = (*options, ("gradient_checkpointing", checkpointing))
        return extrapolated(lambda count: simulate(values, frozen, numerics, shape, count), num_layers)

    return simulate_blocks


def _without_depth(config: Mapping[str, Any]) -> Frozen:
    return freeze({name: value for name, value in config.items() if name != "num_layers"})


def _with_activation_checkpointing(
    simulate_blocks: SimulateBlocks, config: Mapping[str, Any], training: TrainingConfig, num_blocks: int | None
) -> dict[str, Phase]:
    """
    Phases of a model with activation checkpointing in its first blocks. The others keep their activations.

    If the inputs of blocks are offloaded to host memory, two of them are on the device at a time: that of the current
    block, and the one that is copied meanwhile.
    """
    num_layers = config["num_layers"]
    if not training.gradient_checkpointing:
        return simulate_blocks(num_layers, False)
    num_checkpointed = num_layers if num_blocks is None else num_blocks
    phases = simulate_blocks(num_checkpointed, True)
    block_input = simulate_blocks(4, True)["forward"].kept - simulate_blocks(3, True)["forward"].kept
    offloaded = max(0, num_checkpointed - 2) * block_input if training.offload_activations else 0.0
    inputs = phases["forward"].offloaded if training.offload_activations else 0.0
    for name in ("forward", "backward"):
        kept = phases[name].kept - (offloaded if name == "forward" else 0.0)
        phases[name] = replace(phases[name], peak=phases[name].peak - offloaded, kept=kept, offloaded=0.0)
    # The first input is smaller than the others where bitsandbytes' layers make the hidden states float32.
    phases["forward"] = replace(phases["forward"], offloaded=inputs)
    if num_checkpointed == num_layers:
        return phases
    return _add_kept_blocks(simulate_blocks, phases, num_layers - num_checkpointed)


def _add_kept_blocks(simulate_blocks: SimulateBlocks, phases: dict[str, Phase], num_blocks: int) -> dict[str, Phase]:
    """Add blocks without checkpointing at the end. Their activations are freed before the other blocks run again."""
    shorter, longer = simulate_blocks(3, False), simulate_blocks(4, False)
    grown = {}
    for name, phase in phases.items():
        more_kept = num_blocks * (longer[name].kept - shorter[name].kept)
        more_flops = num_blocks * (longer[name].flops - shorter[name].flops)
        grown[name] = replace(phase, kept=phase.kept + more_kept, flops=phase.flops + more_flops)
    forward = grown["forward"]
    head = longer["backward"].peak - longer["forward"].kept
    grown["forward"] = replace(forward, peak=max(phases["forward"].peak, forward.kept))
    grown["backward"] = replace(grown["backward"], peak=max(phases["backward"].peak, forward.kept + head))
    return grown


@functools.cache
def _simulate_generator(
    config: Frozen, options: Frozen, numerics: Numerics, shape: Shape, num_layers: int
) -> dict[str, Phase]:
    training = prfl_recipe(options)
    values = {**thaw(config), "num_layers": num_layers}
    transformer = build_transformer(values, training)
    set_dtypes(transformer, frozen=numerics.frozen, trained=numerics.trained, keep_in_fp32=numerics.keeps_in_fp32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _run_generator(transformer, values, training, numerics, shape)


def _run_generator(
    transformer: Any, config: Mapping[str, Any], training: TrainingConfig, numerics: Numerics, shape: Shape
) -> dict[str, Phase]:
    _set_up(transformer, training.base_quantization, numerics, checkpointed=training.gradient_checkpointing)
    drop_gradients(transformer)
    inputs = Inputs(config, shape, numerics.compute)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    forward = transformer.forward
    transformer.forward = lambda *args, **kwargs: _under_autocast(forward, numerics, *args, **kwargs)
    state = [*transformer.parameters(), *transformer.buffers(), *inputs.tensors()]
    checkpointed = transformer.blocks if training.gradient_checkpointing else ()
    with MemoryMeter(state, on_gpu=numerics.on_gpu, checkpointed=checkpointed) as meter:
        with meter.phase("rollout"), torch.no_grad():
            predict_velocity(transformer, inputs.latents, inputs.timestep, inputs.conditioning)
        walk = walk_with_gradient(
            transformer,
            scheduler,
            noise=inputs.latents,
            step_indices=[0],
            num_inference_steps=2,
            conditioning=inputs.conditioning,
        )
        with meter.phase("forward"):
            step = next(walk)
        latents_grad = torch.empty_like(step.latents)
        with meter.phase("backward"):
            for scalar in step.surrogates(latents_grad):
                scalar.backward()
    return meter.phases


def _under_autocast(forward: Any, numerics: Numerics, *args: Any, **kwargs: Any) -> Any:
    with autocast(numerics.autocast):
        return forward(*args, **kwargs)


@functools.cache
def _simulate_reward(
    config: Frozen,
    options: Frozen,
    numerics: Numerics,
    shape: Shape,
    num_layers: int,
    *,
    others: tuple[Frozen, ...] = (),
) -> dict[str, Phase]:
    training = prfl_recipe(options)
    values = {**thaw(config), "num_layers": num_layers}
    reward_model = build_reward_model(values)
    models = [reward_model, *(build_reward_model({**thaw(each), "num_layers": num_layers}) for each in others)]
    for model in models:
        set_dtypes(model, frozen=numerics.compute, trained=numerics.compute, keep_in_fp32=True)
        share_backbone(model, reward_model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _run_reward(models, values, training, numerics, shape)


def _run_reward(
    models: Sequence[Any], config: Mapping[str, Any], training: PRFLTrainingConfig, numerics: Numerics, shape: Shape
) -> dict[str, Phase]:
    reward_model, *others = models
    _set_up(reward_model, training.reward_model_quantization, numerics, checkpointed=training.gradient_checkpointing)
    for part in (part for model in others for part in own_parts(model)):
        _set_up(part, None, numerics, checkpointed=False)
    _gather_tokens(reward_model, shape)
    inputs = Inputs(config, shape, numerics.compute)
    step = GradientStep(
        inputs.latents,
        timesteps=inputs.timestep,
        gain=torch.empty(()),
        velocity=inputs.latents,
        surrogates=partial(surrogate, inputs.latents, inputs.latents),
    )
    weights = [each for model in models for each in (*model.parameters(), *model.buffers())]
    checkpointed = reward_model.blocks if training.gradient_checkpointing else ()
    meter = MemoryMeter([*weights, *inputs.tensors()], on_gpu=numerics.on_gpu, checkpointed=checkpointed)

    @contextmanager
    def scoring() -> Iterator[None]:
        """The forward pass lies inside of the phase of the backward pass, which counts what follows it."""
        with meter.phase("forward"), autocast(numerics.autocast):
            yield

    names = [str(index) for index in range(len(models))]
    reward = RewardFeedback(training, models, names=names, autocast=scoring)
    with meter, meter.phase("backward"):
        reward.differentiate(step, inputs.conditioning)
    return meter.phases


@functools.cache
def _simulate_reward_training(
    config: Frozen, options: Frozen, numerics: Numerics, shape: Shape, num_layers: int
) -> dict[str, Phase]:
    training = reward_recipe(options)
    values = {**thaw(config), "num_layers": num_layers}
    reward_model = build_reward_model(values, training)
    set_dtypes(reward_model, frozen=numerics.trained, trained=numerics.trained, keep_in_fp32=numerics.keeps_in_fp32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _run_reward_training(reward_model, values, training, numerics, shape)


def _run_reward_training(
    reward_model: Any, config: Mapping[str, Any], training: RewardTrainingConfig, numerics: Numerics, shape: Shape
) -> dict[str, Phase]:
    _set_up(reward_model, training.base_quantization, numerics, checkpointed=training.gradient_checkpointing)
    _gather_tokens(reward_model, shape)
    drop_gradients(reward_model)
    is_pair = training.loss == "bt"
    clips = Inputs(config, replace(shape, batch_size=shape.batch_size * (2 if is_pair else 1)), numerics.compute)
    noise, sigmas = torch.empty(shape.batch_size, *clips.latents.shape[1:]), torch.empty(shape.batch_size)
    labels = None if is_pair else torch.empty(shape.batch_size)
    state = [*reward_model.parameters(), *reward_model.buffers(), *clips.tensors(), noise, sigmas]
    checkpointed = reward_model.blocks if training.gradient_checkpointing else ()
    with MemoryMeter(state, on_gpu=numerics.on_gpu, checkpointed=checkpointed) as meter:
        with meter.phase("forward"), autocast(numerics.autocast):
            loss, _ = reward_training_loss(
                reward_model,
                latents=clips.latents,
                noise=noise,
                sigmas=sigmas,
                conditioning=clips.conditioning,
                labels=labels,
            )
        with meter.phase("backward"):
            loss.backward()
    return meter.phases


@functools.cache
def _simulate_scoring(config: Frozen, numerics: Numerics, shape: Shape, num_layers: int) -> Phase:
    values = {**thaw(config), "num_layers": num_layers}
    reward_model = build_reward_model(values)
    set_dtypes(reward_model, frozen=numerics.compute, trained=numerics.compute, keep_in_fp32=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize(reward_model)
        use_gpu_kernels(reward_model)
        inputs = Inputs(values, shape, numerics.compute)
        state = [*reward_model.parameters(), *reward_model.buffers(), *inputs.tensors()]
        with MemoryMeter(state, on_gpu=True) as meter, meter.phase("forward"), torch.no_grad():
            reward_model(**inputs.conditioning.model_inputs(inputs.latents, inputs.timestep))
    return meter.phases["forward"]
