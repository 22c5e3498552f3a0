"""Keys of LoRA files: those of Wan in every spelling, and what files of other kinds are told to be."""

import pytest

from hy_prfl.formats.lora_keys import parse_keys

from .native_layout import make_transformer, native_name


PREFIXES = [
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "pipe.dit.",
    "",
    "_orig_mod.",
]
UNDERSCORE_PREFIXES = ["lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_", "lora_"]


def layers() -> list[str]:
    """All layers of the largest kind of model that a LoRA can have factors for."""
    state_dict = make_transformer("flf2v").state_dict()
    return [
        name.removesuffix(".weight")
        for name, tensor in state_dict.items()
        if name.endswith("weight") and tensor.ndim > 1
    ]


@pytest.mark.parametrize("prefix", [*PREFIXES, *UNDERSCORE_PREFIXES])
@pytest.mark.parametrize("native", [True, False])
def test_every_layer_in_every_spelling(prefix: str, native: bool) -> None:
    names = layers()
    assert len(names) == 3 * 12 + 9
    written = {}
    for name in names:
        spelled = native_name(f"{name}.").removesuffix(".") if native else name
        spelled = spelled.replace(".", "_") if prefix in UNDERSCORE_PREFIXES else spelled
        written[f"{prefix}{spelled}.lora_down.weight"] = name
    keys = parse_keys(written, source="x")
    assert keys.entries == {key: (name, "down") for key, name in written.items()}
    assert keys.is_native == native


@pytest.mark.parametrize("native", [True, False])
def test_every_parameter(native: bool) -> None:
    for name in make_transformer("flf2v").state_dict():
        spelled = native_name(name) if native else name
        end = {"weight": ".diff", "bias": ".diff_b"}.get(spelled.rpartition(".")[2])
        key = (
            f"diffusion_model.{spelled}.diff" if end is None else f"diffusion_model.{spelled.rpartition('.')[0]}{end}"
        )
        assert parse_keys([key], source="x").entries == {key: (name, (end or ".diff")[1:])}


@pytest.mark.parametrize(
    ("end", "part"),
    [
        ("lora_A.weight", "down"), ("lora_A.default.weight", "down"), ("lora_A.my_run_2.weight", "down"),
        ("lora_down.weight", "down"), ("lora.down.weight", "down"), ("lora_A", "down"), ("lora_B.weight", "up"),
        ("lora_B.default.weight", "up"), ("lora_up.weight", "up"), ("lora.up.weight", "up"), ("alpha", "alpha"),
        ("lora_B.bias", "bias"), ("lora_B.default.bias", "bias"), ("lora_magnitude_vector", "magnitude"),
        ("lora_magnitude_vector.default.weight", "magnitude"),
    ],
)  # fmt: skip
def test_parts(end: str, part: str) -> None:
    key = f"base_model.model.blocks.0.attn1.to_q.{end}"
    assert parse_keys([key], source="x").entries == {key: ("blocks.0.attn1.to_q", part)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "the file has no tensors"),
        (["lora_unet_blocks_0_self_attn_q.lokr_w1", "lora_unet_blocks_0_self_attn_q.alpha"], "belongs to LoKr.*Merge it"),
        (["diffusion_model.blocks.0.self_attn.q.lokr_w2_a"], "belongs to LoKr"),
        (["lycoris_blocks_0_attn1_to_q.hada_w1_a"], "belongs to LoHa"),
        (["lora_unet_blocks_0_self_attn_q.oft_blocks"], "belongs to OFT"),
        (["base_model.model.blocks.0.attn1.to_q.oft_R.weight"], "belongs to OFT"),
        (["base_model.model.blocks.0.attn1.to_q.boft_R"], "belongs to OFT"),
        (["lora_unet_blocks_0_self_attn_q.a1.weight"], "belongs to GLoRA"),
        (["base_model.model.blocks.0.attn1.to_q.ia3_l"], "belongs to IA3"),
        (["base_model.model.blocks.0.attn1.to_q.lora_E"], "belongs to AdaLoRA"),
        (["base_model.model.blocks.0.attn1.to_q.vera_lambda_d"], "belongs to VeRA"),
        (["diffusion_model.blocks.0.self_attn.q.dora_scale"], "belongs to DoRA as LyCORIS writes it"),
        (["diffusion_model.patch_embedding.reshape_weight"], "a file that changes the shape of weights"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "LoRA of Stable Diffusion, not of a Wan"),
        (["lora_unet_input_blocks_4_1_proj_in.alpha", "lora_te1_text_model_x.alpha"], "LoRA of Stable Diffusion"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "LoRA of Stable Diffusion"),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"], "LoRA of Flux or HunyuanVideo"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "LoRA of Flux or HunyuanVideo"),
        (["lora_unet_joint_blocks_0_x_block_attn_proj.alpha"], "LoRA of Stable Diffusion 3"),
        (["diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"], "another transformer, such as"),
        (["diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight"], "LoRA of Wan VACE"),
        (["diffusion_model.face_adapter.fuser_blocks.0.linear1_q.lora_A.weight"], "LoRA of a model derived from Wan"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], "this is a LoRA of a text encoder"),
        (["text_encoder.encoder.block.0.q.lora_A.weight"], "this is a LoRA of a text encoder"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_A.scale_weight"],
         r"key '.*scale_weight' belongs to a LoRA in scaled float8, which is not supported\. Use"),
        (["lora_unet_blocks_0_ffn_0.lora_up.weight", "lora_unet_blocks_0_ffn_0.lora_up.weight_scale"], "in scaled float8"),
        (["diffusion_model.head.head.lora_up.weight", "scaled_fp8"], "in scaled float8"),
        (["diffusion_model.head.head.lora_up.weight", "diffusion_model.head.head.scale_input"], "in scaled float8"),
        (["blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.scale_weight"], "whole weights"),
        (["text_model.lora_A.weight"], "this is a LoRA of a text encoder"),
        (["a.b"], r"no key has an ending of a LoRA.*'a\.b'"),
        (["blocks.0.self_attn.q.weight", "blocks.0.modulation"], "whole weights .*not a LoRA.*`transformer_path`"),
        (["condition_embedder.time_proj.bias", "scale_shift_table"], "whole weights .*not a LoRA"),
        (["transformer_2.blocks.0.attn1.to_q.lora_A.weight"], "second transformer.*`lora_2_path`"),
        (["transformer.layers.0.lora_A.weight"], r"'transformer\.layers\.0\.lora_A\.weight': there is no layer 'layers\.0'"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.q.bias"], r"unknown key .*q\.bias'"),
        (["diffusion_model.head.head.alpha", "blocks.0.ffn.0.alpha"], r"unknown key 'blocks.*start with 'diffusion_model\.'"),
        (
            ["diffusion_model.head.head.alpha", "lora_te1_x.alpha", "lora_te2_x.alpha"],
            "2 keys, 'lora_te1_x.alpha', 'lora_te2_x.alpha' belong to a text encoder.*Remove",
        ),
    ],
)  # fmt: skip
def test_what_a_file_is(keys: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"my/file\.safetensors: .*{message}"):
        parse_keys(keys, source="my/file.safetensors")
