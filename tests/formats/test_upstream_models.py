"""Models, layers and blocks that upstream's recipes name."""

from pathlib import Path
from typing import Any

import pytest

from tests.formats.upstream_recipes import Convert


@pytest.mark.parametrize(
    ("blocks", "layer", "expected"),
    [([*range(8)], [8], 8), ([*range(8)], 8, 8), ([0, 1, 2, 3], [4], 4), ([1, 0], [2], 2)],
)
def test_feature_layer_counts_from_one(blocks: list[int], layer: Any, expected: int, convert: Convert) -> None:
    changes = {"lrm.trainable_blocks": blocks, "lrm.feature_layer": layer}
    assert convert("train_pavrm_t2v_480", changes)[1].num_layers == expected
    convert("train_prfl_t2v_480", changes)
    convert("infer_pavrm_i2v_720", changes)


@pytest.mark.parametrize("name", ["train_pavrm_t2v_480", "train_prfl_t2v_480", "infer_pavrm_i2v_720"])
@pytest.mark.parametrize("layer", [[7], 7, [6, 7], [4], [9], [7, 8], [], "8"])
def test_other_feature_layers_are_refused(name: str, layer: Any, convert: Convert) -> None:
    with pytest.raises(ValueError, match=r"`lrm\.feature_layer` must be \[8\]: the last of the 8 blocks"):
        convert(name, {"lrm.feature_layer": layer})


@pytest.mark.parametrize(
    ("name", "ratio", "count", "reward_count"),
    [
        # N blocks and a share of p: the floor of N p + 1/2.
        ("train_prfl_t2v_480", 0.5, 20, 4),
        ("train_prfl_t2v_480", "1/3", 13, 3),
        ("train_prfl_t2v_480", "0.25", 10, 2),
        ("train_prfl_t2v_480", 0.05, 2, 1),
        ("train_prfl_t2v_480", 1.0, None, None),
        ("train_prfl_t2v_480", 2, None, None),
        ("train_pavrm_t2v_480", 0.5, 4, None),
        ("train_pavrm_t2v_480", "1/3", 3, None),
        ("train_pavrm_t2v_480", 1, None, None),
    ],
)
def test_share_of_checkpointed_blocks(
    name: str, ratio: Any, count: int | None, reward_count: int | None, convert: Convert
) -> None:
    converted, config = convert(name, {"model.selective_checkpointing": ratio})
    assert (config.gradient_checkpointing, config.gradient_checkpointing_blocks) == (True, count)
    if "prfl" in name:
        assert config.reward_gradient_checkpointing_blocks == reward_count
    told = " ".join([*converted.origins.values(), *converted.notes])
    assert f"model.selective_checkpointing: {ratio}" in told
    assert "or none" not in told


def test_no_recomputed_block(convert: Convert, tmp_path: Path) -> None:
    for changes in ({"model.gradient_checkpointing": False}, {"model.selective_checkpointing": 0}):
        _, config = convert("train_pavrm_t2v_480", changes)
        assert (config.gradient_checkpointing, config.gradient_checkpointing_blocks) == (False, None)
    # A pipeline of one's own says how many blocks it has; the published ones are known.
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    (tmp_path / "pipeline" / "transformer" / "config.json").write_text('{"num_layers": 6}')
    half = {"model.selective_checkpointing": 0.5}
    assert convert("train_prfl_t2v_480", half, pipeline="pipeline")[1].gradient_checkpointing_blocks == 3
    half |= {"task": "t2v-1.3b", "model.base_path": "weights/Wan2.1-T2V-1.3B"}
    assert convert("train_prfl_t2v_480", half)[1].gradient_checkpointing_blocks == 15


def test_model_is_that_of_the_weights(convert: Convert) -> None:
    changes = {"model.base_path": "/w/Wan2.1-I2V-14B-480P/"}
    assert convert("train_pavrm_i2v_720", changes)[1].pretrained_model_name_or_path == (
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
    )
    with pytest.raises(
        ValueError, match=r"`task` must be a task of the model in `model\.base_path`, .* such as t2v-14b"
    ):
        convert("train_pavrm_i2v_720", {"model.base_path": "weights/Wan2.1-T2V-14B"})
    converted, config = convert("train_pavrm_i2v_720", {"model.base_path": "weights/mine"})
    assert config.pretrained_model_name_or_path == "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
    assert any(
        note.startswith("model.base_path: weights/mine: assumed to be the published") for note in converted.notes
    )
    assert convert("train_pavrm_i2v_720", pipeline="me/mine")[1].pretrained_model_name_or_path == "me/mine"


def test_adapters_are_not_dropped(convert: Convert) -> None:
    lora = {"model.lora.use_lora": True}
    with pytest.raises(
        ValueError, match=r"`model\.lora\.target_modules` must be a list of .*'head\.q' is not one of them"
    ):
        convert("train_prfl_t2v_480", lora | {"model.lora.target_modules": ["head.q"]})
    resumed = lora | {"model.lora.resume_lora_path": "run/checkpoint-1"}
    for name in ("train_prfl_t2v_480", "train_pavrm_t2v_480"):
        converted, config = convert(name, resumed)
        assert (config.lora_path, config.lora_start, config.lora_rank) == ("run/checkpoint-1", "continue", 64)
        assert any("counts the step in that file's name" in note for note in converted.notes)
    parts = {f"model.resume_{part}_path": f"run/{part}" for part in ("transformer", "mlp", "query_attention")}
    with pytest.raises(
        ValueError, match=r"resume_lora_path` must be empty if model\.resume_\*_path is given: .*--merge_lora"
    ):
        convert("train_pavrm_t2v_480", resumed | parts)
