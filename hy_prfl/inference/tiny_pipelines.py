"""Builds a tiny Wan pipeline with random weights, from the same classes as the 14B model."""

import string
from collections.abc import Iterable, Mapping

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)


WORDS = (
    "a an the red green blue yellow white black circle square triangle star moves to left right up down over wall "
    "plain striped checkered dotted steadily video of shape on background"
).split()


# Configuration of the VAE of Wan 2.2 TI2V 5B, without its width.
VAE_OF_5B: dict[str, object] = {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.01 * index for index in range(48)],
    "latents_std": [1 + 0.01 * index for index in range(48)],
}


def build_tokenizer(words: Iterable[str] = WORDS) -> T5Tokenizer:
    """T5 tokenizer with one token for each word and each printable character."""
    whole_words = [(f"▁{word}", -2.0) for word in words]
    characters = [(character, -8.0) for character in ("▁", *string.ascii_letters, *string.digits, *string.punctuation)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    return T5Tokenizer(vocab=special + whole_words + characters, extra_ids=0)


def build_pipeline(
    *,
    image_to_video: bool = False,
    num_layers: int = 2,
    num_attention_heads: int = 2,
    attention_head_dim: int = 12,
    ffn_dim: int = 32,
    text_dim: int = 32,
    vae_base_dim: int = 3,
    flow_shift: float = 3.0,
    boundary_ratio: float | None = None,
    expand_timesteps: bool = False,
    vae_config: Mapping[str, object] | None = None,
    transformer_config: Mapping[str, object] | None = None,
    seed: int = 0,
) -> WanPipeline | WanImageToVideoPipeline:
    """
    Wan pipeline of tiny size.

    It is like Wan 2.1 by default, like Wan 2.2 A14B with `boundary_ratio`, and like Wan 2.2 TI2V 5B with
    `expand_timesteps`.

    Args:
        image_to_video (`bool`, defaults to `False`):
            Build a `WanImageToVideoPipeline` with a CLIP image encoder. Its transformer takes 16 + 20 channels.
        boundary_ratio (`float`, *optional*):
            Add a second transformer for noise levels below this. An image-to-video pipeline then has no image encoder.
        expand_timesteps (`bool`, defaults to `False`):
            Use one timestep per token, and a VAE with 48 channels and a stride of 16 pixels. An image-to-video pipeline
            then takes the image as first frame.
        vae_config (`Mapping`, *optional*):
            Arguments of `AutoencoderKLWan` that replace those of this function.
        transformer_config (`Mapping`, *optional*):
            Arguments of `WanTransformer3DModel` that replace those of this function.
        seed (`int`, defaults to 0):
            Seed of the random weights.
    """
    torch.manual_seed(seed)
    num_channels = 48 if expand_timesteps else 16
    vae = AutoencoderKLWan(
        **{
            "base_dim": vae_base_dim,
            "z_dim": num_channels,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            **(VAE_OF_5B if expand_timesteps else {}),
            **(vae_config or {}),
        }
    )
    tokenizer = build_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=text_dim, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
        )
    )
    image_dim = 32 if image_to_video and boundary_ratio is None and not expand_timesteps else None
    transformer_options: dict[str, object] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": attention_head_dim,
        "in_channels": 36 if image_to_video and not expand_timesteps else num_channels,
        "out_channels": num_channels,
        "text_dim": text_dim,
        "freq_dim": 64,
        "ffn_dim": ffn_dim,
        "num_layers": num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": image_dim,
        "added_kv_proj_dim": num_attention_heads * attention_head_dim if image_dim else None,
        "rope_max_seq_len": 64,
        **(transformer_config or {}),
    }
    transformers = [
        WanTransformer3DModel(**transformer_options).eval() for _ in range(1 if boundary_ratio is None else 2)
    ]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )
    components = {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
        "boundary_ratio": boundary_ratio,
        "expand_timesteps": expand_timesteps,
        **dict(zip(("transformer", "transformer_2"), transformers, strict=False)),
    }
    if not image_to_video:
        return WanPipeline(**components)
    if image_dim is None:
        return WanImageToVideoPipeline(**components)

    image_encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=image_dim,
            intermediate_size=37,
            projection_dim=image_dim,
            num_attention_heads=4,
            num_hidden_layers=3,
            image_size=32,
            patch_size=16,
        )
    )
    image_processor = CLIPImageProcessor(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32})
    return WanImageToVideoPipeline(**components, image_encoder=image_encoder.eval(), image_processor=image_processor)
