"""
Recipes of HY-Video-PRFL, its nested YAML files, as options of this package.

Every key is carried over, with its unit and meaning, or named in a note with the reason why it is not. A key that no
recipe of upstream's is known to have is refused, as is a value that nothing here corresponds to.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from .upstream_keys import (
    ConvertedRecipe,
    RecipeKeys,
    convert_lists,
    convert_reward_model,
    note_weights,
    quoted,
)


__all__ = ["ConvertedRecipe", "convert_recipe"]


# Upstream's `task` -> the same model in diffusers' format.
PIPELINES = {
    "t2v-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "t2v-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "i2v-14b-480p": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "i2v-14b-720p": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "flf2v-14b-720p": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
}
COMMANDS = ("preprocess", "train_reward", "train_prfl", "score")

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
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LAUNCH_CONFIGS = {"full": "zero3", "hybrid_full": "zero3", "hybrid_zero2": "zero2", "none": "ddp"}

# In upstream's files, and in no line of its code.
DEAD_KEYS = ("dpo_beta", "mode_scale", "extra_precision")


def convert_recipe(path: str | Path, command: str | None = None, ignore: Sequence[str] = ()) -> ConvertedRecipe:
    """
    Translate one of upstream's YAML files.

    Args:
        path (`str` or `Path`):
            The file.
        command (`str`, *optional*):
            What the file is for: `preprocess`, `train_reward`, `train_prfl` or `score`. If not given, its keys tell;
            a reward model's training and evaluation have the same keys, there it is `score` if the name of the file
            begins with `infer`.
        ignore (`Sequence[str]`):
            Keys, as `section.key`, that may be left out although nothing is known about them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML mapping, holds keys that no recipe of upstream's has, lacks one that upstream
            reads, or has a value that nothing here corresponds to. Names file and key.
    """
    keys = RecipeKeys(Path(path))
    for key in ignore:
        if key not in keys.left:
            raise ValueError(f"{path}: `ignore` names '{key}', which is no key of the file.")
        keys.drop(key, "left out as asked for")
    for key in sorted(keys.left):
        if key.split(".")[-1] in DEAD_KEYS:
            keys.drop(key, "no line of upstream's code reads it")
    command = _find_command(keys) if command is None else command
    if command not in COMMANDS:
        raise ValueError(f"`command` must be one of {', '.join(COMMANDS)}, got {command!r}.")
    keys.recipe.command = command
    convert = {
        "preprocess": _convert_preprocess,
        "train_reward": _convert_reward,
        "train_prfl": _convert_prfl,
        "score": _convert_score,
    }
    convert[command](keys)
    if keys.left:
        names = ", ".join(f"`{key}`" for key in sorted(keys.left))
        raise ValueError(
            f"{path}: HY-Video-PRFL's code reads no {names} in a recipe of this kind (`{command}`), so it is not "
            "known what to make of it. Take it out of the file, or name it in `ignore`."
        )
    return keys.recipe


def _find_command(keys: RecipeKeys) -> str:
    if "json_path" in keys.values:
        return "preprocess"
    if any(key.startswith("model.lrm_") for key in keys.values):
        return "train_prfl"
    if "lrm.loss" not in keys.values:
        raise ValueError(
            f"{keys.path}: neither `json_path` (preprocessing) nor `lrm.loss` (reward model) nor `model.lrm_*_path` "
            "(PRFL) is in the file, so it is no recipe of HY-Video-PRFL."
        )
    return "score" if keys.path.name.startswith("infer") else "train_reward"


def _convert_preprocess(keys: RecipeKeys) -> None:
    """`pre_480.yaml`, `pre_720.yaml`."""
    paths = ("vae_path", "text_encoder_path", "tokenizer_path", "image_encoder_path", "image_processor_path")
    resolution = keys.require("resolution")
    short_side = resolution[0] if isinstance(resolution, list) else resolution
    if not isinstance(short_side, int) or short_side % 32:
        keys.refuse("resolution", "a short side, in pixels, that is a multiple of 32")
    pipeline = PIPELINES["i2v-14b-480p" if short_side <= 480 else "i2v-14b-720p"]
    for path in paths:
        for known in re.findall(r"Wan2\.1-[A-Z0-9]+-[0-9.]+B(?:-[0-9]+P)?", str(keys.values.get(path))):
            pipeline = next((name for name in PIPELINES.values() if name.startswith(f"Wan-AI/{known}-")), pipeline)
    keys.option("pretrained_model_name_or_path", pipeline, "the model of the *_path keys in diffusers' format")
    keys.option("manifest", keys.require("json_path"), "json_path")
    keys.option("output_dir", keys.require("save_dir"), "save_dir")
    keys.carry("extract_fps", "fps", keys.number)
    keys.carry("num_frames", "num_frames", keys.whole)
    keys.option("min_num_frames", 1, "upstream takes shorter clips as well")
    keys.option("resolution", short_side, "resolution, its first number; upstream reads no other")
    keys.carry("aspect_ratio", "max_aspect_ratio", keys.number)
    keys.carry("max_sequence_length", "max_sequence_length", keys.whole)
    precision = keys.choice("precision", {"bf16": "bfloat16", "fp16": "bfloat16", "fp32": "float32"})
    keys.option("text_encoder_dtype", precision, "precision; VAE and image encoder run in float32 here")
    keys.expect("start_idx", 0, "0", "clips begin at the first frame here")
    for path in paths:
        keys.drop(path, "the pipeline brings its encoders")
    keys.drop("model_type", "the pipeline says what it is")
    keys.drop("seed", "nothing is random here")
    keys.note("tensors are stored in float16; upstream's .npy files are float32: --tensor_dtype float32.")


def _convert_model(keys: RecipeKeys) -> str:
    """What both trainings have in common: base model, sharding, encoders. Returns the pipeline."""
    keys.require("task")
    pipeline: str = keys.choice("task", PIPELINES)
    keys.option("pretrained_model_name_or_path", pipeline, "task, in diffusers' format")
    keys.drop("model.base_path", "the native weights of that model; any folder in diffusers' format will do")
    keys.drop("model.patch_size", "the model's own configuration has it")
    start = keys.take("model.init_transformer_path")
    if start is not None:
        note_weights(keys, "model.init_transformer_path", start)
    keys.expect("extra_model.scheduler.num_train_timesteps", 1000, "1000", "a constant here")
    keys.drop("extra_model.vae", "the pipeline brings its VAE")

    sharding = keys.choice("model.fsdp.fsdp_sharding_startegy", LAUNCH_CONFIGS) or "zero3"
    offload = bool(keys.take("model.fsdp.use_cpu_offload", False))
    keys.recipe.launch_config = "zero3_offload" if offload else sharding
    keys.note(f"model.fsdp: sharding is chosen at launch: accelerate_configs/{keys.recipe.launch_config}.yaml.")
    precision = keys.require("train.precision")
    keys.note(f"train.precision: {precision}: the files of accelerate_configs/ and ds_configs/ have it, as bf16.")
    keys.drop("train.allow_tf32", "PyTorch's own setting, torch.set_float32_matmul_precision")
    keys.drop("train.sanity_check_interval", "decodes training clips to look at; --validation_videos shows samples")
    return pipeline


def _convert_training(keys: RecipeKeys, iterations_per_step: int, *, ticks_per_step: int = 1) -> None:
    """
    Optimizer, noise levels, data and checkpoints.

    Args:
        iterations_per_step (`int`): Iterations of upstream's loop that make one step here.
        ticks_per_step (`int`): How often upstream's learning rate schedule advances meanwhile.
    """
    keys.option("output_dir", _output_dir(keys), "save.output_dir, train_id")
    keys.carry("train.seed", "seed", keys.whole)
    keys.carry("dataset.batch_size", "train_batch_size", keys.whole)
    keys.carry("dataset.num_workers", "dataloader_num_workers", keys.whole)
    keys.option("context_parallel_degree", keys.whole("dataset.sp_size", 1), "dataset.sp_size")
    keys.carry("model.gradient_checkpointing", "gradient_checkpointing")
    keys.drop("model.selective_checkpointing", "all blocks are recomputed, or none")
    for key in ("dataset.crop_ratio", "dataset.crop_type"):
        keys.drop(key, "clips are cropped when they are encoded; upstream crops only without sequence parallelism")

    keys.carry("optimizer.learning_rate", "learning_rate", keys.number)
    keys.carry("optimizer.adam_beta1", "adam_beta1", keys.number)
    keys.carry("optimizer.adam_beta2", "adam_beta2", keys.number)
    keys.carry("optimizer.weight_decay", "adam_weight_decay", keys.number)
    keys.option("max_grad_norm", 1.0, "a constant of upstream's code")
    keys.carry("optimizer.lr_scheduler", "lr_scheduler")
    warmup = keys.whole("optimizer.lr_warmup_steps", 0)
    origin = "optimizer.lr_warmup_steps"
    if ticks_per_step > 1:
        origin += f": {warmup}; upstream's schedule advances {ticks_per_step} times where a step ends here"
    keys.option("lr_warmup_steps", -(-warmup // ticks_per_step), origin)
    keys.carry("optimizer.lr_num_cycles", "lr_num_cycles", keys.whole)
    keys.carry("optimizer.lr_power", "lr_power", keys.number)
    keys.require("optimizer.max_train_steps")
    iterations = keys.whole("optimizer.max_train_steps")
    origin = "optimizer.max_train_steps"
    if iterations_per_step > 1:
        origin += f": {iterations} iterations, {iterations_per_step} of them a step here"
    keys.option("max_train_steps", max(1, iterations // iterations_per_step), origin)
    interval = keys.whole("train.save_interval", 0)
    if interval > 0:
        keys.option("checkpointing_steps", -(-interval // iterations_per_step), "train.save_interval, in steps")
    else:
        keys.note(f"train.save_interval: {interval}: upstream never saves; here the end of a run always is.")

    keys.carry("extra_model.scheduler.flow_shift", "flow_shift", keys.number)
    scheme = keys.take("extra_model.scheduler.weighting_scheme", "uniform")
    law = "logit_normal" if scheme == "logit_normal" else "uniform"
    keys.option("weighting_scheme", law, f"extra_model.scheduler.weighting_scheme: {scheme}")
    mean = keys.number("extra_model.scheduler.logit_mean", 0)
    keys.option(
        "logit_mean",
        -mean if mean else 0,
        "minus extra_model.scheduler.logit_mean: upstream's law is that of 1 - sigma",
    )
    keys.carry("extra_model.scheduler.logit_std", "logit_std", keys.number)


def _output_dir(keys: RecipeKeys) -> str:
    folder, run = str(keys.require("save.output_dir")).rstrip("/"), keys.take("train_id")
    return folder if run is None else f"{folder}/{run}"


def _convert_reward(keys: RecipeKeys) -> None:
    """`train_pavrm_*.yaml`: binary cross-entropy or Bradley-Terry."""
    pipeline = _convert_model(keys)
    _convert_training(keys, iterations_per_step=1)
    keys.option("gradient_accumulation_steps", 1, "every iteration of upstream's reward training is an update")
    keys.drop("train.gradient_accumulation_steps", "upstream's reward training only prints it")
    _convert_lora(keys)
    keys.drop("model.ema", "there is no average of a reward model's weights here; the best validation is kept")
    losers = keys.values.get("dataset.meta_file_lose_list") if keys.values.get("lrm.loss") == "bt" else None
    convert_lists(keys, "dataset.meta_file_list", "train_dataset", pipeline, more=losers)
    convert_lists(keys, "dataset.val_meta_file_list", "validation_dataset", pipeline)
    keys.drop("dataset.uncond_prob", "upstream's reward training drops no prompt")

    _convert_reward_model(keys)

    loss = keys.choice("lrm.loss", {"ce": "bce", "bt": "bt"})
    keys.option("loss", loss, "lrm.loss")
    keys.carry("lrm.task", "task")
    if "lrm.timestep" in keys.values:
        keys.refuse("lrm.timestep", "left out: noise levels are drawn from a law here, not from a list")
    rate = keys.number("optimizer.learning_rate_mlp")
    if rate is not None:
        keys.option("head_learning_rate", rate, "optimizer.learning_rate_mlp")
    else:
        rate = keys.recipe.options["learning_rate"]
        keys.option("head_learning_rate", rate, "optimizer.learning_rate, for want of learning_rate_mlp; paper: 1e-5")
    if loss == "bt":
        _convert_pairs(keys)
    else:
        keys.drop("dataset.meta_file_lose_list", "read with lrm.loss: bt only")

    keys.option("validation_steps", keys.recipe.options.get("checkpointing_steps"), "train.save_interval")
    keys.carry("eval.seed", "validation_seed", keys.whole)
    keys.carry("eval.timestep", "validation_timesteps")
    keys.note("metric_for_best_model: upstream keeps no best model; here it is chosen by accuracy or pair_accuracy.")


def _convert_reward_model(keys: RecipeKeys) -> None:
    """Blocks, pooling and head of a reward model that is trained."""
    blocks = keys.require("lrm.trainable_blocks")
    if blocks != list(range(len(blocks))):
        keys.refuse("lrm.trainable_blocks", "the first blocks, [0, 1, ...]")
    features = keys.take("lrm.feature_layer", [len(blocks) - 1])
    if features not in (len(blocks) - 1, [len(blocks) - 1]):
        keys.refuse("lrm.feature_layer", f"the last of the blocks, {len(blocks) - 1}")
    keys.option("num_layers", len(blocks), "lrm.trainable_blocks, lrm.feature_layer")
    keys.option("pooling", {"q_attn": "query", "max": "max"}.get(keys.require("lrm.pool"), "mean"), "lrm.pool")
    keys.expect("lrm.query_attention.num_queries", 1, "1", "a constant here")
    keys.option("num_query_heads", keys.whole("lrm.query_attention.num_heads", 8), "lrm.query_attention.num_heads")
    residual = keys.choice("lrm.query_attention.return_type", {"query": True})
    keys.option("query_residual", bool(residual), "lrm.query_attention.return_type")
    keys.drop("lrm.mlp_dim", "the width of the transformer")
    keys.drop("lrm.query_attention.layer_norm", "upstream reads it and passes it to nothing")
    keys.drop("lrm.query_attention.product_text", "upstream's scores never get a text to multiply with")
    keys.drop("lrm.query_attention.text_dim", "belongs to product_text")
    keys.drop("lrm.query_attention.dropout", "attention weights are not dropped here")
    if convert_reward_model(keys, "resume"):
        keys.note("model.resume_*_path: upstream counts the steps in their names as done; max_train_steps does not.")


def _convert_pairs(keys: RecipeKeys) -> None:
    """Upstream compares each clip of one list with a random clip of another."""
    lists = keys.require("dataset.meta_file_lose_list")
    keys.option("allow_unpaired", True, "dataset.meta_file_lose_list: upstream compares with any clip of that list")
    task = keys.recipe.options.get("task")
    keys.note(
        f"dataset.meta_file_lose_list: {quoted(lists)}: both lists go into one dataset, where the labels for {task} "
        "tell them apart: 1 for the clips of meta_file_list, 0 for these. `hy-prfl label` adds labels."
    )


def _convert_prfl(keys: RecipeKeys) -> None:
    """`train_prfl_*.yaml`."""
    pipeline = _convert_model(keys)
    accumulation = keys.whole("train.gradient_accumulation_steps", 1)
    _convert_training(keys, iterations_per_step=accumulation, ticks_per_step=2)
    keys.option("gradient_accumulation_steps", accumulation, "train.gradient_accumulation_steps, of each kind")
    keys.note(
        "train.gradient_accumulation_steps: each of the two updates of a step gets as many clips of its own kind; "
        "upstream mixes the gradients of both."
    )
    start = keys.take("model.resume_transformer_path")
    if start is not None:
        note_weights(keys, "model.resume_transformer_path", start)
    convert_lists(keys, "dataset.meta_file_list", "train_dataset", pipeline)
    for key in ("dataset.val_meta_file_list", "dataset.meta_file_lose_list", "eval", "optimizer.learning_rate_mlp"):
        keys.drop(key, "upstream's PRFL does not read it")
    probabilities = keys.take("dataset.uncond_prob")
    keys.option(
        "prompt_dropout",
        probabilities[0] if isinstance(probabilities, list) else probabilities,
        "dataset.uncond_prob, for the prompt",
    )
    _convert_lora(keys)
    if keys.values.get("model.ema.use_ema"):
        keys.carry("model.ema.use_ema", "use_ema")
        keys.carry("model.ema.ema_decay", "ema_decay", keys.number)
    keys.drop("model.ema", "`use_ema` is false")

    if not convert_reward_model(keys, "lrm"):
        keys.note(
            "model.lrm_*_path: empty: upstream would climb the score of a head that was never trained. Give "
            "--reward_model."
        )
    keys.drop("lrm", "the reward model's own file has it")
    keys.option("update_schedule", "alternate", "upstream's order: flow matching, then the reward")
    for name, value in {
        "reward_loss": "sigmoid",
        "reward_scale": 0.1,
        "reward_target": 2.0,
        "divide_by_step_width": False,
        "num_inference_steps": 40,
        "step_range": [0, 38],
        "long_prompt_probability": 0.7,
    }.items():
        keys.option(name, value, "a constant of upstream's code")
    shift = keys.recipe.options.get("flow_shift")
    keys.option("sampler_flow_shift", shift, "extra_model.scheduler.flow_shift, which upstream's sampler has too")


def _convert_lora(keys: RecipeKeys) -> None:
    if keys.values.get("model.lora.use_lora"):
        keys.take("model.lora.use_lora")
        keys.require("model.lora.lora_rank")
        rank = keys.whole("model.lora.lora_rank")
        keys.option("lora_rank", rank, "model.lora.use_lora, model.lora.lora_rank")
        keys.option("lora_alpha", float(rank), "model.lora.lora_rank: upstream's alpha is the rank")
        layers = [_layer(keys, str(name)) for name in keys.require("model.lora.target_modules")]
        keys.option("lora_target_modules", layers, "model.lora.target_modules, in diffusers' names")
        keys.drop("model.lora.lora_alpha", "upstream's code takes the rank")
        keys.drop("model.lora.resume_lora_path", "training does not start from an adapter here")
    keys.drop("model.lora", "`use_lora` is false")


def _layer(keys: RecipeKeys, name: str) -> str:
    """A layer of the native model by diffusers' name, with or without its attention in front."""
    attention, _, layer = name.rpartition(".") if not name.startswith("ffn") else ("", "", name)
    if layer not in LAYERS or (attention and attention not in ATTENTIONS):
        keys.refuse("model.lora.target_modules", f"layers out of {', '.join(LAYERS)}, '{name}' is none")
    return f"{ATTENTIONS[attention]}.{LAYERS[layer]}" if attention else LAYERS[layer]


def _convert_score(keys: RecipeKeys) -> None:
    """`infer_pavrm_*.yaml`."""
    keys.require("task")
    pipeline = keys.choice("task", PIPELINES)
    keys.recipe.launch_config = "ddp"
    if not convert_reward_model(keys, "resume"):
        keys.note("model.resume_*_path: empty: upstream would score with a head that was never trained.")
    convert_lists(keys, "dataset.val_meta_file_list", "dataset", pipeline)
    keys.option("output", f"{_output_dir(keys)}/scores.csv", "save.output_dir, train_id")
    keys.option("batch_size", keys.whole("dataset.batch_size", 1), "dataset.batch_size")
    keys.option("dtype", keys.choice("train.precision", DTYPES), "train.precision")
    keys.carry("eval.seed", "seed", keys.whole)
    keys.option("timesteps", [201, 400, 600, 800, 1000], "upstream draws a timestep in each fifth for every clip")
    keys.drop("lrm.task", "the reward model's own file has it")
    for section in ("model", "extra_model", "lrm", "dataset", "optimizer", "train", "eval"):
        keys.drop(section, "scoring does not need it")
