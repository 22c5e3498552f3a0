"""How an image enters a transformer: as channels beside the latents, or as their first frame."""

import torch


# Latent pixels of a token, frames apart: that of every Wan transformer, and written into diffusers' pipelines.
PATCH = 2


def add_condition(
    latents: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What a transformer, or a reward model, is given for noisy latents.

    Wan 2.1 and Wan2.2 A14B take the condition as more channels. Wan2.2 TI2V 5B takes it in place of the first frame,
    whose tokens have the timestep 0; such a condition has as many channels as the latents, and fewer frames.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Noisy latents.
        timestep (`torch.Tensor` of shape `(batch_size,)`):
            Noise level, `1000 * sigma`.
        condition (`torch.Tensor`, *optional*):
            `(batch_size, 4 + num_channels, num_frames, height, width)`, or `(batch_size, num_channels, 1, height, width)`.

    Returns:
        The input, and its timesteps `(batch_size,)` or `(batch_size, num_tokens)`.
    """
    num_clean = num_clean_frames(latents, condition)
    if condition is None:
        return latents, timestep
    if num_clean == 0:
        return torch.cat([latents, condition], dim=1), timestep
    num_frames, height, width = latents.shape[2:]
    per_frame = (height // PATCH) * (width // PATCH)
    is_noisy = torch.arange(num_frames * per_frame, device=latents.device) >= num_clean * per_frame
    return put_condition(latents, condition), timestep[:, None] * is_noisy


def num_clean_frames(latents: torch.Tensor, condition: torch.Tensor | None) -> int:
    """Number of first latent frames that the condition takes the place of; nothing is predicted for them."""
    if condition is None or condition.shape[1] != latents.shape[1]:
        return 0
    return condition.shape[2]


def put_condition(latents: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
    """Latents with the frames that the condition takes the place of, if it does, as they are in it."""
    num_clean = num_clean_frames(latents, condition)
    if condition is None or num_clean == 0:
        return latents
    return torch.cat([condition.to(latents.dtype), latents[:, :, num_clean:]], dim=2)
