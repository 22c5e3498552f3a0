"""Finds the diffusers pipeline of one of upstream's recipes, and the blocks of its reward model."""

import json
import re
from pathlib import Path
from typing import Any

from .upstream_keys import RecipeKeys


# Upstream's `task` -> the same model in diffusers' format.
PIPELINES = {
    "t2v-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "t2v-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "i2v-14b-480p": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "i2v-14b-720p": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "flf2v-14b-720p": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
}
# Layers in Wan's native naming -> diffusers'.
ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
LAYERS = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def find_pipeline(keys: RecipeKeys, pipeline: str | None) -> None:
    """
    Set the option for the pipeline, from the name of upstream's weights, or from its task if the name says nothing.

    Args:
        pipeline (`str`, *optional*): Pipeline to use instead.
    """
    task = keys.require("task")
    if task == "i2v-1.3b":
        keys.refuse(
            "task",
            "a published image-to-video model, such as i2v-14b-480p: upstream makes i2v-1.3b from the text-to-video model "
            "by adding input channels of zeros, and there is no such pipeline in diffusers' format",
        )
    task = keys.choice("task", {name: name for name in PIPELINES})
    base_path = str(keys.require("model.base_path"))
    named = named_task(base_path)
    if named is not None and named.split("-")[0] != task.split("-")[0]:
        keys.refuse("task", f"a task of the model in `model.base_path`, {base_path!r}, such as {named}")
    keys.data_folder = f"data/{named or task}"
    keys.pipeline = pipeline or PIPELINES[named or task]
    origin = "the given pipeline; the recipe has" if pipeline else "in diffusers' format:"
    keys.option("pretrained_model_name_or_path", keys.pipeline, f"{origin} task {task}, model.base_path {base_path}")
    if named is None:
        keys.note(
            f"model.base_path: {base_path}: assumed to be the published weights of {task}. If they are your own, name them in "
            "`model.init_transformer_path`: training then starts from them."
        )


def named_task(path: str) -> str | None:
    """Task of the published model that a path names, None if it names none."""
    for task, pipeline in PIPELINES.items():
        name = re.sub("-diffusers$", "", pipeline.split("/")[1], flags=re.IGNORECASE)
        if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", path, re.IGNORECASE):
            return task
    return None


def num_blocks(keys: RecipeKeys) -> int:
    """Number of blocks of the generator: from its folder, or as published."""
    config = Path(keys.pipeline) / "transformer" / "config.json"
    if config.is_file():
        return int(json.loads(config.read_text(encoding="utf-8"))["num_layers"])
    return 30 if "1.3B" in keys.pipeline or keys.values["task"] == "t2v-1.3b" else 40


def read_reward_blocks(keys: RecipeKeys) -> int:
    """Number of blocks of the reward model: it has the generator's first ones. `feature_layer` counts from 1."""
    blocks = keys.require("lrm.trainable_blocks")
    if not isinstance(blocks, list) or not blocks or set(blocks) != set(range(len(set(blocks)))):
        keys.refuse("lrm.trainable_blocks", "the first blocks of the generator, [0, 1, ...]")
    last = len(set(blocks))
    features = keys.require("lrm.feature_layer")
    if features not in (last, [last]):
        keys.refuse(
            "lrm.feature_layer",
            f"[{last}]: the last of the {last} blocks in lrm.trainable_blocks, counted from 1 as in upstream. Only the "
            "output of the last block is scored here; to score an earlier one, shorten lrm.trainable_blocks",
        )
    keys.expect(
        "lrm.query_attention.num_queries",
        1,
        "1: with more, upstream's code gives one score for each query; the reward model here gives one for the clip",
        "a constant here",
    )
    return last


def read_layer(keys: RecipeKeys, name: str) -> str:
    """diffusers' name of a native layer, with or without the name of its attention in front."""
    attention, _, layer = name.rpartition(".") if not name.startswith("ffn") else ("", "", name)
    if layer not in LAYERS or (attention and attention not in ATTENTIONS):
        keys.refuse("model.lora.target_modules", f"a list of {', '.join(LAYERS)}; '{name}' is not one of them")
    return f"{ATTENTIONS[attention]}.{LAYERS[layer]}" if attention else LAYERS[layer]


def checkpointed_blocks(total: int, ratio: float) -> int:
    """How many of `total` blocks upstream checkpoints with `selective_checkpointing: ratio`."""
    count = 0
    for block in range(1, total + 1):
        count += block * ratio >= count + 0.5
    return count


def read_ratio(keys: RecipeKeys, key: str) -> float:
    """A share such as 0.5, or a fraction as text such as "1/3", which upstream allows; 1 if the key is missing."""
    value: Any = keys.take(key, 1.0)
    match = re.fullmatch(r"\s*([\d.]+)\s*/\s*([\d.]+)\s*", str(value))
    try:
        ratio = float(match[1]) / float(match[2]) if match else float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        keys.refuse(key, "a number such as 0.5 or a fraction such as 1/3")
    if ratio < 0:
        keys.refuse(key, "at least 0")
    return ratio
