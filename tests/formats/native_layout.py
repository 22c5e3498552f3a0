"""Tiny transformers of every kind, and their weights under Wan's names by a table of our own."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file


DIM = 24

# diffusers' name -> Wan's, by hand and in this direction, so that diffusers' own converter is tested as well.
RENAMES = [
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"^condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"scale_shift_table$", "modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.add_k_proj\.", ".k_img."),
    (r"\.add_v_proj\.", ".v_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm2\.", ".norm3."),
]

IMAGE = {"image_dim": 40, "added_kv_proj_dim": DIM}
# The kinds of models: options of diffusers, and what Wan's config.json says of them.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "t2v": ({}, {"model_type": "t2v"}),
    "i2v": ({"in_channels": 36, **IMAGE}, {"model_type": "i2v", "in_dim": 36}),
    "flf2v": ({"in_channels": 36, **IMAGE, "pos_embed_seq_len": 10}, {"model_type": "flf2v", "in_dim": 36}),
    "wan2.2-i2v": ({"in_channels": 36}, {"model_type": "i2v", "in_dim": 36}),
    "wan2.2-ti2v": ({"in_channels": 48, "out_channels": 48}, {"model_type": "ti2v", "in_dim": 48, "out_dim": 48}),
}


def native_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def make_transformer(kind: str = "t2v", num_layers: int = 3) -> WanTransformer3DModel:
    torch.manual_seed(0)
    options = {"in_channels": 16, "out_channels": 16, **KINDS[kind][0]}
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=num_layers,
        **options,
    )
    return model.eval()


def model_inputs(transformer: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    """Random inputs of a forward pass, the same each time."""
    generator = torch.Generator().manual_seed(1)
    config = transformer.config
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([300.0]),
        # diffusers takes the last 512 tokens for the prompt, and what comes before them for the image.
        "encoder_hidden_states": torch.randn(
            1, 5 if config.image_dim is None else 512, config.text_dim, generator=generator
        ),
    }
    if config.image_dim is not None:
        # First and last frame come as two rows of half the positions.
        rows = (2, config.pos_embed_seq_len // 2) if config.pos_embed_seq_len else (1, 5)
        inputs["encoder_hidden_states_image"] = torch.randn(*rows, config.image_dim, generator=generator)
    return inputs


@torch.no_grad()
def run(transformer: WanTransformer3DModel) -> torch.Tensor:
    return transformer(**model_inputs(transformer)).sample


def native_weights(transformer: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    return {native_name(name): tensor.clone() for name, tensor in transformer.state_dict().items()}


def native_entries(kind: str = "t2v") -> dict[str, Any]:
    """A config.json with the entries that Wan's own have."""
    return {
        "text_len": 16,
        "in_dim": 16,
        "dim": DIM,
        "ffn_dim": 32,
        "freq_dim": 64,
        "out_dim": 16,
        "num_heads": 2,
        "num_layers": 3,
        "eps": 1e-06,
        **KINDS[kind][1],
    }


def write_native(folder: Path, weights: dict[str, torch.Tensor], kind: str = "t2v", **entries: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**native_entries(kind), **entries}))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def assert_equal_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same keys, and the same bits in the same type."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
