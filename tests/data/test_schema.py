"""Rows survive packing, Arrow and the disk; labels are read as people write them."""

import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from hy_prfl.data.schema import (
    latent_features,
    pack_tensor,
    parse_label,
    rows_to_table,
    table_to_rows,
    task_label,
    unpack_tensor,
    validate_columns,
)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_survive_arrow_and_the_disk(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(16, 3, 4, 6)).astype(dtype), rng.normal(size=(16, 2, 2, 2)).astype(dtype), None]
    rows = [
        {"id": str(index), "physics_quality": label, **pack_tensor("latents", array, dtype, source="test")}
        for index, (array, label) in enumerate(zip(arrays, [1, 0, None], strict=True))
    ]
    Dataset(rows_to_table(rows, dtype)).save_to_disk(tmp_path / "dataset")

    loaded = load_from_disk(tmp_path / "dataset")
    assert loaded.features == latent_features(dtype)
    for row, array, label in zip(table_to_rows(loaded.data.table), arrays, [1, 0, None], strict=True):
        assert row["physics_quality"] == label
        assert row["condition"] is None
        unpacked = unpack_tensor(row, "latents")
        if array is None:
            assert unpacked is None
        else:
            assert unpacked.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(unpacked, array)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="clip 7: `latents` holds a NaN or an infinity"):
        pack_tensor("latents", np.array([0.0, value], dtype=np.float32), "float32", source="clip 7")


def test_overflow_is_refused_in_half_and_kept_in_single_precision() -> None:
    array = np.array([70000.0], dtype=np.float32)
    with pytest.raises(ValueError, match="`latents` reaches 70000, which overflows float16"):
        pack_tensor("latents", array, "float16", source="clip 7")
    assert pack_tensor("latents", array, "float32", source="clip 7")["latents"][0] == 70000.0


@pytest.mark.parametrize(
    ("value", "label"),
    [(1, 1), (1.0, 1), ("1", 1), ("good", 1), (" Good ", 1), (True, 1), (0, 0), (0.0, 0), ("0", 0), ("poor", 0)]
    + [(False, 0), (None, None), ("", None), ("null", None), (math.nan, None)],
)
def test_labels_as_people_write_them(value: object, label: int | None) -> None:
    assert parse_label(value, source="test", name="blur_quality") == label


@pytest.mark.parametrize("value", [2, -1, 0.5, "bad", "yes"])
def test_other_labels_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="row 3: `blur_quality` must be 1, 0"):
        parse_label(value, source="row 3", name="blur_quality")


@pytest.mark.parametrize(
    ("physics", "human", "motion"),
    [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 0), (None, 1, None), (0, None, None), (None, None, None)],
)
def test_motion_quality_is_both_or_unknown(physics: int | None, human: int | None, motion: int | None) -> None:
    row = {"physics_quality": physics, "human_quality": human, "blur_quality": 1}
    assert task_label(row, "motion_quality") == motion
    assert task_label(row, "physics_quality") == physics


def test_missing_columns_are_named() -> None:
    columns = set(latent_features()) - {"condition", "fps"}
    with pytest.raises(ValueError, match="my/folder: not a latent dataset, .* condition, fps"):
        validate_columns(columns, "my/folder")
