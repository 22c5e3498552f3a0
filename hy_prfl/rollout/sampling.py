"""Sampling with the generator in training and the pipeline's own sampler, without gradient."""

import torch
from diffusers import UniPCMultistepScheduler
from torch import nn

from ..models.conditioning import Conditioning, put_condition


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

    A stock pipeline cannot use the engine of ZeRO-3. With the same inputs this gives the same latents.

    Args:
        negative_prompt_embeds (`torch.Tensor`, *optional*):
            Prompt embeddings to guide away from; needed if `guidance_scale` is above 1.
        guidance_scale (`float`, defaults to 1.0):
            Scale of classifier-free guidance, 1 is none.

        The other arguments are those of [`~hy_prfl.rollout.chain.walk_with_gradient`].

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
