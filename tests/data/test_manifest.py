"""Manifests: every format and field, and every way in which one can be broken."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hy_prfl.data.manifest import read_manifest


ROWS: list[dict[str, Any]] = [
    {"id": "a", "video": "a.mp4", "caption": "a circle", "physics_quality": 1, "pair_id": "p", "rejected_id": "b"},
    {"id": "b", "video": "b.mp4", "caption": "a square, red", "physics_quality": "poor", "pair_id": "p"},
]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_all_formats(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    write_json(folder / "m.json", rows)
    (folder / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    with open(folder / "m.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return [folder / "m.json", folder / "m.jsonl", folder / "m.csv"]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_formats_agree(tmp_path: Path, index: int) -> None:
    first, second = read_manifest(write_all_formats(tmp_path, ROWS)[index])
    assert (first.id, first.video, first.prompt) == ("a", tmp_path / "a.mp4", "a circle")
    assert (first.pair_id, first.rejected_id, first.labels["physics_quality"]) == ("p", "b", 1)
    assert (second.prompt, second.rejected_id, second.labels["physics_quality"]) == ("a square, red", None, 0)
    assert second.labels.get("blur_quality") is None


def test_upstreams_shape(tmp_path: Path) -> None:
    row = {"source_id": "0004e6", "video_path": "/data/0004e6.mp4", "short_caption": "Short.", "long_caption": "Long."}
    labels = {"text_alignment": 1, "blur_quality": 0, "physics_quality": None, "human_quality": "good"}
    (parsed,) = read_manifest(write_json(tmp_path / "temp_input_data.json", [row | labels]))
    assert (parsed.id, parsed.video) == ("0004e6", Path("/data/0004e6.mp4"))
    assert (parsed.prompt, parsed.long_prompt) == ("Short.", "Long.")
    assert parsed.labels == {"text_alignment": 1, "blur_quality": 0, "physics_quality": None, "human_quality": 1}


def test_defaults(tmp_path: Path) -> None:
    rows = [{"video": "x/clip_1.mp4", "prompt": "a circle"}, {"video": "clip_2.mp4", "long_caption": "only long"}]
    first, second = read_manifest(write_json(tmp_path / "m.json", rows))
    assert (first.id, first.labels, first.pair_id, first.long_prompt) == ("clip_1", {}, None, None)
    assert (second.prompt, second.long_prompt) == ("only long", None)


def test_clip_without_a_caption_is_no_broken_manifest(tmp_path: Path) -> None:
    (row,) = read_manifest(write_json(tmp_path / "m.json", [{"video": "a.mp4", "caption": " "}]))
    assert row.prompt == ""


def test_prompts_need_no_video(tmp_path: Path) -> None:
    rows = [{"prompt": "a circle"}, {"prompt": "a square", "image": "first.png"}]
    path = write_json(tmp_path / "m.json", rows)
    first, second = read_manifest(path, require_video=False)
    assert (first.id, first.files) == ("prompt_000000", [])
    assert (second.id, second.image, second.video) == ("first", tmp_path / "first.png", None)
    with pytest.raises(ValueError, match="m.json, row 1: `video` is missing"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ({"id": "a"}, "expected a JSON list of rows, got a dict"),
        (["a.mp4"], "row 1: expected a mapping"),
        ([ROWS[1], ROWS[1] | {"caption": "y"}], "row 2: `id` 'b' is already taken by .*row 1.*`prompt`"),
        ([ROWS[1], ROWS[1] | {"human_quality": 1}], "row 2: `id` 'b' is already taken by .*row 1.*`labels`"),
        ([{"video": "x/a.mp4", "caption": "x"}, {"video": "y/a.mp4", "caption": "y"}], "row 2: `id` 'a' is already"),
        ([ROWS[0]], "row 1: `rejected_id` 'b' is not the id of another row"),
        ([ROWS[1] | {"rejected_id": "b"}], "`rejected_id` 'b' is not the id of another row"),
        ([ROWS[1], ROWS[0] | {"physics_quality": "great"}], "row 2: `physics_quality` must be 1, 0, .* got 'great'"),
        ([ROWS[1] | {"human_quality": 2}], "row 1: `human_quality` must be"),
        ([{"id": "a", "caption": "x"}], "row 1: `video` is missing"),
        ([ROWS[1] | {"caption": ["x"]}], r"row 1: `caption` must be text, got \['x'\]"),
        ([ROWS[1] | {"video": 1.5}], "row 1: `video` must be text"),
        ([ROWS[1] | {"prompt": "other"}], "row 1: `caption` and `prompt` mean the same but differ"),
    ],
)
def test_broken_manifests_name_file_row_and_field(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match="m.json.*" + message):
        read_manifest(write_json(tmp_path / "m.json", rows))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "[{]", "m.json: not valid JSON"),
        ("m.jsonl", '{"video": "a.mp4"}\n{', "m.jsonl, line 2: not valid JSON"),
        ("m.jsonl", "[1]", "m.jsonl, line 1: expected a mapping"),
        ("m.csv", "video,caption\na.mp4,x,y\n", "m.csv, line 2: expected 2 values"),
        ("m.csv", "video,caption\na.mp4\n", "m.csv, line 2: expected 2 values"),
        ("m.csv", 'video,caption\na.mp4,"x\n', "m.csv.*not valid CSV"),
        ("m.csv", "", "has no rows"),
        ("m.txt", "a.mp4", "expected a .json, .jsonl or .csv file"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / name)


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes('[{"video": "ä.mp4"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match="m.json: not UTF-8"):
        read_manifest(tmp_path / "m.json")


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="m.json"):
        read_manifest(tmp_path / "m.json")


def test_byte_order_mark_of_spreadsheets(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,video,caption\na,a.mp4,x\n", encoding="utf-8-sig")
    assert read_manifest(tmp_path / "m.csv")[0].id == "a"


def test_unknown_fields_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_manifest(write_json(tmp_path / "m.json", [ROWS[1] | {"text_aligment": 1}]))
    assert "text_aligment" in caplog.text


def test_the_same_row_several_times_is_one_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    respelt = {
        "source_id": "b",
        "video_path": "./b.mp4",
        "text": " a square, red",
        "physics_quality": 0,
        "pair_id": "p",
    }
    rows = [ROWS[1], ROWS[0], ROWS[1], respelt | {"human_quality": None}]
    assert [row.id for row in read_manifest(write_json(tmp_path / "m.json", rows))] == ["b", "a"]
    assert "m.json: 2 of 4 rows repeat an earlier one and are left out" in caplog.text


def test_files_are_looked_up_from_the_working_directory_and_then_beside_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Upstream's lists name files from the folder that it runs in."""
    here, beside = tmp_path / "here", tmp_path / "here" / "temp_data"
    rows = [
        {"source_id": "a", "video_path": "temp_data/videos/a.mp4", "image_path": "ref/a.png", "short_caption": "x"},
        {"source_id": "b", "video_path": "videos/b.mp4", "short_caption": "x"},
        {"source_id": "c", "video_path": "videos/c.mp4", "short_caption": "x"},
        {"source_id": "d", "video_path": "videos/d.mp4", "short_caption": "x"},
        {"source_id": "e", "video_path": "/videos/e.mp4", "short_caption": "x"},
    ]
    for path in (
        "temp_data/videos/a.mp4",
        "temp_data/videos/b.mp4",
        "temp_data/videos/d.mp4",
        "videos/d.mp4",
        "ref/a.png",
    ):
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).touch()
    write_json(beside / "temp_input_data.json", rows)
    monkeypatch.chdir(here)
    a, b, c, d, e = read_manifest("temp_data/temp_input_data.json")
    assert (a.video, a.image, a.missing) == (Path("temp_data/videos/a.mp4"), Path("ref/a.png"), {})
    assert b.video == Path("temp_data/videos/b.mp4")
    assert c.video is not None
    places = f"'{here}/videos/c.mp4' nor '{beside}/videos/c.mp4'"
    assert c.missing == {c.video: f"there is neither {places}"}
    assert d.video == Path("videos/d.mp4")
    assert f"'videos/d.mp4' is both in '{here}', which is used, and in '{beside}'" in caplog.text
    assert e.missing == {Path("/videos/e.mp4"): "there is no file '/videos/e.mp4'"}
    # One place, and one name for it.
    monkeypatch.chdir(beside)
    c = read_manifest("temp_input_data.json")[2]
    assert list(c.missing.values()) == [f"there is no file '{beside}/videos/c.mp4'"]
    assert caplog.text.count("which is used") == 1
