"""Converts recipes of HY-Video-PRFL's two trainings into options of `train_reward` and `train_prfl`."""

from typing import get_args

from ..configs.base import LRScheduler
from .upstream_commands import LABELS, convert_lists, convert_pairs, convert_reward_parts, note_null_prompt, start_from
from .upstream_keys import RecipeKeys
from .upstream_models import checkpointed_blocks, find_pipeline, num_blocks, read_layer, read_ratio, read_reward_blocks


# Upstream's `fsdp_sharding_startegy` -> file in accelerate_configs/, and what it shards.
SHARDING = {
    "full": ("zero3", "weights, gradients and optimizer states are sharded"),
    "shard_grad_op": ("zero2", "gradients and optimizer states are sharded, weights are whole"),
    "hybrid_full": (
        "multi_node_zero3_hpz",
        "ZeRO-3 with zero_hpz_partition_size 8: each machine has all weights, sharded over its GPUs; gradients and "
        "optimizer states are sharded over all machines, while upstream shards them within each machine",
    ),
    "hybrid_zero2": (
        "multi_node_zero3_hpz",
        "ZeRO-3 with zero_hpz_partition_size 8, which needs ZeRO-3: each machine has all weights, sharded over its GPUs; "
        "upstream keeps them whole between forward and backward pass",
    ),
    "none": ("ddp", "a whole copy on each GPU"),
}
RUNS_ON = "upstream counts the step in that file's name towards max_train_steps; here a run starts at step 0"


def convert_reward(keys: RecipeKeys, pipeline: str | None) -> None:
    """`train_pavrm_*.yaml`: binary cross-entropy or Bradley-Terry."""
    find_pipeline(keys, pipeline)
    _convert_launch(keys)
    _convert_run(keys, iterations_per_step=1)
    keys.option("gradient_accumulation_steps", 1, "every iteration of upstream's reward training is an update")
    keys.drop("train.gradient_accumulation_steps", "upstream's reward training only prints it")
    keys.carry("lrm.task", "task", lambda key: keys.choice(key, {name: name for name in LABELS}))
    loss = keys.choice("lrm.loss", {"ce": "bce", "bt": "bt"})
    keys.option("loss", loss, "lrm.loss")
    if loss == "bt":
        convert_pairs(keys)
    else:
        convert_lists(keys, "dataset.meta_file_list", "train_dataset")
        keys.drop("dataset.meta_file_lose_list", "read with lrm.loss: bt only")
    if keys.take("dataset.val_meta_file_list"):
        convert_lists(keys, "dataset.val_meta_file_list", "validation_dataset")
    keys.note(
        "labels: upstream reads a label that a meta file does not have as 0; here it is missing, and such clips are left "
        "out. `hy-prfl label` adds labels to a dataset."
    )
    keys.drop("dataset.uncond_prob", "upstream's reward training drops no prompt")
    _convert_lora(keys)
    _convert_average(keys)

    blocks = read_reward_blocks(keys)
    keys.option("num_layers", blocks, "lrm.trainable_blocks, lrm.feature_layer")
    _convert_checkpointing(keys, {"gradient_checkpointing_blocks": blocks})
    pool = str(keys.require("lrm.pool"))
    keys.option("pooling", {"q_attn": "query", "max": "max"}.get(pool, "mean"), f"lrm.pool: {pool}")
    keys.option("num_query_heads", keys.whole("lrm.query_attention.num_heads", 8), "lrm.query_attention.num_heads")
    residual = keys.take("lrm.query_attention.return_type") == "query"
    keys.option("query_residual", residual, "lrm.query_attention.return_type")
    keys.expect("lrm.query_attention.dropout", 0, "0: attention weights are not dropped here", "as here")
    note_reward_keys(keys)
    if convert_reward_parts(keys, "resume"):
        keys.note(f"model.resume_*_path: {RUNS_ON}.")
        if "lora_path" in keys.recipe.options:
            keys.refuse(
                "model.lora.resume_lora_path",
                "empty if model.resume_*_path is given: here training can continue a LoRA only on the published transformer. "
                "Merge it with `hy-prfl convert --transformer ... --merge_lora ... --output_format native` into the file of "
                "model.resume_transformer_path",
            )
    if "lrm.timestep" in keys.values:
        keys.refuse(
            "lrm.timestep",
            "left out: here noise levels are drawn from the distribution that flow_shift and weighting_scheme define",
        )
    if "optimizer.learning_rate_mlp" in keys.values:
        keys.carry("optimizer.learning_rate_mlp", "head_learning_rate", keys.number)
    else:
        rate = keys.recipe.options["learning_rate"]
        keys.option(
            "head_learning_rate", rate, "optimizer.learning_rate, because there is no learning_rate_mlp; paper: 1e-5"
        )
    keys.option("validation_steps", keys.recipe.options.get("checkpointing_steps"), "train.save_interval")
    keys.carry("eval.seed", "validation_seed", keys.whole)
    levels = keys.take("eval.timestep", [201, 400, 600, 800, 1000])
    if not isinstance(levels, list) or not all(isinstance(level, int) for level in levels):
        keys.refuse("eval.timestep", "whole numbers in (0, 1000]")
    keys.option("validation_timesteps", levels, "eval.timestep, or upstream's default")
    keys.note("metric_for_best_model: upstream keeps no best model; here accuracy or pair_accuracy selects it.")
    if keys.take("model.init_transformer_path") is not None:
        start_from(keys, "model.init_transformer_path", keys.values["model.init_transformer_path"])


def convert_prfl(keys: RecipeKeys, pipeline: str | None) -> None:
    """`train_prfl_*.yaml`."""
    find_pipeline(keys, pipeline)
    _convert_launch(keys)
    accumulation = keys.whole("train.gradient_accumulation_steps", 1)
    if accumulation < 1:
        keys.refuse("train.gradient_accumulation_steps", "at least 1")
    _convert_run(keys, iterations_per_step=accumulation, ticks_per_step=2)
    keys.option("gradient_accumulation_steps", accumulation, "train.gradient_accumulation_steps, of each kind")
    keys.note(
        "train.gradient_accumulation_steps: each of the two updates of a step accumulates this many batches of its own; "
        "upstream mixes the gradients of both."
    )
    blocks = {
        "gradient_checkpointing_blocks": num_blocks(keys),
        "reward_gradient_checkpointing_blocks": read_reward_blocks(keys),
    }
    _convert_checkpointing(keys, blocks)
    convert_lists(keys, "dataset.meta_file_list", "train_dataset")
    probabilities = keys.require("dataset.uncond_prob")
    dropout = probabilities[0] if isinstance(probabilities, list) and probabilities else probabilities
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        keys.refuse("dataset.uncond_prob", "shares of prompts and images, such as [0.1, 0.0]")
    keys.option(
        "prompt_dropout", dropout, "dataset.uncond_prob, for the prompt; upstream does not use the one for the image"
    )
    if dropout > 0:
        note_null_prompt(keys)
    _convert_lora(keys)
    _convert_average(keys)

    if not convert_reward_parts(keys, "lrm"):
        folder, _, run = keys.recipe.options["output_dir"].rpartition("/")
        suggest_reward_model(
            keys, f"{folder}/{run.replace('prfl', 'pavrm')}" if "prfl" in run else f"{folder}/pavrm", "lrm"
        )
    drop_reward_model(keys)
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
    shift = keys.recipe.options["flow_shift"]
    keys.option("sampler_flow_shift", shift, "extra_model.scheduler.flow_shift, which upstream's sampler has too")
    for key in ("model.resume_transformer_path", "model.init_transformer_path"):
        path = keys.take(key)
        if path is None:
            continue
        if "transformer_path" not in keys.recipe.options:
            start_from(keys, key, path)
        else:
            keys.note(f"{key}: {path}: upstream does not read it beside model.resume_transformer_path.")
        if key == "model.resume_transformer_path":
            keys.note(f"{key}: {RUNS_ON}.")


def note_reward_keys(keys: RecipeKeys) -> None:
    """Note keys of the reward model that have no effect."""
    keys.drop("lrm.mlp_dim", "the width of the transformer")
    keys.drop("lrm.query_attention.layer_norm", "upstream reads it but does not use it")
    keys.drop("lrm.query_attention.product_text", "upstream never passes a text to multiply with")
    keys.drop("lrm.query_attention.text_dim", "belongs to product_text")


def drop_reward_model(keys: RecipeKeys) -> None:
    """Note the keys that describe a trained reward model. Keys that need a certain value were checked before."""
    note_reward_keys(keys)
    keys.left |= {key for key in ("lrm.trainable_blocks", "lrm.feature_layer") if key in keys.values}
    keys.drop("lrm", "stored in the reward model's own files")


def suggest_reward_model(keys: RecipeKeys, run: str, prefix: str) -> None:
    """Use the reward model that the converted training recipe would write, for files that name none."""
    keys.recipe.launch_options = f" --reward_model {run}/best"
    keys.note(
        f"model.{prefix}_*_path: empty; upstream would continue with a head that was never trained. The command uses "
        f"{run}/best, which the training of a reward model writes; --reward_model names another."
    )


def _convert_launch(keys: RecipeKeys) -> None:
    """Sharding, precision and other settings of the launch."""
    strategy = keys.take("model.fsdp.fsdp_sharding_startegy", "full")
    if strategy not in SHARDING:
        keys.refuse("model.fsdp.fsdp_sharding_startegy", f"one of {', '.join(SHARDING)}")
    launch_config, meaning = SHARDING[strategy]
    if keys.flag("model.fsdp.use_cpu_offload"):
        launch_config, meaning = "zero3_offload", "with use_cpu_offload: everything is sharded, and kept in CPU memory"
    keys.recipe.launch_config = launch_config
    keys.note(
        f"model.fsdp.fsdp_sharding_startegy: {strategy}: chosen at launch, accelerate_configs/{launch_config}.yaml: {meaning}."
    )
    if launch_config.startswith("multi_node"):
        keys.note(
            "model.fsdp.fsdp_sharding_startegy: start the command on each machine, with its --machine_rank and the first "
            "one's --main_process_ip. On one machine hybrid_full is zero3.yaml, and hybrid_zero2 is zero2.yaml."
        )
    if keys.values.get("train.precision", "bf16") != "bf16":
        keys.refuse(
            "train.precision",
            "bf16, as in the files of accelerate_configs/ and ds_configs/. Training in float16 is not supported; for float32, "
            "name the key in --ignore_keys and launch with ddp.yaml and --mixed_precision no",
        )
    keys.drop("train.precision", "chosen at launch, in accelerate_configs/ and ds_configs/")
    if keys.flag("train.allow_tf32"):
        keys.carry("train.allow_tf32", "allow_tf32")
    keys.drop(
        "train.sanity_check_interval",
        "upstream decodes training clips for inspection; --validation_videos shows samples",
    )
    keys.drop("extra_model.vae.name", "the pipeline brings its VAE")
    keys.expect("extra_model.scheduler.num_train_timesteps", 1000, "1000", "a constant here")
    keys.expect("model.patch_size", [1, 2, 2], "[1, 2, 2], as in all Wan models", "stored in the model's own files")


def _convert_run(keys: RecipeKeys, iterations_per_step: int, *, ticks_per_step: int = 1) -> None:
    """
    Optimizer, noise levels, data and checkpoints.

    Args:
        iterations_per_step (`int`): Iterations of upstream's loop for one step here.
        ticks_per_step (`int`): How often upstream's learning rate schedule advances in one step here.
    """
    keys.option("output_dir", output_dir(keys), "save.output_dir, train_id")
    keys.carry("train.seed", "seed", keys.whole)
    keys.carry("dataset.batch_size", "train_batch_size", keys.whole)
    keys.carry("dataset.num_workers", "dataloader_num_workers", keys.whole)
    degree = keys.whole("dataset.sp_size", 1)
    keys.option("context_parallel_degree", degree, "dataset.sp_size")
    if degree <= 1 and keys.take("dataset.crop_ratio", [1, 1, 1]) != [1, 1, 1]:
        keys.refuse("dataset.crop_ratio", "[1, 1, 1]: clips are cropped once, when `preprocess` encodes them")
    for key in ("dataset.crop_ratio", "dataset.crop_type"):
        keys.drop(key, "has no effect: upstream crops only without sequence parallelism and with another crop_ratio")

    keys.carry("optimizer.learning_rate", "learning_rate", keys.number)
    keys.carry("optimizer.adam_beta1", "adam_beta1", keys.number)
    keys.carry("optimizer.adam_beta2", "adam_beta2", keys.number)
    keys.carry("optimizer.weight_decay", "adam_weight_decay", keys.number)
    keys.option("max_grad_norm", 1.0, "a constant of upstream's code")
    keys.require("optimizer.max_train_steps")
    iterations = keys.whole("optimizer.max_train_steps")
    origin = "optimizer.max_train_steps"
    if iterations_per_step > 1:
        origin += f": {iterations} iterations, {iterations_per_step} of them are one step here"
    keys.option("max_train_steps", max(1, iterations // iterations_per_step), origin)
    _convert_schedule(keys, iterations_per_step, ticks_per_step)
    interval = keys.whole("train.save_interval", 0)
    if interval > 0:
        keys.option("checkpointing_steps", -(-interval // iterations_per_step), "train.save_interval, in steps")
    else:
        keys.note(f"train.save_interval: {interval}: upstream never saves; here the end of a run is always saved.")

    keys.carry("extra_model.scheduler.flow_shift", "flow_shift", keys.number)
    scheme = keys.require("extra_model.scheduler.weighting_scheme")
    distribution = "logit_normal" if scheme == "logit_normal" else "uniform"
    keys.option("weighting_scheme", distribution, f"extra_model.scheduler.weighting_scheme: {scheme}")
    mean = keys.number("extra_model.scheduler.logit_mean", 0)
    origin = "minus extra_model.scheduler.logit_mean: upstream draws 1 - sigma"
    keys.option("logit_mean", -mean if mean else 0, origin)
    keys.carry("extra_model.scheduler.logit_std", "logit_std", keys.number)


def _convert_schedule(keys: RecipeKeys, iterations_per_step: int, ticks_per_step: int) -> None:
    """Warm-up and decay of the learning rate. Upstream's schedule counts updates, but its length is in iterations."""
    names = {name: name for name in get_args(LRScheduler)}
    keys.require("optimizer.lr_scheduler")
    schedule = keys.choice("optimizer.lr_scheduler", names)
    keys.option("lr_scheduler", schedule, "optimizer.lr_scheduler")
    keys.require("optimizer.lr_warmup_steps")
    warmup = keys.whole("optimizer.lr_warmup_steps")
    origin = "optimizer.lr_warmup_steps"
    if ticks_per_step > 1:
        origin += f": {warmup}; upstream's schedule advances {ticks_per_step} times where a step ends here"
    keys.option("lr_warmup_steps", -(-warmup // ticks_per_step), origin)
    keys.carry("optimizer.lr_num_cycles", "lr_num_cycles", keys.whole)
    keys.carry("optimizer.lr_power", "lr_power", keys.number)
    if not schedule.startswith("constant") and iterations_per_step != ticks_per_step:
        keys.note(
            f"optimizer.lr_scheduler: {schedule}: here it ends at max_train_steps. Upstream's has a length of "
            f"max_train_steps but advances {ticks_per_step} times in {iterations_per_step} iterations."
        )


def _convert_checkpointing(keys: RecipeKeys, blocks: dict[str, int]) -> None:
    """
    Activation checkpointing of as many blocks as in upstream's recipe.

    Args:
        blocks (`dict[str, int]`): Option for the number of checkpointed blocks -> number of blocks of that model.
    """
    ratio = read_ratio(keys, "model.selective_checkpointing")
    counts = {name: checkpointed_blocks(total, ratio) for name, total in blocks.items()}
    active = keys.flag("model.gradient_checkpointing") and any(counts.values())
    keys.option("gradient_checkpointing", active, "model.gradient_checkpointing")
    share = f"model.selective_checkpointing: {keys.values.get('model.selective_checkpointing', 1.0)}"
    if not active:
        keys.note(f"{share}: no block uses activation checkpointing.")
        return
    if counts == blocks:
        keys.note(f"{share}: all blocks use activation checkpointing, the default of gradient_checkpointing.")
        return
    for name, total in blocks.items():
        origin = f"{share} of {total} blocks; here the first ones, upstream spreads them over the depth"
        if counts[name] == 0:
            origin = f"{share} of {total} blocks would be none; 1 is the minimum"
        if counts[name] < total:
            keys.option(name, max(1, counts[name]), origin)


def _convert_lora(keys: RecipeKeys) -> None:
    if keys.flag("model.lora.use_lora"):
        keys.require("model.lora.lora_rank")
        rank = keys.whole("model.lora.lora_rank")
        keys.option("lora_rank", rank, "model.lora.use_lora, model.lora.lora_rank")
        keys.option("lora_alpha", float(rank), "model.lora.lora_rank: upstream's alpha is the rank")
        layers = [read_layer(keys, str(name)) for name in keys.require("model.lora.target_modules")]
        keys.option("lora_target_modules", layers, "model.lora.target_modules, in diffusers' names")
        path = keys.take("model.lora.resume_lora_path")
        if path is not None:
            keys.option("lora_path", keys.locate(path), "model.lora.resume_lora_path")
            keys.option("lora_start", "continue", "upstream continues to train that LoRA")
            keys.note(f"model.lora.resume_lora_path: {RUNS_ON}.")
    keys.drop("model.lora", "`use_lora` is false")


def _convert_average(keys: RecipeKeys) -> None:
    if keys.flag("model.ema.use_ema"):
        keys.carry("model.ema.use_ema", "use_ema")
        keys.carry("model.ema.ema_decay", "ema_decay", keys.number)
    keys.drop("model.ema", "`use_ema` is false")


def output_dir(keys: RecipeKeys) -> str:
    """Folder of the run, below upstream's `save.output_dir`."""
    folder, run = str(keys.require("save.output_dir")).rstrip("/"), keys.take("train_id")
    return folder if run is None else f"{folder}/{run}"
