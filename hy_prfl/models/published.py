"""The published Wan pipelines, by their id on the Hub: what their configurations say."""

from typing import Any


# Sizes of the transformers as published in the Wan 2.1 and 2.2 repositories (`wan/configs/wan_{t2v,i2v,ti2v}_*.py`, FLF2V
# as I2V) and as diffusers' conversion of them names them (`scripts/convert_wan_to_diffusers.py`); all else is a default of
# the class.
_T2V_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_T2V_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_I2V_14B = {**_T2V_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_TI2V_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _T2V_1_3B,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _T2V_14B,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _I2V_14B,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _I2V_14B,
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": {**_I2V_14B, "pos_embed_seq_len": 514},
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _T2V_14B,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": {**_T2V_14B, "in_channels": 36},
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _TI2V_5B,
}
# `boundary_ratio` of those that have a second transformer, of the same size.
BOUNDARY_RATIOS = {"Wan-AI/Wan2.2-T2V-A14B-Diffusers": 0.875, "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 0.9}
# Strides over frames, height and width of Wan 2.1's VAE, and of that of the published pipelines that have another.
VAE_STRIDE = (4, 8, 8)
OTHER_STRIDES = {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": (4, 16, 16)}
