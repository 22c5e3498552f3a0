"""
Sizes of the benchmark: models and clips.

All models must be in proportion to the generator, or the comparison has no meaning. A VAE that is too small would
favour RGB ReFL; the published VAE with 127 million weights beside a generator with one million would favour PRFL. The
published sizes are used as they are. At the small sizes

- the reward model has a fifth of the generator's blocks, like the paper's (8 of 40), and its head is narrower by the same
  factor as the generator;
- the VAE has all layers of Wan's. Its width is chosen so that the ratio of decoding FLOPs to a generator's forward is close to
  that of a published size at 480P and 81 frames ([`decoding_share`]; a test checks that no other width is closer).
  `mid` has the ratio of 14B, the size of the paper's table 4. It is the smaller ratio, in RGB ReFL's favour. `tiny`
  has the ratio of 1.3B: with that of 14B, its VAE would have a single channel, and normalising one channel stops all
  gradients;
- the image reward is a CLIP vision tower with the proportions of ViT-H/14 (the tower of PickScore, the paper's baseline)
  to the 14B generator: a quarter of its width, four fifths of its blocks, and so about 4.4 % of its weights.

One proportion cannot be kept with few frames: the first frame is a larger part of the clip than with 81 frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from hy_prfl.formats.pipeline_info import PUBLISHED, VAE_STRIDE


# FLOPs of decoding 81 frames at 480P, divided by those of one forward of the generator.
PUBLISHED_DECODING_SHARES = {"1.3b": 0.973, "14b": 0.164}


@dataclass(frozen=True)
class Clip:
    """Frames, height and width in pixels."""

    num_frames: int
    height: int
    width: int

    @property
    def latents_shape(self) -> tuple[int, int, int, int]:
        """`(num_channels, num_frames, height, width)` of its latents."""
        frames, rows, columns = VAE_STRIDE
        return 16, (self.num_frames - 1) // frames + 1, self.height // rows, self.width // columns

    @property
    def num_tokens(self) -> int:
        """Tokens of the clip in the generator."""
        _, frames, height, width = self.latents_shape
        return frames * (height // 2) * (width // 2)

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Size:
    """
    Models of one size, and the clips of their measurements.

    Args:
        transformer (`Mapping`):
            Arguments of `WanTransformer3DModel`.
        num_reward_layers (`int`):
            Blocks of the reward model.
        head_dims (`tuple[int, int]`):
            Hidden widths of its head.
        vae (`Mapping`):
            Arguments of `AutoencoderKLWan`.
        image_reward (`Mapping`):
            Arguments of `CLIPVisionConfig`, for RGB ReFL.
        base (`Clip`):
            Clip on which all methods and switches are measured.
        longer, larger (`tuple[Clip, ...]`):
            Clips with more frames, and with more pixels. Only the methods in `COMPARED` are measured on them.
        text_tokens (`int`):
            Length that prompts are padded to.
        options (`Mapping`):
            Options of the trainer, the same for all cases.
    """

    transformer: Mapping[str, Any]
    num_reward_layers: int
    head_dims: tuple[int, int]
    vae: Mapping[str, Any]
    image_reward: Mapping[str, Any]
    base: Clip
    longer: tuple[Clip, ...]
    larger: tuple[Clip, ...]
    text_tokens: int = 512
    options: Mapping[str, Any] = field(default_factory=dict)


def small_size(*, num_heads: int, num_layers: int, vae_width: int, **clips: Any) -> Size:
    """A size whose models are in proportion to a generator with these blocks and heads, of 64 channels each."""
    width = 64 * num_heads
    return Size(
        transformer={
            "num_attention_heads": num_heads, "attention_head_dim": 64, "ffn_dim": 3 * width,
            "num_layers": num_layers, "text_dim": 32, "freq_dim": 64,
        },
        num_reward_layers=num_layers // 5,
        head_dims=(width // 5, width // 10),
        vae={"base_dim": vae_width},
        image_reward={
            "hidden_size": width // 4, "intermediate_size": width, "num_hidden_layers": 4 * num_layers // 5,
            "num_attention_heads": num_heads, "projection_dim": width // 5, "image_size": 56, "patch_size": 14,
        },
        text_tokens=16,
        **clips,
    )  # fmt: skip


def published_size(name: str, *, num_reward_layers: int, **options: Any) -> Size:
    """A Wan 2.1 text-to-video model with its real shapes, Wan's VAE and CLIP ViT-H/14."""
    return Size(
        transformer={**PUBLISHED[name], "text_dim": 4096, "freq_dim": 256, "attention_head_dim": 128,
                     "rope_max_seq_len": 1024},
        num_reward_layers=num_reward_layers,
        head_dims=(1024, 512),
        vae={},
        image_reward={
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "projection_dim": 1024, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
        },
        base=Clip(81, 480, 832),
        longer=(Clip(17, 480, 832), Clip(49, 480, 832)),
        larger=(Clip(81, 720, 1280),),
        options=options,
    )  # fmt: skip


SIZES = {
    "tiny": small_size(
        num_heads=2, num_layers=5, vae_width=2,
        base=Clip(9, 128, 128),
        longer=(Clip(17, 128, 128), Clip(33, 128, 128)),
        larger=(Clip(9, 192, 192), Clip(9, 256, 256)),
    ),
    "mid": small_size(
        num_heads=4, num_layers=10, vae_width=2,
        base=Clip(9, 128, 128),
        longer=(Clip(17, 128, 128),),
        larger=(Clip(9, 192, 192),),
    ),
    "1.3b": published_size("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", num_reward_layers=8),
    "14b": published_size("Wan-AI/Wan2.1-T2V-14B-Diffusers", num_reward_layers=8, lora_rank=32),
}  # fmt: skip


def decoding_share(size: Size) -> float:
    """FLOPs of decoding the base clip, divided by those of one forward of the generator. Needs no weights."""
    latents = torch.empty(1, *size.base.latents_shape, device="meta")
    with torch.device("meta"), torch.no_grad():
        transformer, vae = WanTransformer3DModel(**size.transformer), AutoencoderKLWan(**size.vae)
        text = torch.empty(1, size.text_tokens, size.transformer["text_dim"])
        with FlopCounterMode(display=False) as forward:
            transformer(latents, torch.empty(1), text)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(latents)
    return float(decoding.get_total_flops() / forward.get_total_flops())
