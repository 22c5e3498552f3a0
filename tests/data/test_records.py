"""Lists as people, spreadsheets and pandas write them: one reader for manifests, annotations and prompts."""

import io
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hy_prfl.data.annotations import read_annotations
from hy_prfl.data.manifest import read_manifest
from hy_prfl.data.prompts import read_prompts
from hy_prfl.data.records import read_records, read_whole_number


FIELDS = {"id": ("id",), "video": ("video", "file_name"), "caption": ("caption", "text"), "seed": ("seed",)}
# What one row says, whatever reads it.
READERS: dict[str, Callable[[Path], Any]] = {
    "manifest": lambda path: [(row.id, row.prompt) for row in read_manifest(path, require_video=False)],
    "prompts": lambda path: [(row.id, row.caption) for row in read_prompts(path)],
}
VALUES = [("a", "a cat, black; very"), ("b", 'says "hi"\nand goes')]
TEXTS = {
    "comma": 'id,caption\na,"a cat, black; very"\nb,"says ""hi""\nand goes"\n',
    "comma and blank": 'id, caption\na, "a cat, black; very"\nb, "says ""hi""\nand goes"\n',
    "semicolon": 'id;caption\na;"a cat, black; very"\nb;"says ""hi""\nand goes"\n',
    "tab": 'id\tcaption\na\ta cat, black; very\nb\t"says ""hi""\nand goes"\n',
    "bar": 'id|caption\na|a cat, black; very\nb|"says ""hi""\nand goes"\n',
    "capitals and blanks": ' ID , Caption \na , "a cat, black; very"\nb,"says ""hi""\nand goes"\n',
    "excel": 'sep=;\nid;caption\na;"a cat, black; very"\nb;"says ""hi""\nand goes"\n;\n;\n',
    "blank lines": '\n\nid,caption\n\na,"a cat, black; very"\n\nb,"says ""hi""\nand goes"\n\n',
    "column without a name": 'id,caption,\na,"a cat, black; very",\nb,"says ""hi""\nand goes",\n',
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_every_spelling_of_csv_says_the_same(tmp_path: Path, text: str, encoding: str, ends: str, reader: str) -> None:
    (tmp_path / "rows.csv").write_bytes(text.replace("\n", ends).encode(encoding))
    assert READERS[reader](tmp_path / "rows.csv") == VALUES


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_what_pandas_writes_and_reads(tmp_path: Path, separator: str) -> None:
    frame = pd.DataFrame(
        {"file_name": ["x/a.mp4", "b.mp4"], "text": ["one, two; three", np.nan], "seed": [3, np.nan], "long_caption": [np.nan, "long"]}
    )  # fmt: skip
    frame.to_csv(tmp_path / "m.csv", sep=separator, index=False)
    first, second = read_manifest(tmp_path / "m.csv")
    assert (first.id, first.video, first.prompt) == ("a", tmp_path / "x" / "a.mp4", "one, two; three")
    assert (first.long_prompt, second.prompt, second.long_prompt) == (None, "long", None)
    frame[["text", "seed"]].fillna({"text": "second"}).to_csv(tmp_path / "p.csv", sep=separator, index=False)
    assert [(row.caption, row.seed) for row in read_prompts(tmp_path / "p.csv", seed=9)] == [
        ("one, two; three", 3), ("second", 9),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["video", "video_path", "file_name", "file_path", "path", "File Name", " Path "])
@pytest.mark.parametrize("caption", ["caption", "prompt", "text", "Text", "short-caption"])
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_names_of_other_trainers(tmp_path: Path, name: str, caption: str, suffix: str) -> None:
    row = {name: "x/a.mp4", caption: "a cat"}
    text = {
        "csv": f"{name};{caption}\nx/a.mp4;a cat\n", "json": json.dumps([row]), "jsonl": json.dumps(row) + "\n\n",
    }[suffix]  # fmt: skip
    (tmp_path / f"m.{suffix}").write_text(text)
    (parsed,) = read_manifest(tmp_path / f"m.{suffix}")
    assert (parsed.id, parsed.video, parsed.prompt) == ("a", tmp_path / "x" / "a.mp4", "a cat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip;beschreibung\na.mp4;x\n", r"none of its columns is known\. Columns found: clip, beschreibung\. .* video \(vi"),
        ("a.mp4,x\nb.mp4,y\n", r"none of its columns is known\. Columns found: a\.mp4, x\."),
        ("clip,description\n", r"none of its columns is known\. Columns found: clip, description\."),
        ("video,description\na.mp4,x\n", r"there is no column `caption`\. Columns found: video, description\."),
        ("clip,caption\na.mp4,x\n", r"line 2: `video` is missing\. Columns found: clip, caption\. .*video \(video_path, f"),
        ("video,file_name,caption\na.mp4,a.mp4,x\n", "line 1: `video` and `file_name` mean the same; keep one"),
        ("video,caption,Caption \na.mp4,x,y\n", "line 1: the column `caption` appears twice"),
        ("video,caption\na.mp4,x\nb.mp4,x, y\n", r"line 3: expected 2 values, .* got 3: \['b.mp4', 'x', 'y'\]"),
        ("video;caption\na.mp4\n", r"line 2: expected 2 values, as the header has, got 1: \['a.mp4'\]"),
        ('video,caption\na.mp4,"x\ny"\nb.mp4\n', "line 4: expected 2 values"),
        ('video,caption\na.mp4,x\nb.mp4,"x\ny\n', "line 3: not valid CSV"),
        ("video,caption,\na.mp4,x,\nb.mp4,x,z\n", "line 3: the column with 'z' has no name in the header"),
        ("", "has no rows"),
        ("video,caption\n,\n", "has no rows"),
        ('"video,caption\na.mp4,x\n', "line 1: not valid CSV"),
    ],
)  # fmt: skip
def test_broken_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"m\.csv.*{message}"):
        read_manifest(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", '{"data": [{"video": "a.mp4"}], "version": 1}', "expected a JSON list of rows, got a dict with `data`, `v"),
        ("m.json", '{"video": "a.mp4"}\n{"video": "b.mp4"}\n', r"not valid JSON: Extra data.*Is it JSON Lines\?"),
        ("m.json", '[{"video": "a.mp4", "caption": "x", "caption": "y"}]', "`caption` appears twice in one object"),
        ("m.json", '[{"video": "a.mp4", "caption": "x", "Caption": "y"}]', "row 1: the column `caption` appears twice"),
        ("m.json", '[{"video": "a", "path": "a", "text": "x"}]', "row 1: `video` and `path` mean the same; keep one"),
        ("m.jsonl", '{"video": "a.mp4", "caption": "x"}\n\n["b.mp4"]', "line 3: expected a mapping"),
        ("m.jsonl", '{"clip": "a.mp4"}', "none of its columns is known. Columns found: clip"),
    ],
)  # fmt: skip
def test_broken_json(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_manifest(tmp_path / name)


def workbook() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "txt"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("caption\na café\n".encode("latin-1"), r"not UTF-8 text: line 2 has the byte 0xe9, read as Latin-1 'a café'"),
        (b"\xef\xbb\xbf" + "caption\nx\na café\n".encode("latin-1"), "line 3 has the byte 0xe9"),
        ("caption\r\na café\r\n".encode("cp1252"), "line 2 has the byte 0xe9"),
        ("caption\na cat\n".encode("utf-16"), "UTF-16"),
        ("caption\na cat\n".encode("utf-16-le"), "UTF-16"),
        (workbook(), "this is an Excel workbook"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "this is an old Excel workbook"),
    ],
)
def test_what_is_no_utf8_text(tmp_path: Path, suffix: str, data: bytes, message: str) -> None:
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"p\.{suffix}: .*{message}"):
        read_prompts(path)


PLACEHOLDERS = ["nan", "NaN", "None", "NULL", "null", "N/A", "n/a", "<NA>", "#N/A"]


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_placeholders_are_no_captions(tmp_path: Path, placeholder: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.csv"
    path.write_text(
        f"video,caption,long_caption,pair_id\na.mp4,{placeholder},{placeholder},{placeholder}\nb.mp4,x,y,p\n"
    )
    with caplog.at_level(logging.WARNING):
        first, second = read_manifest(path)
    assert (first.prompt, first.long_prompt, first.pair_id) == ("", None, None)
    assert (second.prompt, second.long_prompt, second.pair_id) == ("x", "y", "p")
    assert f"`caption` is '{placeholder}' in 1 row(s), which counts as missing" in caplog.text
    for name, text, where in (
        ("p.csv", f"caption\nx\n{placeholder}\n", "line 3"), ("p.txt", f"x\n{placeholder}\n", "line 2"),
        ("p.json", json.dumps([{"caption": "x"}, {"caption": placeholder}]), "row 2"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}, {where}: `caption` is missing"):
            read_prompts(tmp_path / name)
    (tmp_path / "l.csv").write_text(f"ID;Physics Quality\na;{placeholder}\nb;True\nc;1.0\nd;poor\n")
    assert read_annotations(tmp_path / "l.csv") == {
        "a": {}, "b": {"physics_quality": 1}, "c": {"physics_quality": 1}, "d": {"physics_quality": 0},
    }  # fmt: skip


def test_nan_of_json_and_words_that_only_begin_so(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('[{"caption": "nan bread", "seed": NaN, "image": null}]')
    (prompt,) = read_prompts(tmp_path / "p.json", seed=4)
    assert (prompt.caption, prompt.seed, prompt.image) == ("nan bread", 4, None)
    (tmp_path / "p.json").write_text('[{"caption": NaN}]')
    with pytest.raises(ValueError, match="row 1: `caption` is missing"):
        read_prompts(tmp_path / "p.json")


@pytest.mark.parametrize("placeholder", ["NA", " NA ", "#NA", "NaT", "-nan", "#N/A N/A"])
@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_missing_values_of_tables(
    tmp_path: Path, placeholder: str, suffix: str, separator: str, caplog: pytest.LogCaptureFixture
) -> None:
    """R's and pandas' words, in tables only: these programs write null into JSON, and there `NA` is a text."""
    path = tmp_path / f"m.{suffix}"
    rows = [("video", "caption", "pair_id"), ("a.mp4", placeholder, placeholder), ("b.mp4", "y", "p")]
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        first, second = read_manifest(path)
    assert (first.prompt, first.pair_id, second.prompt, second.pair_id) == ("", None, "y", "p")
    assert f"`caption` is '{placeholder.strip()}' in 1 row(s), which counts as missing" in caplog.text
    path.write_text(f"id{separator}blur_quality\na{separator}{placeholder}\nb{separator}1\n")
    assert read_annotations(path) == {"a": {}, "b": {"blur_quality": 1}}
    path.write_text(f"caption{separator}seed\nx{separator}{placeholder}\n{placeholder}{separator}1\n")
    with pytest.raises(ValueError, match=r"line 3: `caption` is missing"):
        read_prompts(path)


def test_na_is_a_text_elsewhere(tmp_path: Path) -> None:
    for name, text in (
        ("p.json", '[{"caption": "NA"}]'), ("p.jsonl", '{"caption": "NA"}'), ("p.txt", "NA\n"), ("p.csv", "caption\nna\n"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        assert [prompt.caption.upper() for prompt in read_prompts(tmp_path / name)] == ["NA"]


@pytest.mark.parametrize("name", ["id", "video", "caption", "long_caption", "pair_id", "rejected_id"])
@pytest.mark.parametrize(("text", "what"), [("z\ud800", "ud800"), ("\udc00\ud800 x", "udc00"), ("a\0b", "x00")])
def test_texts_that_cannot_be_written(tmp_path: Path, name: str, text: str, what: str) -> None:
    row = {"video": "a.mp4", "caption": "x"} | {name: text}
    for file, content, where in (
        ("m.json", json.dumps([{"video": "b.mp4", "caption": "y"}, row]), "row 2"),
        ("m.jsonl", json.dumps({"video": "b.mp4", "caption": "y"}) + "\n" + json.dumps(row), "line 2"),
    ):
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=rf"{file}, {where}: `{name}` .*{what}") as error:
            read_manifest(tmp_path / file)
        assert str(error.value).isascii()
    if name in ("id", "caption"):
        for reader in (read_prompts, read_annotations)[: 1 if name == "caption" else 2]:
            (tmp_path / "p.json").write_text(json.dumps([{"caption": "x", "blur_quality": 1} | {name: text}]))
            if reader is read_prompts:
                (tmp_path / "p.json").write_text(json.dumps([{"caption": "x"} | {name: text}]))
            with pytest.raises(ValueError, match=rf"p.json, row 1: `{name}` .*{what}"):
                reader(tmp_path / "p.json")


def test_pairs_of_surrogates_are_one_character(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('[{"caption": "a \\ud83d\\ude00"}]')
    assert read_prompts(tmp_path / "p.json")[0].caption == "a \U0001f600"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "[" * 100_000, r"m\.json: not valid JSON: nested too deeply"),
        ("m.json", '[{"caption": ' + "[" * 100_000 + "]" * 100_000 + "}]", r"m\.json: not valid JSON: nested too deeply"),
        ("m.jsonl", '{"caption": "x"}\n' + '{"a":' * 100_000, r"m\.jsonl, line 2: not valid JSON: nested too deeply"),
        ("m.json", "{}", r"m\.json: expected a JSON list of rows, got an empty dict\."),
        ("m.jsonl", '{"a": 1} {"b": 2}', r"line 1: not valid JSON: Extra data: .*A line holds one object and nothing else"),
        ("m.jsonl", '{"a": 1},\n{"b": 2}', r"line 1: not valid JSON: Extra data: .*A line holds one object and nothing else"),
        ("m.jsonl", '[\n{"a": 1}\n]', r"line 1: not valid JSON: .*A line holds one object and nothing else"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_json(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    for reader in (read_manifest, read_prompts, read_annotations):
        with pytest.raises(ValueError, match=message):
            reader(tmp_path / name)


def test_labels_name_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("id;blur_quality\na;1\nb;yes\n")
    with pytest.raises(ValueError, match=r"l\.csv, line 3: `blur_quality` must be 1, 0, .*got 'yes'"):
        read_annotations(tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text("file_name;blur_quality\na;1\n")
    with pytest.raises(
        ValueError, match=r"line 2: `id` is missing\. Columns found: file_name, blur_quality\. .*id \(source"
    ):
        read_annotations(tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text("id;blur\na;1\n")
    with pytest.raises(
        ValueError, match=r"no row has a value .*Columns found: id, blur\. Columns wanted: id .*blur_qual"
    ):
        read_annotations(tmp_path / "l.csv")


@pytest.mark.parametrize("value", [7, 7.0, "7", " 7 ", "7.0", "7.", "+7", "7e0"])
def test_whole_numbers(value: Any) -> None:
    assert read_whole_number({"seed": value}, "seed", "row 1") == 7


def test_the_largest_seed_keeps_its_digits() -> None:
    assert read_whole_number({"seed": str(10**18 - 1)}, "seed", "row 1") == 10**18 - 1
    assert read_whole_number({"seed": "1E+05"}, "seed", "row 1") == 100_000
    assert all(read_whole_number({"seed": value}, "seed", "row 1") is None for value in (None, "", " ", "nan"))


@pytest.mark.parametrize(
    "value",
    [1.5, "1.5", -1, "-1", -1.0, "-1.0", 10**18, str(10**18), 1e17, "1e17", "9" * 5000, "one", True, [1], "1_0", "0x10", "1,0",
     float("inf"), "inf"],
)  # fmt: skip
def test_no_seeds(value: Any) -> None:
    with pytest.raises(ValueError, match=r"row 1: `seed` must be a whole number from 0 to 10\^18 - 1, got"):
        read_whole_number({"seed": value}, "seed", "row 1")


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("value", ["1.0", "1", "1.5", "-1"])
def test_seeds_in_files(tmp_path: Path, suffix: str, value: str) -> None:
    path = tmp_path / f"p.{suffix}"
    path.write_text(f"caption;seed\nx;{value}\n" if suffix == "csv" else f'[{{"caption": "x", "seed": {value}}}]')
    if float(value) == 1:
        assert read_prompts(path)[0].seed == 1
    else:
        with pytest.raises(ValueError, match=rf"p\.{suffix}, .*: `seed` must be a whole number .*{value}"):
            read_prompts(path)


def test_other_files(tmp_path: Path) -> None:
    for name in ("m.xlsx", "m.parquet", "m"):
        (tmp_path / name).write_text("id\n")
        with pytest.raises(ValueError, match=rf"{name}: expected a \.json, \.jsonl or \.csv file"):
            read_records(tmp_path / name, FIELDS)
    (tmp_path / "m.tsv").write_text("id\tcaption\na\tx\n")
    assert read_records(tmp_path / "m.tsv", FIELDS) == [(f"{tmp_path / 'm.tsv'}, line 2", {"id": "a", "caption": "x"})]
