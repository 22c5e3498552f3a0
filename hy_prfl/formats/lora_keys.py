"""
Finds the layer and the part, such as `lora_A`, of each tensor in a LoRA file by its key.

A key consists of a prefix, the layer and the part. The layer has Wan's or diffusers' name, with dots or underscores.
All combinations are read. For a file that is not a LoRA of a Wan transformer, the error says what the file is.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .wan_native import key_names, layer_names


# Longer prefixes first. VideoX-Fun writes two underscores after `lora_unet`, a compiled model has `_orig_mod`.
PREFIX = re.compile(
    r"((base_model\.model|model\.diffusion_model|diffusion_model|transformer|pipe\.dit|dit|model)\."
    r"|lora_unet__?|lora_transformer_|lycoris_|lora_)?(_orig_mod[._])?"
)
# peft may keep the adapter's name, as in `lora_A.default.weight`.
_ADAPTER = r"(\.(?!weight$|bias$)\w+)?"
# End of a key -> what the tensor is. `diff`, `diff_b` and `diff_m` are added to a weight, a bias and a modulation.
PARTS = {
    "down": re.compile(rf"\.(lora_A|lora_down|lora\.down){_ADAPTER}(\.weight)?$"),
    "up": re.compile(rf"\.(lora_B|lora_up|lora\.up){_ADAPTER}(\.weight)?$"),
    "bias": re.compile(rf"\.lora_B{_ADAPTER}\.bias$"),
    "magnitude": re.compile(rf"\.lora_magnitude_vector{_ADAPTER}(\.weight)?$"),
    "alpha": re.compile(r"\.alpha$"),
    "diff": re.compile(r"\.(diff|w_norm)$"),
    "diff_b": re.compile(r"\.(diff_b|b_norm)$"),
    "diff_m": re.compile(r"\.diff_m$"),
}
DIFFERENCES = ("diff", "diff_b", "diff_m")

# Pattern in a key -> the method that it belongs to.
OTHER_METHODS = {
    r"\.dora_scale$": "DoRA as LyCORIS writes it",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.b?oft_": "OFT",
    r"\.lora_mid": "a LoRA with a third factor",
    r"\.lora_E": "AdaLoRA",
    r"vera_lambda": "VeRA",
    r"\.(ia3_l|on_input$)": "IA3",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.set_weight$": "a file that replaces whole weights",
    r"\.reshape_weight$": "a file that changes the shape of weights",
}
# Scales of weights in float8, as ComfyUI and others name them.
SCALES = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|(weight|input)_scale(_inv|_2)?|comfy_quant)$")
# Pattern in a key -> what such a file is.
OTHER_MODELS = (
    (r"(^|[._])(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]", "Stable Diffusion"),
    (r"(^|[._])(single_transformer_blocks|double_blocks|single_blocks)[._]", "Flux or HunyuanVideo"),
    (r"(^|[._])(joint_blocks|joint_transformer_blocks)[._]", "Stable Diffusion 3"),
    (r"(^|[._])transformer_blocks[._]", "another transformer, such as Flux, LTX-Video, CogVideoX or Qwen-Image"),
    (r"(^|[._])vace_(blocks|patch_embedding)[._]", "Wan VACE, which has layers that a Wan pipeline does not have"),
    (
        r"(^|[._])(face_adapter|face_encoder|motion_encoder|pose_patch_embedding|control_adapter|ref_conv|audio_\w+)[._]",
        "a model derived from Wan, with layers that Wan does not have",
    ),
)
TEXT_ENCODER = re.compile(
    r"^(lora_(prior_)?te\d?_|(base_model\.model\.)?text_(encoders?|model)(_\d)?[._]"
    r"|conditioner\.|cond_stage_model\.)"
)
WHOLE_WEIGHT = re.compile(r"(\.(weight|bias|modulation|scale|scale_weight|scale_input)|scale_shift_table)$")


@dataclass(frozen=True)
class LoraKeys:
    """
    The parsed keys of a file.

    Args:
        prefix (`str`):
            Start of all keys.
        is_native (`bool`):
            Whether layers have Wan's own names, not diffusers'.
        entries (`dict[str, tuple[str, str]]`):
            Key -> the layer or, for a difference, the parameter of `WanTransformer3DModel`, and the part, one of `PARTS`.
    """

    prefix: str
    is_native: bool
    entries: dict[str, tuple[str, str]]

    @property
    def format(self) -> str:
        """The program whose layout this is."""
        return {
            "transformer.": "diffusers",
            "diffusion_model.": "comfyui",
            "lora_unet_": "kohya",
            "lora_unet__": "VideoX-Fun",
            "lycoris_": "LyCORIS",
            "lora_": "upstream",
            "base_model.model.": "upstream" if self.is_native else "peft",
            "": "DiffSynth" if self.is_native else "peft",
        }.get(re.sub("_orig_mod[._]$", "", self.prefix), f"'{self.prefix}'")


def parse_keys(keys: Iterable[str], *, source: str) -> LoraKeys:
    """
    Find the layer and the part of each tensor of a LoRA file.

    Raises:
        ValueError: If it is not a LoRA of a Wan transformer. The message names keys and says what the file is.
    """
    keys = list(keys)
    if not keys:
        raise ValueError(f"{source}: the file has no tensors.")
    _refuse_other_methods(keys, source)
    _refuse_scaled_weights(keys, source)
    parsed = {key: _parse(key) for key in keys}
    if not any(parsed.values()):
        raise ValueError(f"{source}: {_describe_without_parts(keys)}")
    blocks = tuple(sorted({int(index) for key in keys for index in re.findall(r"(?<![a-z])blocks[._](\d+)", key)}))
    names = _names(blocks)
    entries: dict[str, tuple[str, str]] = {}
    unknown: list[str] = []
    for key, found in parsed.items():
        target = None if found is None else names.find(*found[1:])
        if found is None or target is None:
            unknown.append(key)
        else:
            entries[key] = (target, found[2])
    if unknown:
        raise ValueError(f"{source}: {_describe_unknown(unknown, keys)}")
    prefixes = {key: found[0] for key, found in parsed.items() if found is not None}
    prefix = prefixes[keys[0]]
    others = [key for key in keys if prefixes[key] != prefix]
    if others:
        raise ValueError(f"{source}: unknown {_list(others)} in a LoRA whose keys start with '{prefix}'.")
    return LoraKeys(prefix, any(_plain(found[1]) in names.native for found in parsed.values() if found), entries)


def _parse(key: str) -> tuple[str, str, str] | None:
    """Prefix, name of the layer, and part of a key; None if it does not end in a known part."""
    for part, pattern in PARTS.items():
        match = pattern.search(key)
        if match is not None:
            prefix = PREFIX.match(key)
            assert prefix is not None
            return prefix.group(), key[prefix.end() : match.start()], part
    return None


def _plain(name: str) -> str:
    return name.replace(".", "_")


@dataclass(frozen=True)
class _Names:
    """Layers and parameters of `WanTransformer3DModel` by both of their names, with underscores instead of dots."""

    layers: dict[str, str]
    parameters: dict[str, str]
    native: set[str]

    def find(self, name: str, part: str) -> str | None:
        """The layer of a LoRA's tensor, or the parameter that a difference is added to; None if there is none."""
        if part not in DIFFERENCES:
            return self.layers.get(_plain(name))
        # A modulation belongs to no layer. ComfyUI writes the name of the modulation, LightX2V that of its block.
        ends = {"diff": ("_weight", ""), "diff_b": ("_bias",), "diff_m": ("_modulation", "_scale_shift_table")}[part]
        found = (self.parameters.get(f"{_plain(name)}{end}") for end in ends)
        return next((parameter for parameter in found if parameter is not None), None)


@lru_cache(maxsize=8)
def _names(blocks: tuple[int, ...]) -> _Names:
    layers, parameters = (
        {_plain(written): name for name, native in names.items() for written in (name, native)}
        for names in (layer_names(blocks), key_names(blocks))
    )
    native = {_plain(written) for name, written in key_names(blocks).items() if written != name}
    return _Names(layers, parameters, native | {re.sub("_(weight|bias|modulation)$", "", name) for name in native})


def _refuse_other_methods(keys: Sequence[str], source: str) -> None:
    for pattern, method in OTHER_METHODS.items():
        found = [key for key in keys if re.search(pattern, key)]
        if found:
            raise ValueError(
                f"{source}: {_list(found)} belong{'s' * (len(found) == 1)} to {method}, which is not a plain LoRA. Merge it "
                "into the model with the program that trained it and use the result as `transformer_path`."
            )


def _refuse_scaled_weights(keys: Sequence[str], source: str) -> None:
    scales = [key for key in keys if SCALES.search(key)]
    if scales and any(_parse(key) is not None for key in set(keys) - set(scales)):
        raise ValueError(
            f"{source}: {_list(scales)} belong{'s' * (len(scales) == 1)} to a LoRA in scaled float8, which is not supported. Use "
            "the same LoRA in bfloat16 or float16, or save it again with each weight multiplied by its scale."
        )


def _describe_without_parts(keys: Sequence[str]) -> str:
    if all(WHOLE_WEIGHT.search(key) for key in keys):
        return (
            f"these are whole weights ({_list(keys)}), not a LoRA. Pass a transformer as `transformer_path`; `convert "
            "--transformer` makes the folder for it."
        )
    return f"no key has an ending of a LoRA, such as `.lora_A.weight` or `.lora_up.weight`: {_list(keys)}."


def _describe_unknown(unknown: Sequence[str], keys: Sequence[str]) -> str:
    text = [key for key in unknown if TEXT_ENCODER.search(key)]
    if text and len(text) == len(keys):
        return f"this is a LoRA of a text encoder, not of a Wan transformer: {_list(text)}."
    for pattern, model in OTHER_MODELS:
        matching = [key for key in unknown if re.search(pattern, key)]
        if matching:
            return f"this is a LoRA of {model}, not of a Wan transformer: {_list(matching)}."
    if text:
        return (
            f"{_list(text)} belong{'s' * (len(text) == 1)} to a text encoder; only LoRAs of the transformer are supported. Remove "
            "these tensors to use the rest."
        )
    second = [key for key in unknown if key.startswith("transformer_2.")]
    if second:
        return f"{_list(second)} belong to the second transformer: save them in a separate file for `lora_2_path`."
    found = _parse(unknown[0])
    if found is None:
        prefix = next((parsed[0] for key in keys if (parsed := _parse(key)) is not None), "")
        return f"unknown {_list(unknown)} in a LoRA whose keys start with '{prefix}'."
    return f"{_list(unknown)}: there is no layer '{found[1]}' in a Wan transformer."


def _list(keys: Sequence[str]) -> str:
    """The first five keys, and how many there are in all."""
    shown = ", ".join(f"'{key}'" for key in keys[:5])
    return f"key {shown}" if len(keys) == 1 else f"{len(keys)} keys, {shown}{', ...' * (len(keys) > 5)}"
