"""The command itself: what it writes is what `label` and `preprocess` read, and nothing is lost when it is killed."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hy_prfl.data.annotations import read_annotations
from hy_prfl.data.manifest import read_manifest
from hy_prfl.scripts.annotate import main


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Manifest of 8 videos in 4 pairs; one has a label, one a long caption."""
    folder = tmp_path_factory.mktemp("videos")
    rows: list[dict[str, Any]] = []
    for index in range(8):
        write_video(folder / f"{index}.mp4", seed=index)
        rows.append(
            {"id": f"c{index}", "video": f"{index}.mp4", "caption": f"{index // 2}", "pair_id": f"p{index // 2}"}
        )
    rows[0] |= {"blur_quality": "good", "physics_quality": 0}
    rows[1] |= {"long_caption": "one, at length"}
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder / "manifest.json"


def write_journal(
    output: Path, labels: list[tuple[str, str, dict[str, str]]], kind: str, questions: list[str]
) -> None:
    """A journal of these labels (annotator, item, answers), as if the page had written it."""
    head = {"type": "study", "format": 1, "kind": kind, "questions": questions, "secret": "00" * 16, "time": ""}
    lines = [head]
    for number, (annotator, item, answers) in enumerate(labels):
        event = {"type": "label", "item": item, "annotator": annotator, "answers": answers, "seconds": 4.0}
        lines.append({**event, "key": str(number), "time": "2026-01-01T10:00:00.000+00:00"})
    output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{output}.journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


TASKS = ["physics_quality", "human_quality"]


def studio(**values: Any) -> dict[str, Any]:
    """An annotation of Label Studio's export that answers both tasks."""
    results = [{"from_name": task, "value": {"choices": ["good"]}} for task in TASKS]
    return {"completed_by": 1, "created_at": "2026-01-01T10:00:00Z", "result": results} | values


def both(physics: str, human: str) -> dict[str, str]:
    return {"physics_quality": physics, "human_quality": human}


def test_what_is_written_is_what_others_read(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "labels.json"
    labels = [
        ("ann", "c0", both("good", "poor")), ("bob", "c0", both("poor", "poor")), ("cem", "c0", both("good", "unsure")),
        ("ann", "c1", both("good", "good")), ("bob", "c1", both("poor", "unsure")),
        ("ann", "c2", both("unsure", "good")),
        ("ann", "c3", both("poor", "poor")), ("bob", "c3", both("poor", "poor")),
    ]  # fmt: skip
    write_journal(output, labels, "clips", TASKS)
    options = ["--manifest", str(manifest), "--output", str(output), "--labels_per_clip", "3", "--serve", "false"]
    main(options)
    annotations = read_annotations(output)
    assert annotations["c0"] == {"physics_quality": 1, "human_quality": 0, "blur_quality": 1}
    assert annotations["c1"] == {"human_quality": 1}
    assert annotations["c2"] == {"human_quality": 1}
    assert annotations["c3"] == {"physics_quality": 0, "human_quality": 0}
    assert annotations["c4"] == {}
    rows = read_manifest(output)
    original = read_manifest(manifest)
    assert [row.id for row in rows] == [row.id for row in original]
    for row, other in zip(rows, original, strict=True):
        assert row.video.resolve() == other.video.resolve()
        assert (row.prompt, row.long_prompt, row.pair_id) == (other.prompt, other.long_prompt, other.pair_id)
    summary = json.loads(Path(f"{output}.summary.json").read_text())
    physics = summary["questions"]["physics_quality"]
    assert physics["votes"] == {"good": 1, "poor": 1}
    assert physics["undecided"] == 1
    # Pairs of answers that agree: 1 of 3, 0 of 1, 1 of 1.
    assert physics["agreement"]["percent"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert summary["annotators"]["ann"] == {
        "labels": 4, "skipped": 0, "median_seconds": 4.0, "gold": None, "counts": True
    }  # fmt: skip
    # Unanimity, and two votes at least.
    main([*options, "--vote", "unanimous", "--min_votes", "2"])
    annotations = read_annotations(output)
    assert annotations["c0"] == {"human_quality": 0, "blur_quality": 1}
    assert annotations["c1"] == annotations["c2"] == {}


@pytest.mark.parametrize("answers", [[], ["good"], ["good", "poor"], ["unsure", "unsure"]])
def test_an_old_label_does_not_stand_in_for_votes(manifest: Path, tmp_path: Path, answers: list[str]) -> None:
    """What is asked has the label that people give, or none; what is not asked keeps the manifest's."""
    output = tmp_path / "labels.json"
    labels = [(f"person {index}", "c0", {"physics_quality": answer}) for index, answer in enumerate(answers)]
    write_journal(output, labels, "clips", ["physics_quality"])
    main(
        ["--manifest", str(manifest), "--output", str(output), "--tasks", "physics_quality", "--labels_per_clip", "2",
         "--min_votes", "2", "--serve", "false"]
    )  # fmt: skip
    assert read_annotations(output)["c0"] == {"blur_quality": 1}


@pytest.mark.parametrize("answers", [[], ["tie"], ["first", "second"]])
def test_an_old_preference_does_not_stand_in_for_votes(manifest: Path, tmp_path: Path, answers: list[str]) -> None:
    rows = json.loads(manifest.read_text())
    rows[0]["rejected_id"] = "c1"
    for row in rows:
        row["video"] = str(manifest.parent / row["video"])
    rows[6] |= {"pair_id": None, "rejected_id": "c7"}
    rows[7] |= {"pair_id": None}
    (tmp_path / "manifest.json").write_text(json.dumps(rows))
    output = tmp_path / "pairs.json"
    labels = [(f"person {index}", "p0", {"preference": answer}) for index, answer in enumerate(answers)]
    write_journal(output, labels, "pairs", ["preference"])
    main(
        ["--manifest", str(tmp_path / "manifest.json"), "--output", str(output), "--mode", "pairs", "--serve", "false"]
    )
    assert {row.id: row.rejected_id for row in read_manifest(output) if row.rejected_id} == {"c6": "c7"}


def test_gold_measures_people(manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output, gold = tmp_path / "labels.json", tmp_path / "gold.json"
    gold.write_text(json.dumps([{"id": "c0", "physics_quality": 1}, {"id": "c1", "physics_quality": 0}]))
    labels = [("ann", "c0", {"physics_quality": "good"}), ("ann", "c1", {"physics_quality": "poor"})]
    labels += [("bob", "c0", {"physics_quality": "poor"}), ("bob", "c1", {"physics_quality": "unsure"})]
    labels += [("ann", "c5", {"physics_quality": "good"}), ("bob", "c6", {"physics_quality": "good"})]
    write_journal(output, labels, "clips", ["physics_quality"])
    main(
        ["--manifest", str(manifest), "--output", str(output), "--tasks", "physics_quality", "--gold", str(gold),
         "--min_gold_accuracy", "0.7", "--serve", "false"]
    )  # fmt: skip
    annotations = read_annotations(output)
    assert [annotations[f"c{index}"].get("physics_quality") for index in (0, 1, 5, 6)] == [1, 0, 1, None]
    people = json.loads(Path(f"{output}.summary.json").read_text())["annotators"]
    assert people["ann"]["gold"] == {"num_answers": 2, "accuracy": 1.0}
    assert people["bob"]["gold"] == {"num_answers": 2, "accuracy": 0.0}
    assert (people["ann"]["counts"], people["bob"]["counts"]) == (True, False)
    assert "bob: right about 0% of the gold answers, so the labels are not used." in caplog.text


def test_pairs_become_rejected_ids(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs.json"
    votes = {"p0": ["first"], "p1": ["second", "second", "first"], "p2": ["tie", "tie"]}
    labels = [
        (f"person {index}", item, {"preference": answer})
        for item, answers in votes.items()
        for index, answer in enumerate(answers)
    ]
    write_journal(output, labels, "pairs", ["preference"])
    main(
        ["--manifest", str(manifest), "--output", str(output), "--mode", "pairs", "--labels_per_clip", "3",
         "--serve", "false"]
    )  # fmt: skip
    rejected = {row.id: row.rejected_id for row in read_manifest(output) if row.rejected_id is not None}
    assert rejected == {"c0": "c1", "c3": "c2"}


def test_a_pair_has_one_caption(manifest: Path, tmp_path: Path) -> None:
    rows = [row | {"video": str(manifest.parent / row["video"])} for row in json.loads(manifest.read_text())]
    for row in rows:
        row["caption"] = "the same"
    rows[3]["caption"] = "another"
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(rows))
    words = "row 4: the caption of 'c3' is 'another', but that of 'c2', of the same `pair_id` 'p1', is 'the same'"
    with pytest.raises(ValueError, match=words):
        main(["--manifest", str(path), "--output", str(tmp_path / "labels.json"), "--mode", "pairs"])


def test_gold_measures_people_on_pairs(manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output, gold = tmp_path / "pairs.json", tmp_path / "gold.csv"
    # Of p0 the first clip is better, of p1 the second. What a file of this command has besides does no harm.
    gold.write_text("id,pair_id,rejected_id\nc0,p0,c1\nc1,p0,\nc3,p1,c2\n")
    votes = {
        "ann": {"p0": "first", "p1": "second", "p2": "first"},
        "bob": {"p0": "second", "p1": "tie", "p3": "first"},
    }
    labels = [(name, item, {"preference": answer}) for name, mine in votes.items() for item, answer in mine.items()]
    write_journal(output, labels, "pairs", ["preference"])
    main(
        ["--manifest", str(manifest), "--output", str(output), "--mode", "pairs", "--gold", str(gold),
         "--min_gold_accuracy", "0.7", "--serve", "false"]
    )  # fmt: skip
    # The right answers of gold pairs, whatever people said, and the votes of those who know them.
    rejected = {row.id: row.rejected_id for row in read_manifest(output) if row.rejected_id is not None}
    assert rejected == {"c0": "c1", "c3": "c2", "c4": "c5"}
    summary = json.loads(Path(f"{output}.summary.json").read_text())
    assert summary["annotators"]["ann"]["gold"] == {"num_answers": 2, "accuracy": 1.0}
    assert summary["annotators"]["bob"]["gold"] == {"num_answers": 2, "accuracy": 0.0}
    assert summary["questions"]["preference"]["votes"] == {"first": 1}
    assert "bob: right about 0% of the gold answers, so the labels are not used." in caplog.text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["c0,c2"], "gold.csv, line 2: 'c0' and `rejected_id` 'c2' are not a pair of the manifest"),
        (["zz,c0"], "gold.csv, line 2: 'zz' and `rejected_id` 'c0' are not a pair of the manifest"),
        (["c0,c1", "c1,c0"], "gold.csv, line 3: `rejected_id` says that 'c1' is better than 'c0', but an earlier row says "),
        ([",c1"], "gold.csv, line 2: `id` is missing"),
        (["c0,"], "gold.csv: no row has a `rejected_id`, the id of the worse clip of a pair"),
    ],
)  # fmt: skip
def test_gold_that_fits_no_pair(manifest: Path, tmp_path: Path, rows: list[str], words: str) -> None:
    gold = tmp_path / "gold.csv"
    gold.write_text("\n".join(["id,rejected_id", *rows]) + "\n")
    options = ["--manifest", str(manifest), "--output", str(tmp_path / "pairs.json"), "--mode", "pairs"]
    with pytest.raises(ValueError, match=words):
        main([*options, "--gold", str(gold), "--serve", "false"])


@pytest.mark.parametrize("kind", ["clips", "pairs"])
def test_label_studio_both_ways(manifest: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    output, exported = tmp_path / "labels.json", tmp_path / "studio.json"
    if kind == "clips":
        labels = [("ann", "c0", both("good", "poor")), ("bob", "c0", both("poor", "unsure"))]
        write_journal(output, labels, kind, TASKS)
    else:
        labels = [("ann", "p0", {"preference": "first"}), ("bob", "p1", {"preference": "tie"})]
        write_journal(output, labels, kind, ["preference"])
    options = ["--manifest", str(manifest), "--mode", kind, "--labels_per_clip", "2", "--serve", "false"]
    main([*options, "--output", str(output), "--export_label_studio", str(exported)])
    tasks = json.loads(exported.read_text())
    assert len(tasks) == (8 if kind == "clips" else 4)
    assert sum(len(task["annotations"]) for task in tasks) == 2
    # What comes back from Label Studio has more in it, people by number, and cancelled annotations.
    first = next(task for task in tasks if task["annotations"])
    first["annotations"].append({**first["annotations"][0], "completed_by": 7, "was_cancelled": True})
    exported.write_text(json.dumps(tasks))
    again = tmp_path / "again.json"
    for added in (2, 0):
        main([*options, "--output", str(again), "--import_label_studio", str(exported)])
        assert f"{added} annotations added, {2 - added} were there" in capsys.readouterr().out
    assert again.read_bytes() == output.read_bytes()
    events = [json.loads(line) for line in Path(f"{again}.journal.jsonl").read_text().splitlines()[1:]]
    found = {(event["annotator"], event["item"]): event["answers"] for event in events}
    assert found == {(annotator, item): answers for annotator, item, answers in labels}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"id": "zz"}}, "task 1: `data.id` 'zz' is not a clip or pair of the input"),
        ({"data": None}, "task 1: there is no `data`"),
        ({"annotations": [{"completed_by": 1, "result": []}]}, "annotation 1: there is no answer to physics_quality"),
        (
            {"annotations": [{"result": [{"from_name": "physics_quality", "value": {"choices": ["great"]}}]}]},
            "`physics_quality` is 'great', expected one of good, poor, unsure",
        ),
        ({"annotations": None}, "task 1: `annotations` must be a list, got None"),
        ({"annotations": [None]}, "annotation 1: expected an object, got None"),
        ({"annotations": [{"result": None}]}, "annotation 1: `result` must be a list, got None"),
        ({"annotations": [{"result": ["x"]}]}, "expected a `value` with `choices` or `selected`, got 'x'"),
        ({"annotations": [{"result": [{"value": None}]}]}, "expected a `value` with `choices` or `selected`"),
        ({"annotations": [{"result": [{"value": {"choices": None}}]}]}, "expected a `value` with `choices`"),
        (
            {"annotations": [{"result": [{"from_name": ["x"], "value": {"choices": ["good"]}}]}]},
            "`from_name` \\['x'\\] is none of",
        ),
        (
            {
                "annotations": [
                    {"result": [{"from_name": "physics_quality", "value": {"selected": {}, "choices": [{}]}}]}
                ]
            },
            "`physics_quality` is {}, expected one of",
        ),
        (
            {"annotations": [studio(created_at="yesterday")]},
            "`created_at` must be a time of ISO 8601, got 'yesterday'",
        ),
        ({"annotations": [studio(created_at=1700000000)]}, "`created_at` must be a time of ISO 8601, got 1700000000"),
        ({"annotations": [studio(created_at="0001-01-01T00:00:00+14:00")]}, "`created_at` must be a time"),
        ({"annotations": [studio(completed_by=None)]}, "`completed_by` must say who it is from, got None"),
        ({"annotations": [studio(completed_by={"id": []})]}, "`completed_by` must say who it is from"),
        ({"annotations": [studio(completed_by="\ud800")]}, "`completed_by` must say who it is from"),
        ({"annotations": [studio(), studio(completed_by=2, created_at="")]}, "annotation 2: `created_at` must be"),
    ],
)
def test_bad_exports_of_label_studio(manifest: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    export = tmp_path / "studio.json"
    export.write_text(json.dumps([{"data": {"id": "c0"}, "annotations": []} | change]))
    with pytest.raises(ValueError, match=words) as error:
        main(
            ["--manifest", str(manifest), "--output", str(tmp_path / "x.json"), "--serve", "false",
             "--import_label_studio", str(export)]
        )  # fmt: skip
    assert "\n" not in str(error.value)
    # The journal has its head, and nothing of the export.
    assert len((tmp_path / "x.json.journal.jsonl").read_text().splitlines()) == 1


def test_what_label_studio_skipped_is_said(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cancelled = {"was_cancelled": True, "completed_by": 2, "result": []}
    tasks = [
        {"data": {"id": "c0"}, "annotations": [studio(), cancelled]},
        {"data": {"id": "c1"}, "annotations": [cancelled]},
        {"data": {"id": "c2"}},
    ]
    export = tmp_path / "export.json"
    export.write_text(json.dumps(tasks))
    options = ["--manifest", str(manifest), "--output", str(tmp_path / "labels.json"), "--serve", "false"]
    main([*options, "--import_label_studio", str(export)])
    assert "1 annotations added, 0 were there" in capsys.readouterr().out
    assert (
        f"{export}: 2 annotations were skipped in Label Studio and are not labels: task 1, annotation 2 ('c0'); task 2, "
        "annotation 1 ('c1')."
    ) in caplog.text


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("2026-01-01T10:00:00.123456Z", "2026-01-01T10:00:00.123+00:00"),
        ("2026-01-01T12:00:00+02:00", "2026-01-01T10:00:00.000+00:00"),
        ("2026-01-01 10:00:00", "2026-01-01T10:00:00.000+00:00"),
    ],
)
def test_times_of_label_studio(manifest: Path, tmp_path: Path, written: str, kept: str) -> None:
    export, output = tmp_path / "studio.json", tmp_path / "x.json"
    export.write_text(json.dumps([{"data": {"id": "c0"}, "annotations": [studio(created_at=written)]}]))
    options = ["--manifest", str(manifest), "--output", str(output), "--serve", "false"]
    main([*options, "--import_label_studio", str(export)])
    assert json.loads(Path(f"{output}.journal.jsonl").read_text().splitlines()[1])["time"] == kept
    main(options)


def test_the_least_known_come_first(manifest: Path, tmp_path: Path) -> None:
    from hy_prfl.pages.annotation import clip_items, order_items, pair_items, read_scores

    rows = read_manifest(manifest)
    rewards = [0.9, 0.5, 0.1, 0.55, 0.2, 0.8, 0.45, None]
    other = [0.9, 0.5, 0.1, 0.55, 0.2, 0.1, 0.45, 0.5]
    paths = []
    for name, values in (("one.csv", rewards), ("two.jsonl", other)):
        paths.append(tmp_path / name)
        if name.endswith("csv"):
            lines = [f"{row.id},{'' if value is None else value}" for row, value in zip(rows, values, strict=True)]
            paths[-1].write_text("id,reward\n" + "\n".join(lines) + "\n")
        else:
            lines = [json.dumps({"id": row.id, "reward": value}) for row, value in zip(rows, values, strict=True)]
            paths[-1].write_text("\n".join(lines))
    items = clip_items(rows)
    one = [item.id for item in order_items(items, "uncertain", seed=0, tables=read_scores(paths[:1]))]
    assert one[0] == "c1"
    assert set(one[1:3]) == {"c3", "c6"}
    assert one[-1] == "c7"
    # The ensemble disagrees about one clip.
    assert order_items(items, "uncertain", seed=0, tables=read_scores(paths))[0].id == "c5"
    # In pairs, those first whose two rewards are nearest.
    pairs = order_items(pair_items(rows), "uncertain", seed=0, tables=read_scores(paths[1:]))
    assert [item.id for item in pairs] == ["p3", "p2", "p0", "p1"]
    with pytest.raises(ValueError, match="table 1 lacks 7 clips, the first is"):
        order_items(items, "uncertain", seed=0, tables=[{"c0": 0.5}])
    assert sorted(item.id for item in order_items(items, "random", seed=1)) == sorted(item.id for item in items)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "motion_quality"], "`tasks` must be physics_quality and human_quality"),
        (["--tasks", "Not a name"], "`tasks` must be lower case"),
        (["--host", "0.0.0.0"], "`allowed_hosts` must be given if `host` is 0.0.0.0"),
        (["--order", "uncertain"], "`scores` must be given for order uncertain"),
        (["--mode", "pairs", "--gold", "{manifest}"], "no row has a `rejected_id`"),
        (["--gold", "{manifest}", "--tasks", "text_alignment"], "no clip has a label of text_alignment"),
        (["--min_votes", "2"], "`min_votes` must be at most `labels_per_clip`"),
        (["--token", "short"], "`token` must be at least 8 characters long"),
        (["--host", "203.0.113.9"], "`host` '203.0.113.9', `port` 8765: cannot be listened on"),
        (["--output", "labels.csv"], "`output` must be a .json file"),
    ],
)
def test_bad_options(manifest: Path, tmp_path: Path, options: list[str], words: str) -> None:
    options = [option.format(manifest=manifest) for option in options]
    with pytest.raises(ValueError, match=words):
        main(["--manifest", str(manifest), "--output", str(tmp_path / "labels.json"), *options])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--manifest", "labels.json"], "`output` '.*labels.json' would overwrite `manifest`"),
        (["--manifest", "./folder/../link.json", "--output", "m.json"], "`output` '.*' would overwrite `manifest`"),
        (["--manifest", "labels.json.journal.jsonl"], "the journal of `output` '.*' would overwrite `manifest`"),
        (["--gold", "labels.json.summary.json"], "the summary of `output` '.*' would overwrite `gold`"),
        (["--export_label_studio", "m.json"], "`export_label_studio` '.*' would overwrite `manifest`"),
        (["--export_label_studio", "labels.json"], "`export_label_studio` '.*' would be the same file as `output`"),
        (
            ["--export_label_studio", "labels.json.journal.jsonl"],
            "the journal of `output` '.*' would be the same file as `export_label_studio`",
        ),
        (
            ["--export_label_studio", "studio.json", "--import_label_studio", "studio.json"],
            "`export_label_studio` '.*' would overwrite `import_label_studio`",
        ),
        (
            ["--order", "uncertain", "--scores", "m.json", "labels.json"],
            "`output` '.*' would overwrite table 2 of `scores`",
        ),
    ],
)
def test_inputs_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("m", "labels", "studio", "labels.json.summary"):
        Path(f"{name}.json").write_text("[]")
    Path("labels.json.journal.jsonl").write_text("[]")
    Path("link.json").symlink_to("m.json")
    defaults = {"--manifest": "m.json", "--output": "labels.json"}
    options = options + [word for pair in defaults.items() if pair[0] not in options for word in pair]
    with pytest.raises(ValueError, match=words) as error:
        main(options)
    assert "\n" not in str(error.value)
    assert {path.read_text() for path in tmp_path.glob("*.json*")} == {"[]"}


def judge(manifest: Path, output: Path, clip_id: str) -> None:
    """A label of the page for one clip of a manifest."""
    from hy_prfl.pages.annotation import clip_items
    from hy_prfl.pages.journal import Journal
    from hy_prfl.pages.study import Study

    inputs = {"manifest": str(manifest)}
    with Journal(Path(f"{output}.journal.jsonl")) as journal:
        items = clip_items(read_manifest(manifest))
        study = Study(journal, items, kind="clips", questions=TASKS, labels_per_item=1, inputs=inputs)
        study.label("ann", study.public_id(clip_id), both("good", "poor"), key=clip_id)


def test_labels_are_not_those_of_other_clips(manifest: Path, tmp_path: Path) -> None:
    """The same ids, but other files, or a video that was made again: another study. More clips are the same one."""
    output, own = tmp_path / "labels.json", tmp_path / "clips" / "manifest.json"
    shutil.copytree(manifest.parent, own.parent)
    rows = json.loads(own.read_text())
    own.write_text(json.dumps(rows[:3]))
    judge(own, output, "c1")
    options = ["--output", str(output), "--serve", "false"]
    # Clips that are appended, moved or not judged yet change nothing.
    own.write_text(json.dumps(rows))
    (own.parent / "5.mp4").write_bytes((own.parent / "4.mp4").read_bytes())
    main(["--manifest", str(own), *options])
    main(["--manifest", str(manifest), *options])
    assert read_annotations(output)["c1"]["physics_quality"] == 1
    other = own.with_name("other.json")
    other.write_text(json.dumps(rows[2:]))
    words = (
        f"line 2: there is no clip or pair 'c1' in the input. The journal is of `manifest` '{own}'; the input, `man"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        main(["--manifest", str(other), *options])
    (own.parent / "1.mp4").write_bytes((own.parent / "4.mp4").read_bytes())
    with pytest.raises(ValueError, match="'c1' was judged with another video or caption") as error:
        main(["--manifest", str(own), *options])
    assert f"is of `manifest` '{own}'; the input, `manifest` '{own}', is another study" in str(error.value)


def test_videos_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps([{"video": "gone.mp4", "caption": "x"}]))
    with pytest.raises(ValueError, match=r"row 1: 1 clips cannot be shown, this is the first: there is neither"):
        main(["--manifest", str(tmp_path / "manifest.json"), "--output", str(tmp_path / "labels.json")])
    assert not (tmp_path / "labels.json").exists()


@pytest.fixture
def start(manifest: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[str, subprocess.Popen[str]]]]:
    processes = []

    def run(*options: str) -> tuple[str, subprocess.Popen[str]]:
        words = [sys.executable, "-m", "hy_prfl.cli", "annotate", "--manifest", str(manifest), "--port", "0"]
        words += ["--output", str(tmp_path / "labels.json"), "--tasks", "physics_quality", *options]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return (process.stdout.readline().split() or [""])[0], process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.launch
def test_killed_and_restarted_with_many_at_work(start: Callable[..., Any], tmp_path: Path) -> None:
    """Every label that was acknowledged is there after SIGKILL, once, whoever else was at work."""
    address, process = start("--labels_per_clip", "4")
    acknowledged: set[tuple[str, str]] = set()
    barrier = threading.Barrier(5)

    def work(name: str) -> None:
        with httpx.Client(base_url=address, timeout=30) as client:
            barrier.wait()
            try:
                state = client.post("/api/next", json={"annotator": name, "window": name}).json()
                while state["items"]:
                    item = state["items"][0]["item"]
                    request = {"annotator": name, "window": name, "item": item, "key": item}
                    request |= {"answers": {"physics_quality": "good"}, "seconds": 1}
                    response = client.post("/api/label", json=request)
                    assert response.status_code == 200
                    acknowledged.add((name, item))
                    state = response.json()
                    if len(acknowledged) >= 14:
                        process.kill()
            except httpx.TransportError:
                pass

    threads = [threading.Thread(target=work, args=(f"person {index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    barrier.wait()
    for thread in threads:
        thread.join()
    assert process.wait() == -signal.SIGKILL
    assert len(acknowledged) >= 14
    _, process = start("--labels_per_clip", "4")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    events = [json.loads(line) for line in (tmp_path / "labels.json.journal.jsonl").read_text().splitlines()[1:]]
    found = [(event["annotator"], event["key"]) for event in events]
    assert len(found) == len(set(found))
    assert set(found) >= acknowledged
    summary = json.loads((tmp_path / "labels.json.summary.json").read_text())
    assert sum(person["labels"] for person in summary["annotators"].values()) == len(found)
