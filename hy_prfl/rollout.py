"""Denoising with the pipeline's own sampler, with gradient through chosen steps only. Independent of the reward."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UniPCMultistepScheduler
from torch import nn

from .models.conditioning import Conditioning, put_condition
from .runtime.attention import use_attention_backend


@dataclass
class GradientStep:
    """
    A step of the chain that takes gradient.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Result of the step: noisy, float32, without gradient.
        timesteps (`torch.Tensor` of shape `(batch_size,)`):
            Noise level of these latents, `1000 * sigma`.
        width (`torch.Tensor`, scalar):
            By how much the step lowers sigma. The latents change by about this width times the model's output, so the
            gradient of the output is the gradient of the latents times the width, which grows along a shifted chain.
        differentiable_latents (`Callable[[], torch.Tensor]`):
            Returns the same latents, differentiable in the generator's weights. Call it once.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    width: torch.Tensor
    differentiable_latents: Callable[[], torch.Tensor]


def walk_with_gradient(
    transformer: nn.Module,
    scheduler: UniPCMultistepScheduler,
    *,
    noise: torch.Tensor,
    step_indices: Sequence[int],
    num_inference_steps: int,
    conditioning: Conditioning,
    rerun: bool = False,
    rollout_attention_backend: str | None = None,
) -> Iterator[GradientStep]:
    r"""
    Walk one chain from noise, with gradient only in the steps `step_indices`, and yield at each of them.

    Each is a rollout to one step (paper, equations 7 and 8) that shares the steps before it with the others. The
    solver is multistep: the gradient of a step also passes through its corrector, but neither the latents that it
    starts from nor earlier model outputs take gradient. Use the gradient of a step before you request the next one, so
    that only one graph exists at a time. Every rank must pass the same `step_indices`, because under ZeRO-3 each
    forward pass is a collective.

    Args:
        transformer (`nn.Module`):
            The generator in training, wrapped by its engine. Called by keyword, `return_dict=False`.
        scheduler (`UniPCMultistepScheduler`):
            The pipeline's sampler; its state is reset.
        noise (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Standard normal start of the chain, float32.
        step_indices (`Sequence[int]`):
            Steps that take gradient, ascending, in `[0, num_inference_steps - 2]`: their latents must still be noisy.
        num_inference_steps (`int`):
            Steps of the whole chain.
        conditioning (`Conditioning`):
            Prompts and, for image-to-video models, images.
        rerun (`bool`, defaults to `False`):
            Take each of these steps without gradient first, and again with gradient when `differentiable_latents` is
            called. In between the activations of the step take no memory. Costs one more forward pass.
        rollout_attention_backend (`str`, *optional*):
            Attention kernel of the steps without gradient, by diffusers' name; the model's own if left out.

    Yields:
        [`GradientStep`], one for each of `step_indices`.

    Raises:
        ValueError: If `step_indices` are out of range or order.
    """
    last = num_inference_steps - 2
    if not step_indices or list(step_indices) != sorted({*step_indices} & {*range(last + 1)}):
        raise ValueError(f"`step_indices` must be ascending and in [0, {last}], got {list(step_indices)}.")
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    scheduler.set_begin_index(0)
    predict = partial(predict_velocity, transformer, conditioning=conditioning)
    latents, next_index = noise, 0
    for step_index in step_indices:
        with use_attention_backend(transformer, rollout_attention_backend):
            for timestep in scheduler.timesteps[next_index:step_index]:
                latents = _take_step(predict, timestep, latents, scheduler, with_gradient=False)
        next_index = step_index + 1
        take_step = partial(_take_step, predict, scheduler.timesteps[step_index], latents)
        if rerun:
            differentiable_latents = partial(take_step, copy.deepcopy(scheduler), with_gradient=True)
            latents = take_step(scheduler, with_gradient=False)
        else:
            result = take_step(scheduler, with_gradient=True)
            differentiable_latents = partial(_identity, result)
            _forget_gradient(scheduler)
            latents = result.detach()
        yield GradientStep(
            latents,
            timesteps=scheduler.timesteps[next_index].expand(latents.shape[0]),
            width=scheduler.sigmas[step_index] - scheduler.sigmas[next_index],
            differentiable_latents=differentiable_latents,
        )


def denoise_to_step(
    transformer: nn.Module,
    scheduler: UniPCMultistepScheduler,
    *,
    noise: torch.Tensor,
    step_index: int,
    num_inference_steps: int,
    conditioning: Conditioning,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Roll out from noise: `step_index` steps without gradient, then one with it (paper, equations 7 and 8).

    Args:
        step_index (`int`):
            The step that takes gradient, in `[0, num_inference_steps - 2]`.

        The other arguments are those of [`walk_with_gradient`].

    Returns:
        The noisy latents after step `step_index`, float32, with gradient, and their timesteps `(batch_size,)`.

    Raises:
        ValueError: If `step_index` is out of range.
    """
    if not 0 <= step_index <= num_inference_steps - 2:
        raise ValueError(f"`step_index` must be in [0, {num_inference_steps - 2}], got {step_index}.")
    chain = walk_with_gradient(
        transformer,
        scheduler,
        noise=noise,
        step_indices=[step_index],
        num_inference_steps=num_inference_steps,
        conditioning=conditioning,
    )
    step = next(chain)
    return step.differentiable_latents(), step.timesteps


@torch.no_grad()
def sample_latents(
    transformer: nn.Module,
    scheduler: UniPCMultistepScheduler,
    *,
    noise: torch.Tensor,
    num_inference_steps: int,
    conditioning: Conditioning,
    negative_prompt_embeds: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """
    Walk the whole chain without gradient, as the pipeline does, but with the wrapped transformer in training.

    Under ZeRO-3 a stock pipeline cannot use the engine; with the same inputs this gives the same latents.

    Args:
        negative_prompt_embeds (`torch.Tensor`, *optional*):
            Prompt embeddings to guide away from; needed if `guidance_scale` is above 1.
        guidance_scale (`float`, defaults to 1.0):
            Scale of classifier-free guidance, 1 is none.

        The other arguments are those of [`walk_with_gradient`].

    Returns:
        Clean latents `(batch_size, num_channels, num_frames, height, width)`, float32.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    scheduler.set_begin_index(0)
    latents = noise
    for timestep in scheduler.timesteps:
        model_pred = predict_velocity(transformer, latents, timestep, conditioning)
        if guidance_scale > 1:
            assert negative_prompt_embeds is not None
            negative = conditioning.with_prompts(negative_prompt_embeds)
            unguided = predict_velocity(transformer, latents, timestep, negative)
            model_pred = unguided + guidance_scale * (model_pred - unguided)
        latents = scheduler.step(model_pred, timestep, latents, return_dict=False)[0]
    return put_condition(latents, conditioning.condition)


def predict_velocity(
    transformer: nn.Module,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """
    Velocity at the given latents, float32; calls the transformer as `WanPipeline` and `WanImageToVideoPipeline` do.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Noisy latents.
        timestep (`torch.Tensor`, scalar or of shape `(batch_size,)`):
            Noise level, `1000 * sigma`.
        conditioning (`Conditioning`):
            Prompts and, for image-to-video models, images.
    """
    inputs = conditioning.model_inputs(latents, timestep.expand(latents.shape[0]))
    return transformer(**inputs, return_dict=False)[0].float()


def _take_step(
    predict: Callable[..., torch.Tensor],
    timestep: torch.Tensor,
    latents: torch.Tensor,
    scheduler: UniPCMultistepScheduler,
    *,
    with_gradient: bool,
) -> torch.Tensor:
    with torch.set_grad_enabled(with_gradient):
        return scheduler.step(predict(latents, timestep), timestep, latents, return_dict=False)[0]


def _forget_gradient(scheduler: UniPCMultistepScheduler) -> None:
    """Detach the solver's state from the graph of the step that it has just taken."""
    outputs = scheduler.model_outputs
    scheduler.model_outputs = [None if output is None else output.detach() for output in outputs]
    scheduler.last_sample = scheduler.last_sample.detach()


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
