"""Recipes with the sections and keys of HY-Video-PRFL's twelve files become options of our commands."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from hy_prfl.configs.convert import ConvertConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.preprocess import PreprocessConfig
from hy_prfl.configs.recipe import RecipeConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.flow_matching import make_generator, noise_levels
from hy_prfl.formats.upstream_keys import ALL_KEYS, DEAD_KEYS, READ_KEYS, flatten
from hy_prfl.formats.upstream_recipe import convert_recipe
from tests.formats.upstream_recipes import (
    RECIPES,
    TRAININGS,
    Convert,
    commands,
    options_of,
    reward_parts,
    upstream_recipe,
)


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_carried_over_or_noted(name: str, convert: Convert) -> None:
    converted, config = convert(name)
    expected = {"pre": "preprocess", "train_pavrm": "train_reward", "train_prfl": "train_prfl", "infer_pavrm": "score"}
    assert converted.command == next(command for prefix, command in expected.items() if name.startswith(prefix))
    for option, value in converted.options.items():
        # `train_reward` keeps a single dataset as a list of one.
        is_dataset = converted.command == "train_reward" and option in ("train_dataset", "validation_dataset")
        assert getattr(config, option) == ([value] if is_dataset else value), option
    told = " ".join([*converted.origins.values(), *converted.notes])
    # A null and a false say nothing.
    given = [key for key, value in flatten(upstream_recipe(name)).items() if value not in (None, False)]
    assert [key for key in given if key not in told] == []


@pytest.mark.parametrize("name", RECIPES)
def test_keys_of_the_files_are_known(name: str) -> None:
    command = "preprocess" if "pre_" in name else "train_prfl" if "prfl" in name else "train_reward"
    keys = set(flatten(upstream_recipe(name)))
    assert keys <= ALL_KEYS
    # What is read for some kind is in the file of that kind, unless the code can do without it.
    optional = {f"lrm.query_attention.{key}" for key in ("layer_norm", "product_text", "text_dim")}
    optional |= {"lrm.timestep", "dataset.meta_file_lose_list", "optimizer.learning_rate_mlp"}
    optional |= {"model.resume_query_attention_path"}
    if not name.startswith("infer"):
        assert READ_KEYS[command] - keys <= optional


@pytest.mark.parametrize("name", TRAININGS)
def test_the_head_has_commands_that_parse(name: str, convert: Convert) -> None:
    converted, _ = convert(name)
    head = converted.to_yaml("new.yaml").splitlines()
    shown = [line.removeprefix("#   ") for line in head if line.startswith("#   ")]
    assert shown == [*converted.commands("new.yaml"), converted.plan("new.yaml")]
    launch = shlex.split(converted.commands("new.yaml")[-1])
    assert launch[:3] == ["accelerate", "launch", "--config_file"]
    assert (ROOT / launch[3]).is_file()
    assert launch[4:8] == ["-m", f"hy_prfl.scripts.{converted.command}", "--config", "new.yaml"]
    assert "docs/upstream.md" in head[-1]


def test_reward_training(convert: Convert) -> None:
    converted, config = convert("train_pavrm_i2v_720")
    assert config.pretrained_model_name_or_path == "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
    assert (config.loss, config.task, config.pooling) == ("bce", "motion_quality", "query")
    assert (config.num_layers, config.num_query_heads, config.query_residual) == (8, 8, True)
    # Only the Bradley-Terry file gives the head a rate of its own, and no file's accumulation does anything.
    assert (config.learning_rate, config.head_learning_rate, config.adam_weight_decay) == (1e-6, 1e-6, 0.02)
    assert (config.gradient_accumulation_steps, config.max_train_steps, config.lr_warmup_steps) == (1, 4000, 25)
    assert (config.checkpointing_steps, config.validation_steps) == (100, 100)
    assert (config.flow_shift, config.weighting_scheme) == (5.0, "uniform")
    assert (config.context_parallel_degree, config.train_batch_size, config.dataloader_num_workers) == (4, 1, 2)
    assert (config.seed, config.validation_seed) == (42, 1024)
    assert config.output_dir == "outputs/pavrm_i2v_720"
    (command,) = converted.first
    imported = parse_config(PreprocessConfig, options_of(command))
    assert imported.upstream_meta == "lists/clips_720.list"
    assert imported.pretrained_model_name_or_path == config.pretrained_model_name_or_path
    assert [imported.output_dir] == config.train_dataset == config.validation_dataset
    assert "label" in " ".join(converted.notes)


@pytest.mark.parametrize("levels", [..., [201, 400, 600, 800, 1000]])
def test_noise_levels_of_the_evaluation_are_upstreams(levels: Any, convert: Convert) -> None:
    assert convert("train_pavrm_t2v_480", {"eval.timestep": levels})[1].validation_timesteps == [
        *(201, 400, 600, 800, 1000)
    ]
    assert convert("train_pavrm_t2v_480", {"eval.timestep": [100, 900]})[1].validation_timesteps == [100, 900]


@pytest.mark.parametrize(
    ("strategy", "offload", "launch_config", "note"),
    [
        ("full", False, "zero3", "weights, gradients and optimizer states"),
        ("shard_grad_op", False, "zero2", "weights are whole"),
        ("hybrid_full", False, "multi_node_zero3_hpz", "zero_hpz_partition_size"),
        ("hybrid_zero2", False, "multi_node_zero3_hpz", "zero_hpz_partition_size"),
        ("none", False, "ddp", "a whole copy"),
        (None, False, "zero3", "weights, gradients and optimizer states"),
        ("full", True, "zero3_offload", "CPU memory"),
        ("hybrid_full", True, "zero3_offload", "CPU memory"),
    ],
)
def test_sharding(strategy: str | None, offload: bool, launch_config: str, note: str, convert: Convert) -> None:
    changes = {"model.fsdp.fsdp_sharding_startegy": strategy, "model.fsdp.use_cpu_offload": offload}
    for name in ("train_pavrm_t2v_480", "train_prfl_i2v_720"):
        converted, _ = convert(name, changes)
        assert converted.launch_config == launch_config
        (told,) = [
            each
            for each in converted.notes
            if each.startswith("model.fsdp.fsdp_sharding_startegy") and "chosen" in each
        ]
        assert f"accelerate_configs/{launch_config}.yaml" in told
        assert note in told
        assert any("--machine_rank" in each for each in converted.notes) == launch_config.startswith("multi_node")


def test_prfl_counts_iterations_in_steps(convert: Convert) -> None:
    converted, config = convert("train_prfl_i2v_720", reward_parts("lrm"))
    # 4000 iterations of 1 clip, 5 of them an update of each kind; the schedule ticks twice meanwhile.
    assert (config.gradient_accumulation_steps, config.max_train_steps) == (5, 800)
    assert (config.checkpointing_steps, config.lr_warmup_steps) == (20, 13)
    assert config.learning_rate == 5e-6
    assert (config.update_schedule, config.reward_loss) == ("alternate", "sigmoid")
    assert (config.reward_scale, config.reward_target, config.divide_by_step_width) == (0.1, 2.0, False)
    assert (config.num_inference_steps, config.step_range) == (40, [0, 38])
    assert (config.flow_shift, config.sampler_flow_shift) == (5.0, 5.0)
    assert (config.prompt_dropout, config.lora_rank, config.use_ema) == (0.1, None, False)
    (command,) = commands(converted, "hy-prfl convert")
    parts = parse_config(ConvertConfig, options_of(command))
    assert (parts.reward_transformer, parts.mlp) == ("run/checkpoint-100", "run/mlp_100.ckpt")
    assert (parts.query_attention, parts.output_dir) == ("run/query_100.ckpt", config.reward_model)
    assert (parts.num_query_heads, parts.query_residual, parts.task) == (8, True, "motion_quality")


def test_lora_and_average(convert: Convert) -> None:
    modules = ["q", "self_attn.k", "cross_attn.v_img", "o", "ffn.0", "ffn.2"]
    lora = {"model.lora.use_lora": True, "model.lora.target_modules": modules}
    _, config = convert("train_prfl_t2v_480", lora | {"model.ema.use_ema": True})
    assert (config.lora_rank, config.lora_alpha) == (64, 64.0)
    expected = ["to_q", "attn1.to_k", "attn2.add_v_proj", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    assert config.lora_target_modules == expected
    assert (config.use_ema, config.ema_decay) == (True, 0.995)
    _, config = convert("train_pavrm_t2v_480", lora | {"model.ema.use_ema": True})
    assert (config.lora_rank, config.use_ema, config.ema_decay) == (64, True, 0.995)
    # Without `use_lora` upstream does not look at the path.
    convert("train_prfl_t2v_480", {"model.lora.resume_lora_path": "run/checkpoint-1"})


def test_tf32(convert: Convert) -> None:
    for name in ("train_prfl_t2v_480", "train_pavrm_t2v_480"):
        assert convert(name)[1].allow_tf32 is None
        assert convert(name, {"train.allow_tf32": True})[1].allow_tf32 is True


def test_scoring(convert: Convert) -> None:
    converted, config = convert("infer_pavrm_i2v_720", reward_parts("resume"))
    imported = parse_config(PreprocessConfig, options_of(commands(converted, "hy-prfl preprocess")[0]))
    assert (config.dataset, config.manifest) == (imported.output_dir, None)
    assert config.reward_model == "converted/infer_pavrm_i2v_720/reward_model"
    assert config.output == "outputs/pavrm_i2v_720/scores.csv"
    assert (config.seed, config.dtype, config.batch_size) == (1024, "bfloat16", 1)
    # A recipe of training scores as well, if that is asked for.
    assert convert("train_pavrm_i2v_720", command="score")[0].command == "score"


@pytest.mark.parametrize(("name", "side"), [("pre_480", 480), ("pre_720", 704)])
def test_preprocessing(name: str, side: int, convert: Convert) -> None:
    converted, config = convert(name)
    size = name[-3:]
    assert config.pretrained_model_name_or_path == f"Wan-AI/Wan2.1-I2V-14B-{size}P-Diffusers"
    assert config.manifest == "lists/input.json"
    # Not upstream's own folder, which holds its files.
    assert config.output_dir == f"data/i2v-14b-{size}p/clips/{size}"
    assert (config.fps, config.num_frames, config.min_num_frames) == (16, 81, 1)
    assert (config.resolution, config.max_aspect_ratio, config.buckets) == (side, 1.75, [])
    assert (config.text_encoder_dtype, config.max_sequence_length) == ("bfloat16", 512)
    assert converted.commands("new.yaml") == ["hy-prfl preprocess --config new.yaml"]


def test_logit_normal_distribution_is_upstreams(convert: Convert) -> None:
    """Upstream draws an index into sigmas that fall from 1 to 0; here it is the distribution of sigma itself."""
    scheduler = "extra_model.scheduler"
    _, config = convert(
        "train_prfl_t2v_720", {f"{scheduler}.weighting_scheme": "logit_normal", f"{scheduler}.logit_mean": 1.5}
    )
    generators = [make_generator(0, index) for index in range(4000)]
    ours = noise_levels(config).sample(generators)
    torch.manual_seed(0)
    index = (torch.normal(1.5, 1.0, (4000,)).sigmoid() * 1000).long()
    schedule = torch.linspace(1, 0, 1001)
    upstream = (5 * schedule / (1 + 4 * schedule))[index]
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    assert torch.allclose(ours.quantile(levels), upstream.quantile(levels), atol=0.03)


@pytest.mark.parametrize("name", RECIPES)
def test_what_upstream_ignores_is_a_note(name: str, convert: Convert) -> None:
    """Keys of upstream's other files, and of none, with any value."""
    command = {"pre": "preprocess", "infer": "score"}.get(name.split("_")[0]) or (
        "train_prfl" if "prfl" in name else "train_reward"
    )
    present = flatten(upstream_recipe(name))
    telling = {"json_path", "lrm.loss", *(key for key in ALL_KEYS if key.startswith("model.lrm_"))}
    ignored = sorted((ALL_KEYS | DEAD_KEYS.keys()) - READ_KEYS[command] - set(present) - telling)
    parents = {key.rpartition(".")[0] for key in ALL_KEYS}
    extra = {key: "any\nthing" for key in ignored if key not in parents} | {"magic.word": 2, "train_speed": [1]}
    if command == "preprocess":
        extra = {key: value for key, value in extra.items() if key.split(".")[0] not in present}
    converted, _ = convert(name, extra, command=command)
    told = " ".join(converted.notes)
    assert all(key in told for key in extra)
    assert "\n" not in "".join(converted.notes)


def test_misspelt_keys_are_pointed_at(convert: Convert) -> None:
    with pytest.raises(
        ValueError, match=r"`optimizer\.lr_warmup_steps` is missing; .* calls `optimizer\.lr_warmup_step`"
    ):
        convert("train_prfl_t2v_480", {"optimizer.lr_warmup_steps": ..., "optimizer.lr_warmup_step": 5})
    converted, _ = convert("train_pavrm_t2v_480", {"optimizer.learning_rate_mpl": 1e-5})
    assert any("did you mean `optimizer.learning_rate_mlp`?" in note for note in converted.notes)


@pytest.mark.parametrize("name", RECIPES)
def test_keys_that_upstream_needs_are_asked_for(name: str, convert: Convert) -> None:
    """Without any one key a recipe is converted, with a value that the code brings, or refused by that key's name."""
    for key in flatten(upstream_recipe(name)):
        try:
            convert(name, {key: ...})
        except ValueError as error:
            named = key in str(error) or (key, "is not a recipe of HY-Video-PRFL" in str(error)) == ("lrm.loss", True)
            assert named or key == "json_path", key


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("train_pavrm_t2v_480", "task", "i2v-1.3b", "`task` must be a published image-to-video model, .*got 'i2v-1.3b'"),
        ("train_pavrm_t2v_480", "task", "v2v", "`task` must be one of t2v-1.3b, .*got 'v2v'"),
        ("train_pavrm_t2v_480", "lrm.trainable_blocks", [4, 5], "`lrm.trainable_blocks` must be the first blocks"),
        ("train_pavrm_t2v_480", "lrm.query_attention.num_queries", 4, "num_queries` must be 1: .*got 4"),
        ("train_prfl_t2v_480", "lrm.query_attention.num_queries", 4, "num_queries` must be 1: .*got 4"),
        ("infer_pavrm_i2v_720", "lrm.query_attention.num_queries", 4, "num_queries` must be 1: .*got 4"),
        ("train_pavrm_t2v_480", "lrm.query_attention.dropout", 0.1, "dropout` must be 0: .*got 0.1"),
        ("train_pavrm_t2v_480", "lrm.timestep", [400], "`lrm.timestep` must be left out"),
        ("train_pavrm_t2v_480", "lrm.loss", "mse", "`lrm.loss` must be one of ce, bt, got 'mse'"),
        ("train_pavrm_t2v_480", "lrm.task", "beauty", "`lrm.task` must be one of text_alignment, .*got 'beauty'"),
        ("train_pavrm_t2v_480", "model.ema.use_ema", 1, "`model.ema.use_ema` must be true or false"),
        ("train_pavrm_t2v_480", "model.lora.use_lora", "yes please", "`model.lora.use_lora` must be true or false"),
        ("infer_pavrm_i2v_720", "model.lora.use_lora", True, "`model.lora.use_lora` must be false: merge"),
        ("train_pavrm_t2v_480", "model.patch_size", [1, 1, 1], r"`model.patch_size` must be \[1, 2, 2\]"),
        ("train_pavrm_t2v_480", "model.selective_checkpointing", "most", "must be a number such as 0.5"),
        ("train_pavrm_t2v_480", "model.fsdp.fsdp_sharding_startegy", "zero", "must be one of full, shard_grad_op, "),
        ("train_pavrm_t2v_480", "train.precision", "fp16", "`train.precision` must be bf16, .*got 'fp16'"),
        ("train_prfl_t2v_480", "train.precision", "fp32", "`train.precision` must be bf16, .*--mixed_precision no"),
        ("train_prfl_t2v_480", "optimizer.lr_scheduler", "piecewise_constant", "lr_scheduler` must be one of linear"),
        ("train_prfl_t2v_480", "extra_model.scheduler.num_train_timesteps", 500, "num_train_timesteps` must be 1000"),
        ("train_prfl_t2v_480", "train.gradient_accumulation_steps", 2.5, "must be a whole number, got 2.5"),
        ("train_prfl_t2v_480", "train.gradient_accumulation_steps", 0, "must be at least 1, got 0"),
        ("train_prfl_t2v_480", "optimizer.learning_rate", "fast", "`optimizer.learning_rate` must be a number"),
        ("train_prfl_t2v_480", "optimizer.learning_rate", 0, "as options of `train_prfl`: `learning_rate` must be"),
        ("train_prfl_t2v_480", "optimizer.max_train_steps", None, "`optimizer.max_train_steps` is missing"),
        ("train_prfl_t2v_480", "dataset.uncond_prob", ["a", 0], "`dataset.uncond_prob` must be shares"),
        ("train_prfl_t2v_480", "dataset.meta_file_list", [], "`dataset.meta_file_list` must be list files"),
        ("train_prfl_t2v_480", "save.output_dir", "${root}/x", r"`save.output_dir` must be a plain value; `\$\{...\}`"),
        ("pre_480", "resolution", [720, 1280], "`resolution` must be .* a multiple of 32, got \\[720, 1280\\]"),
        ("pre_480", "start_idx", 8, "`start_idx` must be 0"),
        ("pre_480", "model_type", "ltx", "`model_type` must be wanx"),
        ("pre_480", "precision", "int8", "`precision` must be one of bf16, fp16, fp32"),
        ("pre_480", "num_frames", 80, "as options of `preprocess`: `num_frames` must be of the form 4k"),
    ],
)  # fmt: skip
def test_values_without_a_counterpart_are_refused(
    name: str, key: str, value: object, message: str, convert: Convert
) -> None:
    with pytest.raises(ValueError, match=f"{name}.yaml: .*{message}"):
        convert(name, {key: value})


def test_crops_are_refused_where_upstream_crops(convert: Convert) -> None:
    halved = {"dataset.crop_ratio": [0.5, 0.5, 1]}
    convert("train_pavrm_t2v_480", halved)
    with pytest.raises(ValueError, match=r"`dataset\.crop_ratio` must be \[1, 1, 1\]: clips are cropped once"):
        convert("train_pavrm_t2v_480", halved | {"dataset.sp_size": 1})


def test_refused_values_may_be_ignored(convert: Convert) -> None:
    for key, value in {"lrm.timestep": [400], "train.precision": "fp32"}.items():
        converted, _ = convert("train_pavrm_t2v_480", {key: value}, ignore=[key])
        assert converted.notes[0] == f"{key}: {value}: left out because of ignore_keys."
    with pytest.raises(ValueError, match="`ignore_keys` names 'train.sped', which is not in the file"):
        convert("train_prfl_t2v_480", ignore=["train.sped"])


def test_schedules_that_end_elsewhere_are_noted(convert: Convert) -> None:
    converted, _ = convert("train_prfl_t2v_480", {"optimizer.lr_scheduler": "cosine"})
    assert any(
        note.startswith("optimizer.lr_scheduler: cosine: here it ends at max_train_steps") for note in converted.notes
    )


def test_file_is_written_once(convert: Convert, tmp_path: Path) -> None:
    converted, config = convert("train_pavrm_t2v_720")
    options = parse_config(RecipeConfig, ["--recipe=old.yaml", f"--output={tmp_path / 'new' / 'mine.yaml'}"])
    converted.save(options.output)
    assert parse_config(RewardTrainingConfig, ["--config", options.output]) == config
    assert f"--config {options.output}" in Path(options.output).read_text()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.yaml"]
    with pytest.raises(FileExistsError, match=r"mine\.yaml' exists already"):
        converted.save(options.output)
    with pytest.raises(ValueError, match="`output` must be a .yaml file"):
        parse_config(RecipeConfig, ["--recipe=old.yaml", "--output=new"])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file '.*missing\.yaml'"):
        convert_recipe(tmp_path / "missing.yaml")
    path = tmp_path / "old.yaml"
    for text, message in {
        "- 1": "expected a mapping of sections, got list",
        "a: [": "not valid YAML",
        "learning_rate: 1": "is not a recipe of HY-Video-PRFL",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            convert_recipe(path)
    path.write_text("json_path: a")
    with pytest.raises(ValueError, match="`command` must be one of"):
        convert_recipe(path, command="train")
