"""Recipes with the sections and keys of the twelve YAML files of HY-Video-PRFL, with values of our own."""

import shlex
from collections.abc import Callable
from typing import Any

import yaml

from hy_prfl.formats.converted_recipe import ConvertedRecipe


# The fixture `convert`: a recipe's name, and changes to it -> what became of it, and its configuration.
Convert = Callable[..., tuple[ConvertedRecipe, Any]]

COMMON = """
train_id: RUN
task: TASK
model:
  base_path: weights/MODEL
  init_transformer_path: null
  resume_transformer_path: null
  patch_size: [1, 2, 2]
  lora: {use_lora: false, lora_rank: 64, target_modules: [q, k, v, o], resume_lora_path: null}
  ema: {use_ema: false, ema_decay: 0.995}
  fsdp: {fsdp_sharding_startegy: full, use_cpu_offload: false}
  gradient_checkpointing: true
  selective_checkpointing: 1.0
extra_model:
  vae: {name: Wan2.1_VAE.pth, vae_stride: [4, 8, 8]}
  text_encoder: {t5_text_len: 512, t5_checkpoint: t5.pth, t5_tokenizer: umt5}
  image_encoder: {clip_checkpoint: clip.pth, clip_tokenizer: xlm}
  scheduler: {flow_shift: 5.0, num_train_timesteps: 1000, weighting_scheme: uniform, logit_mean: 0, logit_std: 1,
              mode_scale: 1.3}
dataset:
  meta_file_list: [lists/clips_SIZE.list]
  crop_ratio: [1, 1, 1]
  crop_type: random
  uncond_prob: [0.1, 0.0]
  sp_size: 4
  batch_size: 1
  sp_batch_size: 1
  num_workers: 2
  group_frame: null
  group_resolution: null
optimizer: {learning_rate: RATE, adam_beta1: 0.9, adam_beta2: 0.999, weight_decay: 0.02,
            lr_scheduler: constant_with_warmup, lr_warmup_steps: 25, lr_num_cycles: 1, lr_power: 1.0,
            max_train_steps: 4000}
train: {seed: 42, precision: bf16, extra_precision: bf16, allow_tf32: false, save_interval: 100,
        sanity_check_interval: 10, teacher_student_parallel: true, dpo_beta: 300, gradient_accumulation_steps: 5.}
save: {output_dir: outputs, sanity_check_dir: null}
lrm:
  query_attention: {num_queries: 1, num_heads: 8, dropout: 0., return_type: query}
  feature_layer: [8]
  pool: q_attn
  mlp_dim: 5120
  task: motion_quality
  trainable_blocks: [0, 1, 2, 3, 4, 5, 6, 7]
"""
PREPROCESS = """
start_idx: 0
end_idx: null
sample_n_frames: 81
aspect_ratio: 1.75
seed: 7
precision: bf16
task: i2v
base_dir: weights/MODEL
resolution: [SIDE]
num_frames: 81
batch_size: 1
fps: 16
json_path: lists/input.json
save_dir: clips/SIZE
extract_fps: 16
model_type: wanx
vae_path: weights/MODEL/Wan2.1_VAE.pth
image_processor_path: weights/MODEL/xlm
image_encoder_path: weights/MODEL/clip.pth
tokenizer_path: weights/MODEL/umt5
text_encoder_path: weights/MODEL/t5.pth
max_sequence_length: 512
"""
MODELS = {
    "t2v_480": ("t2v-14b", "Wan2.1-T2V-14B"),
    "t2v_720": ("t2v-14b", "Wan2.1-T2V-14B"),
    "i2v_480": ("i2v-14b-480p", "Wan2.1-I2V-14B-480P"),
    "i2v_720": ("i2v-14b-720p", "Wan2.1-I2V-14B-720P"),
}
TRAININGS = [f"train_{kind}_{name}" for kind in ("pavrm", "prfl") for name in MODELS] + ["train_pavrm_bt_i2v_720"]
RECIPES = [*TRAININGS, "infer_pavrm_i2v_720", "pre_480", "pre_720"]
# What a recipe names once there is a reward model.
REWARD_PARTS = {
    "transformer": "run/checkpoint-100",
    "mlp": "run/mlp_100.ckpt",
    "query_attention": "run/query_100.ckpt",
}


def upstream_recipe(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """
    The content of upstream's file of that name, without `.yaml`.

    Args:
        changes (`dict[str, Any]`, *optional*): Other values by dotted name; a `...` takes the key out.
    """
    size = name[-3:]
    task, model = MODELS.get(name[-7:], ("", f"Wan2.1-I2V-14B-{size}P"))
    text = PREPROCESS if name.startswith("pre") else COMMON
    rate, side = "5e-6" if "prfl" in name else "1e-6", "480" if size == "480" else "704"
    run = name.removeprefix("train_").removeprefix("infer_")
    for word, value in {"TASK": task, "RUN": run, "MODEL": model, "SIZE": size, "RATE": rate, "SIDE": side}.items():
        text = text.replace(word, value)
    recipe: dict[str, Any] = yaml.safe_load(text)
    if "prfl" in name:
        recipe["model"] |= {f"lrm_{part}_path": None for part in REWARD_PARTS}
        recipe["save"]["log_dir"] = None
    elif "pavrm" in name:
        recipe["model"] |= {"resume_mlp_path": None}
        recipe["lrm"]["loss"] = "bt" if "_bt_" in name else "ce"
        recipe["eval"] = {"seed": 1024}
        recipe["dataset"]["val_meta_file_list"] = [f"lists/clips_{size}.list"]
        if "_bt_" in name:
            recipe["dataset"]["meta_file_lose_list"] = [f"lists/clips_{size}.list"]
        else:
            recipe["model"]["resume_query_attention_path"] = None
        if "_bt_" in name or name.startswith("infer"):
            recipe["optimizer"]["learning_rate_mlp"] = "1e-5"
        if name.startswith("infer"):
            del recipe["dataset"]["meta_file_list"]
        else:
            recipe["eval"]["timestep"] = [201, 400, 600, 800, 1000]
    for key, value in (changes or {}).items():
        *sections, leaf = key.split(".")
        section = recipe
        for part in sections:
            section = section.setdefault(part, {})
        section[leaf] = value
        if value is ...:
            del section[leaf]
    return recipe


def reward_parts(prefix: str) -> dict[str, str]:
    """Changes that name the three files of a reward model, `prefix` being lrm or resume."""
    return {f"model.{prefix}_{part}_path": path for part, path in REWARD_PARTS.items()}


def commands(converted: ConvertedRecipe, *words: str) -> list[str]:
    """The commands to run first that begin with these words."""
    return [command for command in converted.first if command.startswith(" ".join(words))]


def options_of(command: str) -> list[str]:
    return shlex.split(command)[2:]
