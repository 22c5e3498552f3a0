"""Merging annotations: what is kept, what is refused, and that nothing else in the dataset moves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk

from hy_prfl.data.annotations import read_annotations
from hy_prfl.data.labels import count_labels, label_dataset, merge_labels
from hy_prfl.data.schema import LABELS, latent_features, pack_tensor, rows_to_table, table_to_rows
from hy_prfl.data.store import save_table


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three clips: `a` is good in physics, `b` is poor, `c` is not labelled."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": clip_id,
            "physics_quality": label,
            **pack_tensor("latents", rng.normal(size=(16, 1, 2, 2)), "float16", source="test"),
        }
        for clip_id, label in (("a", 1), ("b", 0), ("c", None))
    ]
    files = {"preprocess.json": json.dumps({"digest": "d", "keys": ["1", "2", "3"]}), "report.jsonl": "{}\n"}
    save_table(rows_to_table(rows), latent_features(), tmp_path / "dataset", files)
    return tmp_path / "dataset"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def labels_of(folder: Path) -> dict[str, list[int | None]]:
    rows = load_from_disk(folder)
    return {row["id"]: [row[name] for name in LABELS] for row in rows.select_columns(["id", *LABELS])}


def test_labels_are_merged_and_nothing_else_changes(dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,physics_quality,human_quality\nc,poor,1\na,,good\n")
    counts = label_dataset(str(dataset), read_annotations(path), tmp_path / "out")
    assert labels_of(tmp_path / "out") == {
        "a": [None, None, 1, 1],
        "b": [None, None, 0, None],
        "c": [None, None, 0, 1],
    }
    assert counts["physics_quality"] == {"good": 1, "poor": 2, "missing": 0}
    assert counts["human_quality"] == {"good": 2, "poor": 0, "missing": 1}
    assert counts["motion_quality"] == {"good": 1, "poor": 1, "missing": 1}
    assert counts["text_alignment"] == {"good": 0, "poor": 0, "missing": 3}

    before, after = (table_to_rows(load_from_disk(folder).data.table) for folder in (dataset, tmp_path / "out"))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old.pop("latents"), new.pop("latents"))
        assert {name: old[name] for name in old if name not in LABELS} == {
            name: new[name] for name in new if name not in LABELS
        }
    assert load_from_disk(tmp_path / "out").features == latent_features()
    assert labels_of(dataset)["c"] == [None] * 4


def test_onto_the_same_folder(dataset: Path, tmp_path: Path) -> None:
    label_dataset(str(dataset), {"c": {"blur_quality": 1}}, dataset)
    assert labels_of(dataset)["c"] == [None, 1, None, None]
    assert labels_of(dataset)["a"] == [None, None, 1, None]
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]
    assert json.loads((dataset / "preprocess.json").read_text())["labelled"] is True
    assert (dataset / "report.jsonl").is_file()


def test_refusal_leaves_the_dataset_alone(dataset: Path) -> None:
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}
    with pytest.raises(ValueError, match="'a': `physics_quality` is 1 in the dataset and 0 in the annotations"):
        label_dataset(str(dataset), {"b": {"blur_quality": 1}, "a": {"physics_quality": 0}}, dataset)
    assert {path.name: path.read_bytes() for path in dataset.iterdir()} == before


def test_other_folders_are_not_replaced(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes' is not empty"):
        label_dataset(str(dataset), {"a": {"blur_quality": 1}}, tmp_path / "notes")


def test_contradictions() -> None:
    rows: dict[str, Any] = {"id": ["a"], **{name: [None] for name in LABELS}} | {"physics_quality": [1]}
    with pytest.raises(ValueError, match="set `overwrite`"):
        merge_labels(rows, {"a": {"physics_quality": 0}})
    assert merge_labels(rows, {"a": {"physics_quality": 0}}, overwrite=True)["physics_quality"] == [0]
    assert merge_labels(rows, {"a": {"physics_quality": 1}})["physics_quality"] == [1]


def test_unknown_ids() -> None:
    rows: dict[str, Any] = {"id": ["a"], **{name: [None] for name in LABELS}}
    annotations = {"a": {"blur_quality": 0}, "z": {"blur_quality": 1}}
    with pytest.raises(ValueError, match="1 annotated clips are not in the dataset, the first is `id` 'z'"):
        merge_labels(rows, annotations)
    assert merge_labels(rows, annotations, ignore_unknown_ids=True)["blur_quality"] == [0]


def test_null_says_nothing(tmp_path: Path) -> None:
    rows = [{"id": "a", "physics_quality": None, "blur_quality": "good"}, {"source_id": "b", "blur_quality": 0}]
    assert read_annotations(write(tmp_path / "l.json", rows)) == {"a": {"blur_quality": 1}, "b": {"blur_quality": 0}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row has a value for any of the labels"),
        ([{"id": "a", "blur": 1}], "no row has a value for any of the labels"),
        ([{"id": "a", "blur_quality": None}], "no row has a value for any of the labels"),
        ([{"blur_quality": 1}], "row 1: `id` is missing"),
        (
            [{"id": "a", "blur_quality": 1}, {"id": "a", "blur_quality": 0}],
            "row 2: `id` 'a' is already annotated by .*row 1, with other labels",
        ),
        (
            [{"id": "a", "blur_quality": 1}, {"id": "a", "blur_quality": 1, "human_quality": 1}],
            "row 2: `id` 'a' is already annotated by .*row 1, with other labels",
        ),
        ([{"id": "a", "blur_quality": "nice"}], "row 1: `blur_quality` must be 1, 0"),
        ([{"id": "a", "motion_quality": 1}], "row 1: `motion_quality` is derived"),
    ],
)
def test_broken_annotations(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match="l.json.*" + message):
        read_annotations(write(tmp_path / "l.json", rows))


def test_counts() -> None:
    columns: dict[str, list[int | None]] = {name: [1, 0, None] for name in LABELS}
    assert count_labels(columns)["motion_quality"] == {"good": 1, "poor": 1, "missing": 1}


def test_the_same_row_several_times_is_one_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": "a", "blur_quality": 1}, {"id": "b", "blur_quality": 0}, {"source_id": "a", "blur_quality": "good"}]
    assert read_annotations(write(tmp_path / "a.json", rows)) == {"a": {"blur_quality": 1}, "b": {"blur_quality": 0}}
    assert "a.json: 1 of 3 rows repeat an earlier one and are left out" in caplog.text
