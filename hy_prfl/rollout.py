"""Denoising with the pipeline's own sampler to one step, and one step with gradient. Knows no reward."""

import torch
from diffusers import UniPCMultistepScheduler
from torch import nn


def denoise_to_step(
    transformer: nn.Module,
    scheduler: UniPCMultistepScheduler,
    *,
    noise: torch.Tensor,
    step_index: int,
    num_inference_steps: int,
    encoder_hidden_states: torch.Tensor,
    condition: torch.Tensor | None = None,
    encoder_hidden_states_image: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Roll out from noise: `step_index` steps without gradient, then one with it (paper, equations 7 and 8).

    The solver is multistep: the gradient also passes through its corrector, but no earlier model output takes any.
    Every rank must pass the same `step_index`, because under ZeRO-3 each forward is a collective.

    Args:
        transformer (`nn.Module`):
            The generator, as it is trained (wrapped by its engine). Called by keyword, `return_dict=False`.
        scheduler (`UniPCMultistepScheduler`):
            The pipeline's sampler; its state is reset.
        noise (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Standard normal start of the chain, float32.
        step_index (`int`):
            The step that takes gradient, in `[0, num_inference_steps - 2]`: the latents that come out must still be
            noisy.
        num_inference_steps (`int`):
            Steps of the whole chain.
        encoder_hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, text_dim)`):
            Prompt embeddings.
        condition (`torch.Tensor`, *optional*):
            The 20 condition channels of image-to-video models.
        encoder_hidden_states_image (`torch.Tensor`, *optional*):
            Image embeddings of image-to-video models.

    Returns:
        The noisy latents after step `step_index`, float32, with gradient, and their timesteps `(batch_size,)`.

    Raises:
        ValueError: If `step_index` is out of range.
    """
    if not 0 <= step_index <= num_inference_steps - 2:
        raise ValueError(f"`step_index` must be in [0, {num_inference_steps - 2}], got {step_index}.")
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    scheduler.set_begin_index(0)
    latents = noise
    for index, timestep in enumerate(scheduler.timesteps[: step_index + 1]):
        with torch.set_grad_enabled(index == step_index):
            model_pred = predict_velocity(
                transformer, latents, timestep, encoder_hidden_states, condition, encoder_hidden_states_image
            )
            latents = scheduler.step(model_pred, timestep, latents, return_dict=False)[0]
    return latents, scheduler.timesteps[step_index + 1].expand(latents.shape[0])


@torch.no_grad()
def sample_latents(
    transformer: nn.Module,
    scheduler: UniPCMultistepScheduler,
    *,
    noise: torch.Tensor,
    num_inference_steps: int,
    encoder_hidden_states: torch.Tensor,
    negative_encoder_hidden_states: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    condition: torch.Tensor | None = None,
    encoder_hidden_states_image: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Walk the whole chain without gradient, as the pipeline would, but through the wrapped transformer in training.

    Under ZeRO-3 a stock pipeline cannot be handed the engine; with the same inputs this gives the same latents.

    Args:
        negative_encoder_hidden_states (`torch.Tensor`, *optional*):
            Embeddings to guide away from; needed if `guidance_scale` is above 1.
        guidance_scale (`float`, defaults to 1.0):
            Scale of classifier-free guidance, 1 is none.

        The other arguments are those of [`denoise_to_step`].

    Returns:
        Clean latents `(batch_size, num_channels, num_frames, height, width)`, float32.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    scheduler.set_begin_index(0)
    latents = noise
    for timestep in scheduler.timesteps:
        model_pred = predict_velocity(
            transformer, latents, timestep, encoder_hidden_states, condition, encoder_hidden_states_image
        )
        if guidance_scale > 1:
            assert negative_encoder_hidden_states is not None
            unguided = predict_velocity(
                transformer, latents, timestep, negative_encoder_hidden_states, condition, encoder_hidden_states_image
            )
            model_pred = unguided + guidance_scale * (model_pred - unguided)
        latents = scheduler.step(model_pred, timestep, latents, return_dict=False)[0]
    return latents


def predict_velocity(
    transformer: nn.Module,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    condition: torch.Tensor | None = None,
    encoder_hidden_states_image: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Velocity at the given latents, float32, called the way `WanPipeline` and `WanImageToVideoPipeline` call it.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Noisy latents.
        timestep (`torch.Tensor`, scalar or of shape `(batch_size,)`):
            Noise level, `1000 * sigma`.
    """
    hidden_states = latents if condition is None else torch.cat([latents, condition], dim=1)
    return transformer(
        hidden_states=hidden_states.to(encoder_hidden_states.dtype),
        timestep=timestep.expand(latents.shape[0]),
        encoder_hidden_states=encoder_hidden_states,
        encoder_hidden_states_image=encoder_hidden_states_image,
        return_dict=False,
    )[0].float()
