"""Encodes frames to latents, prompts to embeddings and images to conditions, for datasets and scores."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from ..formats.pipeline_info import PipelineInfo
from ..runtime.vae_tiling import VAETiling, set_tiling
from .video import to_uint8


# Values of each weight tensor that go into a fingerprint: enough to distinguish models, and quick for UMT5-XXL.
FINGERPRINT_VALUES = 4096

# Configuration entries that determine a VAE's latent space.
VAE_CONFIG = ("z_dim", "scale_factor_spatial", "scale_factor_temporal", "latents_mean", "latents_std")


class LatentEncoder:
    """
    Encodes clips with a Wan pipeline's own methods and constants, exactly as at inference.

    Args:
        pipeline (`WanPipeline` or `WanImageToVideoPipeline`):
            The pipeline. Its transformer is not used and may be None.
        max_sequence_length (`int`, defaults to 512):
            Longest prompt, in tokens; longer ones are truncated.
        uses_last_frame (`bool`, defaults to `False`):
            Whether the pipeline's transformer requires a last image as well as a first one (Wan2.1 FLF2V).
        vae_tiling (`str`, defaults to `"auto"`):
            Whether the VAE works in tiles, see [`~hy_prfl.runtime.vae_tiling.set_tiling`].

    Raises:
        ValueError: If the pipeline is not a Wan pipeline.

    Example:
        ```python
        encoder = LatentEncoder.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers", device="cuda")
        latents = encoder.encode_video(to_float(read_video("clip.mp4", fps=16, num_frames=81)))
        ```
    """

    def __init__(
        self,
        pipeline: Any,
        max_sequence_length: int = 512,
        *,
        uses_last_frame: bool = False,
        vae_tiling: VAETiling = "auto",
    ) -> None:
        if not isinstance(pipeline, (WanPipeline, WanImageToVideoPipeline)):
            raise ValueError(
                f"expected a `WanPipeline` or a `WanImageToVideoPipeline`, got a `{type(pipeline).__name__}`."
            )
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.is_image_to_video = isinstance(pipeline, WanImageToVideoPipeline)
        self.uses_last_frame = uses_last_frame
        self.vae_tiling = vae_tiling
        self.vae_fingerprint = vae_fingerprint(pipeline.vae)
        self.text_encoder_fingerprint = text_encoder_fingerprint(pipeline.text_encoder, pipeline.tokenizer)
        image_encoder = pipeline.image_encoder if self.is_image_to_video else None
        self.image_encoder_fingerprint = None if image_encoder is None else _fingerprint(image_encoder, [])

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PipelineInfo,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        max_sequence_length: int = 512,
        vae_tiling: VAETiling = "auto",
    ) -> "LatentEncoder":
        """
        Load a pipeline without its transformers.

        Args:
            pretrained_model_name_or_path (`str` or [`~hy_prfl.formats.pipeline_info.PipelineInfo`]):
                Folder of the pipeline or its id on the Hub, or what has been read of it already, with its revision.
            dtype (`torch.dtype`, defaults to `torch.float32`):
                Type of the text encoder. VAE and image encoder are always float32, as diffusers recommends for Wan.
        """
        # Called on the pipeline's own class: `DiffusionPipeline.from_pretrained` does not accept a missing transformer.
        info = PipelineInfo.of(pretrained_model_name_or_path, revision)
        pipeline = info.pipeline_class.from_pretrained(
            info.source,
            revision=info.revision,
            variant=variant,
            dtype={"default": torch.float32, "text_encoder": dtype},
            transformer=None,
            transformer_2=None,
        )
        return cls(
            pipeline.to(device),
            max_sequence_length=max_sequence_length,
            uses_last_frame=info.last_image == "required",
            vae_tiling=vae_tiling,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Properties of the encoders that determine the encoded values."""
        return {
            "pipeline": type(self.pipeline).__name__,
            "vae": self.vae_fingerprint,
            "text_encoder": self.text_encoder_fingerprint,
            "image_encoder": self.image_encoder_fingerprint,
            "uses_last_frame": self.uses_last_frame,
            "text_encoder_dtype": str(self.pipeline.text_encoder.dtype),
            "max_sequence_length": self.max_sequence_length,
            "vae_tiling": self.vae_tiling,
        }

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position."""
        return self.pipeline.vae_scale_factor_spatial

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this: VAE stride times the patch size 2 of every Wan transformer."""
        return self.spatial_stride * 2

    def latents_shape(self, num_frames: int, height: int, width: int) -> list[int]:
        """Shape of the latents of a video, without its batch dimension."""
        num_latent_frames = (num_frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        stride = self.spatial_stride
        return [self.pipeline.vae.config.z_dim, num_latent_frames, height // stride, width // stride]

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """
        Normalised latents of one video, see `encode_videos`.

        Args:
            frames (`torch.Tensor` of shape `(num_frames, 3, height, width)`):
                In [-1, 1]; `4k + 1` frames, height and width multiples of `size_multiple`.

        Returns:
            `torch.Tensor` of shape `(num_channels, num_latent_frames, height / 8, width / 8)`, float32, on the CPU. For
            Wan2.2 TI2V 5B, height and width are divided by 16.
        """
        return self.encode_videos(frames[None])[0]

    @torch.no_grad()
    def encode_videos(self, frames: torch.Tensor) -> torch.Tensor:
        """
        Normalised latents of videos: the mode of the VAE's posterior, `(mode - latents_mean) / latents_std`.

        Args:
            frames (`torch.Tensor` of shape `(batch_size, num_frames, 3, height, width)`):
                In [-1, 1]; `4k + 1` frames, height and width multiples of `size_multiple`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_channels, num_latent_frames, height / 8, width / 8)`, float32, on the
            CPU. For Wan2.2 TI2V 5B, height and width are divided by 16.

        Raises:
            ValueError: If the frames have another shape.
        """
        self._check_frames(frames[0])
        vae = self.pipeline.vae
        self._set_tiling(frames.shape[-2:], num_frames=frames.shape[1], batch_size=frames.shape[0])
        videos = frames.transpose(1, 2).to(vae.device, vae.dtype)
        latents = vae.encode(videos).latent_dist.mode().float()
        # As in the pipelines: computed in float32, and multiplied by the reciprocal of the standard deviation.
        latents_mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
        latents_std = 1.0 / torch.tensor(vae.config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
        return ((latents - latents_mean) * latents_std).cpu()

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """
        Text embedding of one prompt, without its padding.

        Returns:
            `torch.Tensor` of shape `(num_tokens, text_dim)`, float32, on the CPU. The pipeline's transformer takes it
            padded with zeros to `max_sequence_length`.
        """
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return strip_padding(prompt_embeds[0].float().cpu())

    @torch.no_grad()
    def encode_condition(
        self, frames: torch.Tensor, num_frames: int | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """
        Inputs of an image-to-video pipeline's transformer besides latents and text.

        Args:
            frames (`torch.Tensor` of shape `(num_frames, 3, height, width)`):
                In [-1, 1]. Only the first frame is used, and also the last one if the pipeline requires a last image.
            num_frames (`int`, *optional*):
                Frames of the video to generate, `len(frames)` if not given.

        Returns:
            `image_embeds` and `condition`, float32, on the CPU.

            - `image_embeds` of shape `(num_image_tokens, image_dim)`, or `(2, num_image_tokens, image_dim)` for two
              images. None if the pipeline has no image encoder (Wan2.2).
            - `condition` of shape `(4 + num_channels, num_latent_frames, height / 8, width / 8)`: mask and latents of the
              first frame, or of the first and the last one. For Wan2.2 TI2V 5B only the latents of the first frame,
              `(num_channels, 1, height / 16, width / 16)`.

        Raises:
            ValueError: If the pipeline is a text-to-video pipeline, or if it needs two images and `frames` has only one.
        """
        if not self.is_image_to_video:
            raise ValueError(
                f"`encode_condition` needs an image-to-video pipeline, not {type(self.pipeline).__name__}."
            )
        if self.uses_last_frame and len(frames) == 1:
            raise ValueError("the pipeline needs a first and a last image, got one frame.")
        self._check_sides(frames)
        device = self.pipeline.vae.device
        images = frames[[0, -1] if self.uses_last_frame else [0]].to(device, torch.float32)
        height, width = frames.shape[-2:]
        num_frames = len(frames) if num_frames is None else num_frames
        self._set_tiling((height, width), num_frames=num_frames)

        image_embeds = None
        if self.pipeline.image_encoder is not None:
            pictures = [Image.fromarray(image) for image in to_uint8(images)]
            image_embeds = self.pipeline.encode_image(pictures, device).float().cpu()
            image_embeds = image_embeds if self.uses_last_frame else image_embeds[0]

        # The latents are not used. They are passed so that the pipeline draws no noise.
        latents = torch.zeros(1, *self.latents_shape(num_frames, height, width))
        _, condition, *_ = self.pipeline.prepare_latents(
            images[:1],
            batch_size=1,
            num_channels_latents=latents.shape[1],
            height=height,
            width=width,
            num_frames=num_frames,
            dtype=torch.float32,
            device=device,
            latents=latents,
            last_image=images[1:] if self.uses_last_frame else None,
        )
        return image_embeds, condition[0].float().cpu()

    def _set_tiling(self, size: Sequence[int], *, num_frames: int, batch_size: int = 1) -> None:
        height, width = size
        set_tiling(
            self.pipeline.vae, self.vae_tiling, "encode",
            height=height, width=width, num_frames=num_frames, batch_size=batch_size,
        )  # fmt: skip

    def _check_frames(self, frames: torch.Tensor) -> None:
        self._check_sides(frames)
        temporal = self.pipeline.vae_scale_factor_temporal
        if (len(frames) - 1) % temporal:
            raise ValueError(f"the number of frames must be {temporal}k + 1, got {len(frames)}.")

    def _check_sides(self, frames: torch.Tensor) -> None:
        height, width = frames.shape[-2:]
        multiple = self.size_multiple
        if frames.ndim != 4 or frames.shape[1] != 3 or height % multiple or width % multiple:
            raise ValueError(
                f"expected frames of shape (num_frames, 3, height, width), sides multiples of {multiple}, "
                f"got {tuple(frames.shape)}."
            )


def local_encoder_files(pretrained_model_name_or_path: str) -> list[Path]:
    """Files of a local pipeline folder that determine the encoded values. None for a Hub id: its revision does that."""
    files = sorted(Path(pretrained_model_name_or_path).glob("*/*"))
    return [path for path in files if not path.parent.name.startswith("transformer")]


def strip_padding(prompt_embeds: torch.Tensor) -> torch.Tensor:
    """
    Remove the rows of zeros that Wan pads text embeddings `(num_tokens, text_dim)` with.

    The embedding of a real token is never all zeros, because the text encoder ends with a normalization.
    """
    filled = (prompt_embeds != 0).any(dim=1).nonzero()
    return prompt_embeds[: int(filled[-1]) + 1 if len(filled) else 1]


def vae_fingerprint(vae: Any) -> str:
    """
    Short hash that identifies a VAE's latent space: equal for the same weights in any floating-point type or file format.

    It is made from the configuration of the latents and the signs of the weights. Rounding to half precision changes
    values but no signs.
    """
    return _fingerprint(vae, [(name, vae.config[name]) for name in VAE_CONFIG])


def text_encoder_fingerprint(text_encoder: Any, tokenizer: Any) -> str:
    """Short hash that identifies a text encoder and its tokenizer, made like `vae_fingerprint`."""
    return _fingerprint(text_encoder, [("vocabulary", len(tokenizer)), ("d_model", text_encoder.config.d_model)])


def _fingerprint(model: torch.nn.Module, config: list[tuple[str, Any]]) -> str:
    digests = []
    for parameter in model.parameters():
        signs = torch.signbit(parameter.detach().flatten()[:FINGERPRINT_VALUES]).cpu().numpy()
        digests.append(hashlib.sha256(repr(tuple(parameter.shape)).encode() + signs.tobytes()).hexdigest())
    # Sorted, because names and order of the parameters depend on library versions.
    return hashlib.sha256(repr((config, sorted(digests))).encode()).hexdigest()[:16]
