"""Commands that bring what upstream's recipes name into our formats."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from hy_prfl.configs.convert import ConvertConfig
from hy_prfl.configs.label import LabelConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.preprocess import PreprocessConfig
from hy_prfl.formats.upstream_recipe import convert_recipe
from tests.formats.upstream_recipes import RECIPES, Convert, commands, options_of, reward_parts, upstream_recipe


ROOT = Path(__file__).parents[2]


def test_launch_files_are_brought_along(convert: Convert, tmp_path: Path) -> None:
    converted, _ = convert("train_pavrm_t2v_480")
    assert converted.commands("x.yaml")[0] == f"ln -sf {ROOT}/accelerate_configs {ROOT}/ds_configs ."
    (tmp_path / "accelerate_configs").mkdir()
    assert converted.commands("x.yaml")[0] == f"ln -sf {ROOT}/ds_configs ."
    (tmp_path / "ds_configs").mkdir()
    assert converted.commands("x.yaml")[0].startswith("hy-prfl preprocess")


def test_bradley_terry_with_one_list(convert: Convert) -> None:
    converted, config = convert("train_pavrm_bt_i2v_720")
    assert (config.loss, config.allow_unpaired, config.head_learning_rate) == ("bt", True, 1e-5)
    assert len(converted.first) == 1
    assert any("the same clips as meta_file_list" in note and "motion_quality" in note for note in converted.notes)


def test_bradley_terry_with_two_lists(convert: Convert) -> None:
    converted, config = convert("train_pavrm_bt_i2v_720", {"dataset.meta_file_lose_list": ["lists/lose.list"]})
    (command,) = commands(converted, "hy-prfl label")
    labelled = parse_config(LabelConfig, options_of(command))
    assert (labelled.output_dir, labelled.overwrite) == (*config.train_dataset, True)
    imports = [parse_config(PreprocessConfig, options_of(each)) for each in commands(converted, "hy-prfl preprocess")]
    assert [each.output_dir for each in imports] == [labelled.dataset, *config.validation_dataset]
    assert len(set(converted.first)) == len(converted.first)


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        (["train/meta.list"], ["val/meta.list"]),
        (["a/b/meta.list"], ["a/meta.list"]),
        (["../meta.list"], ["meta.list"]),
        (["/data/meta.list"], ["other/meta.list"]),
        (["meta.list"], ["meta.txt"]),
        (["meta.list", "more.list"], ["meta.list"]),
        (["train/meta.list", "val/meta.list"], ["val/meta.list", "train/meta.list"]),
    ],
)
def test_other_lists_are_other_datasets(train: list[str], validation: list[str], convert: Convert) -> None:
    lists = {"dataset.meta_file_list": train, "dataset.val_meta_file_list": validation}
    converted, config = convert("train_pavrm_t2v_480", lists)
    imports = [parse_config(PreprocessConfig, options_of(each)) for each in commands(converted, "hy-prfl preprocess")]
    assert len(imports) == 2
    assert [each.output_dir for each in imports] == [*config.train_dataset, *config.validation_dataset]
    assert config.train_dataset != config.validation_dataset
    assert len(set(converted.first)) == len(converted.first)


def test_the_same_lists_are_one_dataset(convert: Convert) -> None:
    for lists in (["./meta.list"], "meta.list", ["a.list", "b.list"]):
        changes = {"dataset.meta_file_list": lists, "dataset.val_meta_file_list": lists}
        converted, config = convert("train_pavrm_t2v_480", changes)
        assert config.train_dataset == config.validation_dataset
        assert len(commands(converted, "hy-prfl preprocess")) == 1


def test_recipes_share_datasets_and_no_other_folder(convert: Convert) -> None:
    """All commands of all twelve can be run in one folder."""
    folders: dict[str, str] = {}
    for name in RECIPES:
        prefix = {"train_prfl": "lrm", "infer_pavrm": "resume"}.get(name.rpartition("_")[0].rpartition("_")[0])
        converted, config = convert(name, reward_parts(prefix) if prefix else None)
        for command in [*converted.first, f"the run of {name}, --output_dir {getattr(config, 'output_dir', name)}"]:
            (folder,) = re.findall(r"--output_dir (\S+)", command)
            assert folders.setdefault(folder, command) == command
    assert len([folder for folder in folders if folder.startswith("converted/")]) == 5


def test_several_lists_are_joined_line_by_line(convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "one two.list").write_text("a\n\nb")
    (tmp_path / "three.list").write_text("c")
    converted, _ = convert("train_prfl_t2v_480", {"dataset.meta_file_list": ["one two.list", "three.list"]})
    *joining, importing = converted.first
    subprocess.run(" && ".join(joining), shell=True, check=True)
    path = parse_config(PreprocessConfig, options_of(importing)).upstream_meta
    assert path is not None
    assert Path(path).read_text().splitlines() == ["a", "b", "c"]


def test_pooling_of_the_reward_model_is_converted_as_it_was_trained(convert: Convert) -> None:
    changes = reward_parts("lrm") | {
        "lrm.query_attention.num_heads": 4,
        "lrm.query_attention.return_type": None,
        "lrm.task": "blur_quality",
    }
    (command,) = commands(convert("train_prfl_t2v_480", changes)[0], "hy-prfl convert")
    parts = parse_config(ConvertConfig, options_of(command))
    assert (parts.num_query_heads, parts.query_residual, parts.task) == (4, False, "blur_quality")
    for name, prefix in {"train_prfl_t2v_480": "lrm", "train_pavrm_t2v_480": "resume"}.items():
        with pytest.raises(ValueError, match=r"`lrm\.pool` must be q_attn.*got 'mean'"):
            convert(name, reward_parts(prefix) | {"lrm.pool": "mean"})


@pytest.mark.parametrize("name", ["train_prfl_t2v_480", "infer_pavrm_i2v_720"])
def test_no_reward_model_is_not_passed_over(name: str, convert: Convert) -> None:
    converted, config = convert(name)
    assert "reward_model" not in converted.options
    assert config.reward_model == f"outputs/pavrm_{name[-7:]}/best"
    assert any("never trained" in note and config.reward_model in note for note in converted.notes)
    prefix = "lrm" if "prfl" in name else "resume"
    with pytest.raises(ValueError, match=rf"`model\.{prefix}_mlp_path` is empty, .* name all three, or none"):
        convert(name, reward_parts(prefix) | {f"model.{prefix}_mlp_path": None})


def test_empty_prompt_is_upstreams_own(convert: Convert, tmp_path: Path) -> None:
    note = "--null_prompt_path"
    assert any(note in each for each in convert("train_prfl_t2v_480")[0].notes)
    assert not any(
        note in each for each in convert("train_prfl_t2v_480", {"dataset.uncond_prob": [0.0, 0.0]})[0].notes
    )
    assert not any(note in each for each in convert("train_pavrm_t2v_480")[0].notes)
    path = tmp_path / "temp_data" / "null" / "wanx" / "null.npy"
    path.parent.mkdir(parents=True)
    path.touch()
    converted, _ = convert("train_prfl_t2v_480")
    imported = parse_config(PreprocessConfig, options_of(converted.first[0]))
    assert imported.null_prompt_path == "temp_data/null/wanx/null.npy"


def test_folder_that_upstream_ran_in(convert: Convert, tmp_path: Path) -> None:
    changes = reward_parts("lrm") | {"model.lrm_mlp_path": "/abs/mlp_1.ckpt"}
    converted, _ = convert("train_prfl_t2v_480", changes, upstream_root="../up")
    imported = parse_config(PreprocessConfig, options_of(commands(converted, "hy-prfl preprocess")[0]))
    assert (imported.upstream_meta, imported.upstream_root) == ("../up/lists/clips_480.list", "../up")
    parts = parse_config(ConvertConfig, options_of(commands(converted, "hy-prfl convert")[0]))
    assert (parts.reward_transformer, parts.mlp) == ("../up/run/checkpoint-100", "/abs/mlp_1.ckpt")

    (tmp_path / "up" / "configs").mkdir(parents=True)
    source = tmp_path / "up" / "configs" / "a.yaml"
    source.write_text(yaml.safe_dump(upstream_recipe("train_prfl_t2v_480")))
    assert "--upstream_root up " in convert_recipe("up/configs/a.yaml").first[0]


def test_weights_to_start_from(convert: Convert) -> None:
    for key in ("init_transformer_path", "resume_transformer_path"):
        converted, config = convert("train_prfl_t2v_480", {f"model.{key}": "run/checkpoint-7"}, upstream_root="../up")
        assert config.transformer_path == "../up/run/checkpoint-7"
        assert config.pretrained_model_name_or_path == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
        assert commands(converted, "hy-prfl convert --transformer") == []
    assert convert("train_pavrm_t2v_480", {"model.init_transformer_path": "x"})[1].transformer_path == "x"
    both = {"model.init_transformer_path": "a", "model.resume_transformer_path": "b-1"}
    converted, config = convert("train_prfl_t2v_480", both)
    assert config.transformer_path == "b-1"
    assert any(
        note.startswith("model.init_transformer_path: a: upstream does not read it") for note in converted.notes
    )
    # A reward model that goes on has all of its weights from its own file.
    parts = {f"model.resume_{part}_path": f"run/{part}" for part in ("transformer", "mlp", "query_attention")}
    converted, config = convert("train_pavrm_t2v_480", {"model.init_transformer_path": "a", **parts})
    assert config.transformer_path is None
    assert any(note.startswith("model.init_transformer_path: a: not needed, because") for note in converted.notes)


def test_preprocessing_runs_where_upstream_ran(convert: Convert, tmp_path: Path) -> None:
    """The video paths in its JSON file start there."""
    converted, config = convert("pre_480", upstream_root="../up")
    assert converted.commands("new.yaml") == [
        f"(cd ../up && hy-prfl preprocess --config {tmp_path}/new.yaml --output_dir {tmp_path}/data/i2v-14b-480p/clips/480)"
    ]
