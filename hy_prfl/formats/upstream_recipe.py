"""
Converts recipes of HY-Video-PRFL, nested YAML files, into options of this package.

A key that upstream's code reads is converted with its unit and meaning. A value without a counterpart here is an error
with advice. A key that upstream's code does not read is listed in a note. `docs/upstream.md` lists all keys.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ..configs.preprocess import PreprocessConfig
from ..configs.prfl import PRFLTrainingConfig
from ..configs.reward import RewardTrainingConfig
from ..configs.score import ScoreConfig
from .converted_recipe import ConvertedRecipe
from .upstream_commands import convert_lists, convert_reward_parts, mirrored
from .upstream_keys import RecipeKeys
from .upstream_models import PIPELINES, find_pipeline, named_task, read_reward_blocks
from .upstream_training import convert_prfl, convert_reward, drop_reward_model, output_dir, suggest_reward_model


CONFIGS: dict[str, type] = {
    "preprocess": PreprocessConfig,
    "train_reward": RewardTrainingConfig,
    "train_prfl": PRFLTrainingConfig,
    "score": ScoreConfig,
}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def convert_recipe(
    path: str | Path,
    command: str | None = None,
    ignore: Sequence[str] = (),
    pipeline: str | None = None,
    upstream_root: str | Path | None = None,
) -> ConvertedRecipe:
    """
    Convert one of upstream's YAML files.

    Args:
        path (`str` or `Path`):
            The file.
        command (`str`, *optional*):
            Command for the file: `preprocess`, `train_reward`, `train_prfl` or `score`. If left out, inferred from the
            file's keys. Training and evaluation of a reward model have the same keys: the command is `score` if the
            file names no clips to train on, or if its name begins with `infer`.
        ignore (`Sequence[str]`):
            Keys to ignore, as `section.key`, for example because their values are refused.
        pipeline (`str`, *optional*):
            Folder or Hub id of a pipeline in diffusers' format, to use instead of the published one.
        upstream_root (`str` or `Path`, *optional*):
            Folder in which upstream ran: relative paths in the file start there. If left out, the folder above
            `configs` if the file is in a folder of that name, else the current one.

    Returns:
        Options, commands and notes. The commands are to be run in the current folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a YAML mapping, lacks a key that upstream's code requires, or has a value without a
            counterpart here. The message names file, key and value, and says what to do.
    """
    path = Path(path)
    if upstream_root is None:
        upstream_root = path.parent.parent if path.parent.name == "configs" else "."
    keys = RecipeKeys(path, str(upstream_root), ignore)
    command = _find_command(keys) if command is None else command
    if command not in CONFIGS:
        raise ValueError(f"`command` must be one of {', '.join(CONFIGS)}, got {command!r}.")
    keys.recipe.command = command
    keys.drop_unread(command)
    convert = {
        "preprocess": _convert_preprocess,
        "train_reward": convert_reward,
        "train_prfl": convert_prfl,
        "score": _convert_score,
    }
    convert[command](keys, pipeline)
    recipe = keys.finish()
    needed = (
        {} if "reward_model" in recipe.options or not recipe.launch_options else {"reward_model": "given at launch"}
    )
    try:
        CONFIGS[command](**recipe.options, **needed)
    except ValueError as error:
        raise ValueError(f"{path}: as options of `{command}`: {error}") from error
    return recipe


def _find_command(keys: RecipeKeys) -> str:
    if "json_path" in keys.values:
        return "preprocess"
    if any(key.startswith("model.lrm_") for key in keys.values):
        return "train_prfl"
    if "lrm.loss" not in keys.values:
        raise ValueError(
            f"{keys.path}: neither `json_path` (preprocessing) nor `lrm.loss` (reward model) nor `model.lrm_*_path` "
            "(PRFL) is in the file, so it is not a recipe of HY-Video-PRFL. Otherwise give --recipe_command."
        )
    has_clips = "dataset.meta_file_list" in keys.values
    return "score" if keys.path.name.startswith("infer") or not has_clips else "train_reward"


def _convert_preprocess(keys: RecipeKeys, pipeline: str | None) -> None:
    """`pre_480.yaml`, `pre_720.yaml`."""
    paths = ("vae_path", "text_encoder_path", "tokenizer_path", "image_encoder_path", "image_processor_path")
    resolution = keys.require("resolution")
    short_side = resolution[0] if isinstance(resolution, list) and resolution else resolution
    if not isinstance(short_side, int) or short_side < 32 or short_side % 32:
        keys.refuse("resolution", "a short side, in pixels, that is a multiple of 32")
    named = [named_task(str(keys.values.get(path))) for path in paths]
    by_size = "i2v-14b-480p" if short_side <= 480 else "i2v-14b-720p"
    task = next((task for task in reversed(named) if task is not None), by_size)
    if pipeline is not None and keys.root != "." and Path(pipeline).is_dir():
        pipeline = os.path.abspath(pipeline)  # the command runs in another folder
    keys.pipeline = pipeline or PIPELINES[task]
    origin = "the given pipeline" if pipeline else "the model of the *_path keys in diffusers' format"
    keys.option("pretrained_model_name_or_path", keys.pipeline, origin)
    keys.option("manifest", keys.require("json_path"), "json_path")
    # Relative paths of videos in the manifest start in the folder where upstream ran.
    keys.recipe.folder = keys.root
    save_dir = str(keys.require("save_dir"))
    keys.option(
        "output_dir", mirrored(f"data/{task}", save_dir), f"save_dir: {save_dir}, which has upstream's own files"
    )
    keys.carry("extract_fps", "fps", keys.number)
    keys.carry("num_frames", "num_frames", keys.whole)
    keys.option("min_num_frames", 1, "upstream accepts shorter clips too")
    keys.option("resolution", short_side, "resolution, its first number; upstream ignores the others")
    keys.carry("aspect_ratio", "max_aspect_ratio", keys.number)
    keys.carry("max_sequence_length", "max_sequence_length", keys.whole)
    keys.require("precision")
    dtype = keys.choice("precision", {"bf16": "bfloat16", "fp16": "bfloat16", "fp32": "float32"})
    origin = f"precision: {keys.values['precision']}, for the text encoder; VAE and image encoder run in float32 here"
    keys.option("text_encoder_dtype", dtype, origin)
    keys.expect("start_idx", 0, "0: clips begin at the first frame here; cut the videos before", "as here")
    for path in paths:
        keys.drop(path, "the pipeline brings its encoders")
    keys.expect("model_type", "wanx", "wanx, the encoders of Wan", "known from the pipeline")
    keys.drop("seed", "nothing is random here")
    keys.note("tensors are stored in float16; upstream's .npy files are float32: --tensor_dtype float32.")
    keys.note(
        "the training recipes import what upstream's preprocessing wrote; to train on this dataset, use --train_dataset."
    )


def _convert_score(keys: RecipeKeys, pipeline: str | None) -> None:
    """`infer_pavrm_*.yaml`."""
    find_pipeline(keys, pipeline)
    # Scores come from a dataset that is already encoded.
    del keys.recipe.options["pretrained_model_name_or_path"]
    origin = keys.recipe.origins.pop("pretrained_model_name_or_path")
    keys.note(f"pretrained_model_name_or_path: {keys.pipeline}, {origin}: for the import only.")
    keys.recipe.launch_config = "ddp"
    read_reward_blocks(keys)
    if keys.flag("model.lora.use_lora"):
        keys.refuse("model.lora.use_lora", "false: merge the LoRA into the reward model's transformer first")
    if not convert_reward_parts(keys, "resume"):
        suggest_reward_model(keys, f"outputs/{keys.take('train_id', 'pavrm')}", "resume")
    if keys.take("model.init_transformer_path") is not None:
        keys.note("model.init_transformer_path: not needed, because the reward model has its own transformer.")
    convert_lists(keys, "dataset.val_meta_file_list", "dataset")
    keys.option("output", f"{output_dir(keys)}/scores.csv", "save.output_dir, train_id")
    keys.carry("dataset.batch_size", "batch_size", keys.whole)
    keys.require("train.precision")
    keys.option("dtype", keys.choice("train.precision", DTYPES), "train.precision")
    keys.carry("eval.seed", "seed", keys.whole)
    keys.option("timesteps", [201, 400, 600, 800, 1000], "upstream draws a timestep in each fifth for every clip")
    drop_reward_model(keys)
    keys.drop("dataset.sp_size", "the clips are divided among the processes, and each scores whole clips")
    keys.drop("model.fsdp", "each process has the whole reward model")
    for section in ("model", "extra_model", "dataset", "train"):
        keys.drop(section, "scoring does not need it")
