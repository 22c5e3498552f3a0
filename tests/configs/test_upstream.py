"""Recipes with the sections and keys that HY-Video-PRFL's scripts read, from the names of its files on."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hy_prfl.configs.convert import ConvertConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.preprocess import PreprocessConfig
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.recipe import RecipeConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.configs.score import ScoreConfig
from hy_prfl.configs.upstream import ConvertedRecipe, convert_recipe
from hy_prfl.configs.upstream_keys import flatten
from hy_prfl.flow_matching import make_generator, sample_sigmas


CONFIGS: dict[str, type] = {
    "preprocess": PreprocessConfig,
    "train_reward": RewardTrainingConfig,
    "train_prfl": PRFLTrainingConfig,
    "score": ScoreConfig,
}
SCHEDULER = "{flow_shift: 5.0, num_train_timesteps: 1000, weighting_scheme: uniform, logit_mean: 0.0, logit_std: 1.0}"
COMMON = f"""
task: TASK
train_id: RUN
model:
  base_path: ./weights/MODEL
  init_transformer_path: null
  resume_transformer_path: null
  patch_size: [1, 2, 2]
  gradient_checkpointing: True
  selective_checkpointing: 1.0
  lora: {{use_lora: False, lora_rank: 64, target_modules: [q, k, v, o], resume_lora_path: null}}
  ema: {{use_ema: False, ema_decay: 0.995}}
  fsdp: {{fsdp_sharding_startegy: full, use_cpu_offload: False}}
extra_model:
  extra_precision: bf16
  vae: {{name: Wan2.1_VAE.pth}}
  scheduler: {SCHEDULER}
dataset:
  meta_file_list: [temp_data/temp_data_SIZE.list]
  uncond_prob: [0.1, 0.0]
  sp_size: 4
  batch_size: 1
  num_workers: 2
  crop_ratio: [1, 1, 1]
  crop_type: center
lrm:
  trainable_blocks: [0, 1, 2, 3, 4, 5, 6, 7]
  feature_layer: [7]
  mlp_dim: 5120
  pool: q_attn
  query_attention: {{num_queries: 1, num_heads: 8, dropout: 0.0, return_type: query, product_text: False}}
optimizer:
  learning_rate: RATE
  adam_beta1: 0.9
  adam_beta2: 0.999
  weight_decay: 0.01
  lr_scheduler: constant_with_warmup
  lr_warmup_steps: 25
  max_train_steps: 4000
  lr_num_cycles: 1
  lr_power: 1.0
train: {{seed: 42, precision: bf16, allow_tf32: True, sanity_check_interval: 0, gradient_accumulation_steps: 5.,
        save_interval: 100, dpo_beta: 5000}}
save: {{output_dir: outputs}}
eval: {{seed: 1024}}
"""
PREPROCESS = """
seed: 42
model_type: wanx
precision: fp16
vae_path: ./weights/Wan2.1-I2V-14B-720P/Wan2.1_VAE.pth
image_encoder_path: ./weights/Wan2.1-I2V-14B-720P/models_clip.pth
image_processor_path: ./weights/Wan2.1-I2V-14B-720P/xlm-roberta-large
text_encoder_path: ./weights/Wan2.1-I2V-14B-720P/models_t5.pth
tokenizer_path: ./weights/Wan2.1-I2V-14B-720P/google/umt5-xxl
max_sequence_length: 512
json_path: temp_data/temp_input_data.json
save_dir: temp_data/SIZE
extract_fps: 16
num_frames: 81
start_idx: 0
resolution: [SIDE, 1280]
aspect_ratio: 1.78
"""
MODELS = {
    "t2v_480": ("t2v-14b", "Wan2.1-T2V-14B"),
    "t2v_720": ("t2v-14b", "Wan2.1-T2V-14B"),
    "i2v_480": ("i2v-14b-480p", "Wan2.1-I2V-14B-480P"),
    "i2v_720": ("i2v-14b-720p", "Wan2.1-I2V-14B-720P"),
}
TRAININGS = [f"train_{kind}_{name}" for kind in ("pavrm", "prfl") for name in MODELS] + ["train_pavrm_bt_i2v_720"]
RECIPES = [*TRAININGS, "infer_pavrm_i2v_720", "pre_480", "pre_720"]


def upstream_recipe(name: str) -> dict[str, Any]:
    """The content of upstream's file of that name, without `.yaml`."""
    size = name[-3:]
    if name.startswith("pre"):
        return yaml.safe_load(PREPROCESS.replace("SIZE", size).replace("SIDE", "480" if size == "480" else "704"))
    task, model = MODELS[name[-7:]]
    rate = "5e-6" if "prfl" in name else "1e-6"
    text = COMMON
    for placeholder, value in {"TASK": task, "RUN": name, "MODEL": model, "SIZE": size, "RATE": rate}.items():
        text = text.replace(placeholder, value)
    recipe = yaml.safe_load(text)
    if "prfl" in name:
        recipe["model"] |= {
            "lrm_transformer_path": "out/checkpoint-100",
            "lrm_mlp_path": "out/mlp_step_100.ckpt",
            "lrm_query_attention_path": "out/query_attention_step_100.ckpt",
        }
    else:
        recipe["lrm"] |= {"loss": "bt" if "_bt_" in name else "ce", "task": "motion_quality"}
        recipe["dataset"]["val_meta_file_list"] = ["temp_data/val.list"]
        paths = dict.fromkeys(("resume_mlp_path", "resume_query_attention_path"))
        if name.startswith("infer"):
            paths = {
                "resume_transformer_path": "out/checkpoint-100",
                "resume_mlp_path": "out/mlp_step_100.ckpt",
                "resume_query_attention_path": "out/query_attention_step_100.ckpt",
            }
        recipe["model"] |= paths
    if "_bt_" in name:
        recipe["dataset"]["meta_file_lose_list"] = ["temp_data/lose.list"]
        recipe["optimizer"]["learning_rate_mlp"] = "1e-5"
    return recipe


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., tuple[ConvertedRecipe, Any]]:
    """Function that converts a recipe, with keys changed, and parses the YAML that is written for it."""

    def run(name: str, changes: dict[str, Any] | None = None, **arguments: Any) -> tuple[ConvertedRecipe, Any]:
        recipe = upstream_recipe(name)
        for key, value in (changes or {}).items():
            *sections, leaf = key.split(".")
            section = recipe
            for part in sections:
                section = section[part]
            section[leaf] = value
        source = tmp_path / f"{name}.yaml"
        source.write_text(yaml.safe_dump(recipe))
        converted = convert_recipe(source, **arguments)
        target = tmp_path / "new.yaml"
        target.write_text(converted.to_yaml("new.yaml"), encoding="utf-8")
        lacks_reward_model = converted.command in ("train_prfl", "score") and "reward_model" not in converted.options
        more = ["--reward_model=x"] if lacks_reward_model else []
        return converted, parse_config(CONFIGS[converted.command], ["--config", str(target), *more])

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_carried_over_or_noted(name: str, convert: Callable[..., Any]) -> None:
    converted, config = convert(name)
    expected = {"pre": "preprocess", "train_pavrm": "train_reward", "train_prfl": "train_prfl", "infer_pavrm": "score"}
    assert converted.command == next(command for prefix, command in expected.items() if name.startswith(prefix))
    for option, value in converted.options.items():
        assert getattr(config, option) == value, option
    told = " ".join([*converted.origins.values(), *converted.notes])
    for key, value in flatten(upstream_recipe(name)).items():
        section_in_one = key.startswith("model.fsdp.") or re.fullmatch(r"model\.(lrm|resume)_\w+_path", key)
        assert value is None or key in told or section_in_one, key


@pytest.mark.parametrize("name", TRAININGS)
def test_the_head_is_a_command_that_runs(name: str, convert: Callable[..., Any]) -> None:
    converted, _ = convert(name)
    text = converted.to_yaml("new.yaml")
    command = re.search(r"^#   (accelerate launch .*?) \\\n#       (--config .*)$", text, re.MULTILINE)
    assert command is not None
    launch = command[1].split()
    assert (Path(__file__).parents[2] / launch[launch.index("--config_file") + 1]).is_file()
    assert launch[-1] == f"hy_prfl.scripts.{converted.command}"
    assert command[2] == "--config new.yaml"
    assert launch[3].endswith("/zero3.yaml")


def test_reward_training(convert: Callable[..., Any]) -> None:
    converted, config = convert("train_pavrm_i2v_720")
    assert config.pretrained_model_name_or_path == "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
    assert (config.loss, config.task, config.pooling, config.query_residual) == (
        "bce",
        "motion_quality",
        "query",
        True,
    )
    assert (config.num_layers, config.num_query_heads) == (8, 8)
    # Only the Bradley-Terry file gives the head a rate of its own, and no file's accumulation does anything.
    assert (config.learning_rate, config.head_learning_rate) == (1e-6, 1e-6)
    assert (config.gradient_accumulation_steps, config.max_train_steps, config.lr_warmup_steps) == (1, 4000, 25)
    assert (config.checkpointing_steps, config.validation_steps) == (100, 100)
    assert (config.flow_shift, config.weighting_scheme) == (5.0, "uniform")
    assert (config.context_parallel_degree, config.train_batch_size, config.dataloader_num_workers) == (4, 1, 2)
    assert (config.seed, config.validation_seed, config.validation_timesteps) == (42, 1024, [100, 300, 500, 700, 900])
    assert config.output_dir == "outputs/train_pavrm_i2v_720"
    assert (config.train_dataset, config.validation_dataset) == ("data/temp_data_720", "data/val")
    (command,) = [each for each in converted.first if "--upstream_meta temp_data/temp_data_720.list" in each]
    script, *options = command.removeprefix("hy-prfl ").split()
    assert script == "preprocess"
    assert parse_config(PreprocessConfig, options).output_dir == config.train_dataset


def test_bradley_terry(convert: Callable[..., Any]) -> None:
    converted, config = convert("train_pavrm_bt_i2v_720")
    assert (config.loss, config.allow_unpaired, config.head_learning_rate) == ("bt", True, 1e-5)
    assert any("lose.list" in note and "motion_quality" in note for note in converted.notes)
    assert converted.first[0].endswith(
        "cat temp_data/temp_data_720.list temp_data/lose.list > data/temp_data_720.list"
    )


def test_prfl_counts_iterations_in_steps(convert: Callable[..., Any]) -> None:
    converted, config = convert("train_prfl_i2v_720")
    # 4000 iterations of 1 clip, 5 of them an update of each kind; the schedule ticks twice meanwhile.
    assert (config.gradient_accumulation_steps, config.max_train_steps) == (5, 800)
    assert (config.checkpointing_steps, config.lr_warmup_steps) == (20, 13)
    assert config.learning_rate == 5e-6
    assert (config.update_schedule, config.reward_loss) == ("alternate", "sigmoid")
    assert (config.reward_scale, config.reward_target, config.divide_by_step_width) == (0.1, 2.0, False)
    assert (config.num_inference_steps, config.step_range) == (40, [0, 38])
    assert (config.flow_shift, config.sampler_flow_shift) == (5.0, 5.0)
    assert config.prompt_dropout == 0.1
    assert config.lora_rank is None
    assert not config.use_ema
    assert config.reward_model == "converted/reward_model"
    (command,) = [each for each in converted.first if "hy-prfl convert" in each]
    words = command.split()
    assert words[words.index("--reward_transformer") + 1] == "out/checkpoint-100"
    assert words[words.index("--mlp") + 1] == "out/mlp_step_100.ckpt"
    assert words[words.index("--query_attention") + 1] == "out/query_attention_step_100.ckpt"
    assert words[words.index("--output_dir") + 1] == "converted/reward_model"


def test_lora_and_average(convert: Callable[..., Any]) -> None:
    modules = ["q", "self_attn.k", "cross_attn.v_img", "o", "ffn.0", "ffn.2"]
    _, config = convert(
        "train_prfl_t2v_480",
        {"model.lora.use_lora": True, "model.lora.target_modules": modules, "model.ema.use_ema": True},
    )
    assert (config.lora_rank, config.lora_alpha) == (64, 64.0)
    expected = ["to_q", "attn1.to_k", "attn2.add_v_proj", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    assert config.lora_target_modules == expected
    assert (config.use_ema, config.ema_decay) == (True, 0.995)
    _, config = convert("train_pavrm_t2v_480", {"model.lora.use_lora": True})
    assert (config.lora_rank, config.lora_alpha) == (64, 64.0)


def test_scoring(convert: Callable[..., Any]) -> None:
    converted, config = convert("infer_pavrm_i2v_720")
    assert (config.dataset, config.manifest) == ("data/val", None)
    assert config.reward_model == "converted/reward_model"
    assert config.output == "outputs/infer_pavrm_i2v_720/scores.csv"
    assert (config.seed, config.dtype, config.batch_size) == (1024, "bfloat16", 1)
    # A recipe of training scores as well, if that is asked for.
    assert convert("train_pavrm_i2v_720", command="score")[1].output == "outputs/train_pavrm_i2v_720/scores.csv"


@pytest.mark.parametrize(("name", "side"), [("pre_480", 480), ("pre_720", 704)])
def test_preprocessing(name: str, side: int, convert: Callable[..., Any]) -> None:
    _, config = convert(name)
    assert config.pretrained_model_name_or_path == "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
    assert (config.manifest, config.output_dir) == ("temp_data/temp_input_data.json", f"temp_data/{name[-3:]}")
    assert (config.fps, config.num_frames, config.min_num_frames) == (16, 81, 1)
    assert (config.resolution, config.max_aspect_ratio, config.buckets) == (side, 1.78, [])
    assert (config.text_encoder_dtype, config.max_sequence_length) == ("bfloat16", 512)


def test_logit_normal_law_is_upstreams(convert: Callable[..., Any]) -> None:
    """Upstream draws an index into sigmas that fall from 1 to 0; the law here is that of sigma itself."""
    scheduler = "extra_model.scheduler"
    _, config = convert(
        "train_prfl_t2v_720", {f"{scheduler}.weighting_scheme": "logit_normal", f"{scheduler}.logit_mean": 1.5}
    )
    generators = [make_generator(0, index) for index in range(4000)]
    ours = sample_sigmas(
        generators,
        weighting_scheme=config.weighting_scheme,
        flow_shift=config.flow_shift,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
    )
    torch.manual_seed(0)
    index = (torch.normal(1.5, 1.0, (4000,)).sigmoid() * 1000).long()
    schedule = torch.linspace(1, 0, 1001)
    upstream = (5 * schedule / (1 + 4 * schedule))[index]
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    assert torch.allclose(ours.quantile(levels), upstream.quantile(levels), atol=0.03)


def test_several_lists_are_joined(convert: Callable[..., Any]) -> None:
    converted, config = convert("train_prfl_t2v_480", {"dataset.meta_file_list": ["a/one.list", "b/two.list"]})
    assert config.train_dataset == "data/one"
    assert converted.first[0] == "mkdir -p data && cat a/one.list b/two.list > data/one.list"
    assert "--upstream_meta data/one.list" in converted.first[1]


def test_no_reward_model_is_not_passed_over(convert: Callable[..., Any]) -> None:
    nothing = {f"model.lrm_{part}_path": None for part in ("transformer", "mlp", "query_attention")}
    converted, _ = convert("train_prfl_t2v_480", nothing)
    assert "reward_model" not in converted.options
    assert any("--reward_model" in note for note in converted.notes)
    with pytest.raises(ValueError, match=r"must name three files; mlp is missing"):
        convert("train_prfl_t2v_480", {"model.lrm_mlp_path": None})


def test_unknown_keys_are_refused_by_name_and_may_be_ignored(convert: Callable[..., Any], tmp_path: Path) -> None:
    changes = {"train.speed": 1, "magic": 2}
    with pytest.raises(ValueError, match=r"train_prfl_t2v_480\.yaml: .* no `magic`, `train\.speed` in a recipe"):
        convert("train_prfl_t2v_480", changes)
    converted, _ = convert("train_prfl_t2v_480", changes, ignore=["train.speed", "magic"])
    assert any(note.startswith("train.speed: 1") for note in converted.notes)
    with pytest.raises(ValueError, match="`ignore` names 'train.sped', which is no key"):
        convert("train_prfl_t2v_480", ignore=["train.sped"])


def test_pooling_of_the_reward_model_is_converted_as_it_was_trained(convert: Callable[..., Any]) -> None:
    attention = {"lrm.query_attention.num_heads": 4, "lrm.query_attention.return_type": None}
    (command,) = [each for each in convert("train_prfl_t2v_480", attention)[0].first if "convert" in each]
    config = parse_config(ConvertConfig, command.removeprefix("hy-prfl convert ").split())
    assert (config.num_query_heads, config.query_residual) == (4, False)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("train_pavrm_t2v_480", "task", "i2v-1.3b", "`task` must be one of t2v-1.3b, .*got 'i2v-1.3b'"),
        ("train_pavrm_t2v_480", "lrm.trainable_blocks", [4, 5], "`lrm.trainable_blocks` must be the first blocks"),
        ("train_pavrm_t2v_480", "lrm.feature_layer", [6, 7], "`lrm.feature_layer` must be the last of the blocks, 7"),
        ("train_pavrm_t2v_480", "lrm.query_attention.num_queries", 4, "num_queries` must be 1, got 4"),
        ("train_pavrm_t2v_480", "lrm.timestep", [400], "`lrm.timestep` must be left out"),
        ("train_pavrm_t2v_480", "lrm.loss", "mse", "`lrm.loss` must be one of ce, bt, got 'mse'"),
        ("train_prfl_t2v_480", "extra_model.scheduler.num_train_timesteps", 500, "num_train_timesteps` must be 1000"),
        ("train_prfl_t2v_480", "train.gradient_accumulation_steps", 2.5, "must be a whole number, got 2.5"),
        ("train_prfl_t2v_480", "optimizer.learning_rate", "fast", "`optimizer.learning_rate` must be a number"),
        ("train_prfl_t2v_480", "optimizer.max_train_steps", None, "`optimizer.max_train_steps` is missing"),
        ("train_prfl_t2v_480", "save.output_dir", "${root}/x", r"`save.output_dir` must be a value; `\$\{...\}`"),
        ("pre_480", "resolution", [720, 1280], "`resolution` must be .* a multiple of 32, got \\[720, 1280\\]"),
        ("pre_480", "start_idx", 8, "`start_idx` must be 0"),
    ],
)
def test_values_without_a_counterpart_are_refused(
    name: str, key: str, value: object, message: str, convert: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(name, {key: value})


def test_layer_that_does_not_exist(convert: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"`model\.lora\.target_modules` must be layers .*'head\.q' is none"):
        convert("train_prfl_t2v_480", {"model.lora.use_lora": True, "model.lora.target_modules": ["head.q"]})


def test_file_is_written_once(convert: Callable[..., Any], tmp_path: Path) -> None:
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
        "learning_rate: 1": "is no recipe of HY-Video-PRFL",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            convert_recipe(path)
    with pytest.raises(ValueError, match="`command` must be one of"):
        convert_recipe(path, command="train")
