"""What a transformer is given besides noisy latents and their timesteps: prompts, and images in one of two ways."""

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch


# Latent pixels of a token, frames apart: that of every Wan transformer, and written into diffusers' pipelines.
PATCH = 2


class Conditioned(Protocol):
    """Whatever has the tensors of a [`Conditioning`], such as a batch of a latent dataset."""

    @property
    def prompt_embeds(self) -> torch.Tensor: ...
    @property
    def image_embeds(self) -> torch.Tensor | None: ...
    @property
    def condition(self) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class Conditioning:
    """
    What generator and reward model see of a clip besides its noisy latents.

    Wan 2.1 and Wan2.2 A14B take the condition as more channels. Wan2.2 TI2V 5B takes it in place of the first frame,
    whose tokens have the timestep 0; such a condition has as many channels as the latents, and fewer frames.

    Args:
        prompt_embeds (`torch.Tensor` of shape `(batch_size, max_sequence_length, text_dim)`):
            Embeddings of the prompts, padded with zeros. Models are called in their type.
        image_embeds (`torch.Tensor`, *optional*):
            Embeddings of the images `(batch_size, num_image_tokens, image_dim)`, for models with an image encoder.
            Models of first and last frame take `2 * batch_size` of them, those of a clip behind each other.
        condition (`torch.Tensor`, *optional*):
            `(batch_size, 4 + num_channels, num_frames, height, width)`, mask and latents of the images, or
            `(batch_size, num_channels, 1, height, width)`, the clean first frame.
    """

    prompt_embeds: torch.Tensor
    image_embeds: torch.Tensor | None = None
    condition: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Conditioned) -> "Conditioning":
        """Conditioning of the clips of a batch, with their own captions."""
        return cls(batch.prompt_embeds, batch.image_embeds, batch.condition)

    def with_prompts(self, prompt_embeds: torch.Tensor) -> "Conditioning":
        """The same images, with other prompts."""
        return dataclasses.replace(self, prompt_embeds=prompt_embeds)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Conditioning":
        """Copy on `device`, the embeddings in `dtype`; the condition is in float32, as noisy latents are."""
        images, condition = self.image_embeds, self.condition
        return Conditioning(
            self.prompt_embeds.to(device, dtype),
            None if images is None else images.to(device, dtype),
            None if condition is None else condition.to(device, torch.float32),
        )

    def model_inputs(self, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """
        Arguments of a transformer or a reward model, by diffusers' names, for noisy latents.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
                Noisy latents.
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                Noise level, `1000 * sigma`.
        """
        hidden_states, timestep = add_condition(latents, timestep, self.condition)
        dtype, images = self.prompt_embeds.dtype, self.image_embeds
        return {
            "hidden_states": hidden_states.to(dtype),
            "timestep": timestep,
            "encoder_hidden_states": self.prompt_embeds,
            "encoder_hidden_states_image": None if images is None else images.to(dtype),
        }


def add_condition(
    latents: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Noisy latents and their timesteps, with the condition of a [`Conditioning`] where the model expects it.

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
