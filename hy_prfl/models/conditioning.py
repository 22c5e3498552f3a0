"""The conditioning of a transformer: prompt embeddings, and images as extra channels or as a clean first frame."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch


# Height and width of a patch in latent pixels. All Wan transformers have it, and diffusers' pipelines hard-code it.
PATCH = 2


class Conditioned(Protocol):
    """Any object with the tensors of a [`Conditioning`], such as a batch of a latent dataset."""

    @property
    def prompt_embeds(self) -> torch.Tensor: ...
    @property
    def image_embeds(self) -> torch.Tensor | None: ...
    @property
    def condition(self) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class Conditioning:
    """
    Inputs of the generator and the reward model besides noisy latents and timesteps, for a batch of clips.

    Wan 2.1 and Wan2.2 A14B take the condition as extra channels. In Wan2.2 TI2V 5B it replaces the first latent frame,
    whose tokens have timestep 0. Such a condition has as many channels as the latents, and fewer frames.

    Args:
        prompt_embeds (`torch.Tensor` of shape `(batch_size, max_sequence_length, text_dim)`):
            Embeddings of the prompts, padded with zeros. Latents and image embeddings are cast to their type.
        image_embeds (`torch.Tensor`, *optional*):
            Embeddings of the images `(batch_size, num_image_tokens, image_dim)`, for models with an image encoder.
            Models with a first and a last frame take `2 * batch_size` of them; the two of a clip are consecutive.
        condition (`torch.Tensor`, *optional*):
            Mask and latents of the images `(batch_size, 4 + num_channels, num_frames, height, width)`, or the clean
            first frame `(batch_size, num_channels, 1, height, width)`.
    """

    prompt_embeds: torch.Tensor
    image_embeds: torch.Tensor | None = None
    condition: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Conditioned) -> "Conditioning":
        """The conditioning of a batch, with the captions of its clips."""
        return cls(batch.prompt_embeds, batch.image_embeds, batch.condition)

    def with_prompts(self, prompt_embeds: torch.Tensor) -> "Conditioning":
        """The same images, with other prompts."""
        return dataclasses.replace(self, prompt_embeds=prompt_embeds)

    def taken_by(self, model_config: Mapping[str, Any]) -> "Conditioning":
        """
        Only what a model takes: image embeddings and a condition are left out if it has no input for them.

        A model takes the condition if it has extra channels for it, or if it is a clean first frame.
        """
        condition, num_channels = self.condition, model_config["out_channels"]
        is_first_frame = condition is not None and condition.shape[1] == num_channels
        takes_condition = is_first_frame or model_config["in_channels"] > num_channels
        return Conditioning(
            self.prompt_embeds,
            None if model_config["image_dim"] is None else self.image_embeds,
            condition if takes_condition else None,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Conditioning":
        """Copy to `device`. Embeddings are cast to `dtype`, the condition to float32, the type of noisy latents."""
        images, condition = self.image_embeds, self.condition
        return Conditioning(
            self.prompt_embeds.to(device, dtype),
            None if images is None else images.to(device, dtype),
            None if condition is None else condition.to(device, torch.float32),
        )

    def expand(self, batch_size: int) -> "Conditioning":
        """
        The conditioning of one clip, for each clip of a batch.

        The rows are copied. torch multiplies views of one row with another rounding, so that a batch would not get what the
        clip alone gets.

        Args:
            batch_size (`int`):
                Number of clips of the batch.

        Returns:
            `prompt_embeds` `(batch_size, max_sequence_length, text_dim)`, `image_embeds` `(batch_size * num_images,
            num_image_tokens, image_dim)` with one or two images for each clip, the two of a clip consecutive, and
            `condition` `(batch_size, ...)`.

        Raises:
            ValueError: If it is the conditioning of several clips, and not of `batch_size`.
        """
        count, images, condition = len(self.prompt_embeds), self.image_embeds, self.condition
        if count == batch_size:
            return self
        if count != 1 or batch_size < 1:
            raise ValueError(f"`batch_size` must be {count}, the clips of this conditioning, got {batch_size}.")
        return Conditioning(
            self.prompt_embeds.repeat(batch_size, 1, 1),
            None if images is None else images.repeat(batch_size, 1, 1),
            None if condition is None else condition.repeat(batch_size, 1, 1, 1, 1),
        )

    def model_inputs(self, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """
        Keyword arguments, by diffusers' names, with which a transformer or a reward model is called on noisy latents.

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
    Put the condition of a [`Conditioning`] where the model expects it: in extra channels, or in the first frames.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Noisy latents.
        timestep (`torch.Tensor` of shape `(batch_size,)`):
            Noise level, `1000 * sigma`.
        condition (`torch.Tensor`, *optional*):
            `(batch_size, 4 + num_channels, num_frames, height, width)`, or `(batch_size, num_channels, 1, height, width)`.

    Returns:
        The model's input, and its timesteps: `(batch_size,)`, or `(batch_size, num_tokens)` with a clean first frame.
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
    """How many of the first latent frames the condition replaces: 0 or 1 for Wan's models. They are not predicted."""
    if condition is None or condition.shape[1] != latents.shape[1]:
        return 0
    return condition.shape[2]


def put_condition(latents: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
    """Replace the first latent frames by a clean first frame. Any other condition leaves the latents unchanged."""
    num_clean = num_clean_frames(latents, condition)
    if condition is None or num_clean == 0:
        return latents
    return torch.cat([condition.to(latents.dtype), latents[:, :, num_clean:]], dim=2)
