"""Counts by hand, intervals by formula and by another bootstrap."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hy_prfl.inference.video_files import write_video
from hy_prfl.pages.comparison import compare, read_pairs
from hy_prfl.pages.items import Clip, Item
from hy_prfl.pages.journal import Journal
from hy_prfl.pages.study import Study
from hy_prfl.scripts.compare import main


def votes_of(study: Study, votes: dict[str, list[str]]) -> None:
    """Answers of `person 0`, `person 1`, ...: for the left or the right folder, whichever side they stand on."""
    for item_id, answers in votes.items():
        for index, answer in enumerate(answers):
            person = f"person {index}"
            if study.is_swapped(person, item_id):
                answer = {"left": "right", "right": "left"}.get(answer, answer)
            study.label(
                person, study.public_id(item_id), {"preference": answer}, key=f"{person}{item_id}", seconds=index + 1
            )


@pytest.fixture
def study(tmp_path: Path) -> Any:
    items = [
        Item(id=f"p{index}", clips=tuple(Clip(id=side, video=tmp_path / side, caption=f"{index}") for side in "ab"))
        for index in range(5)
    ]
    for side in "ab":
        (tmp_path / side).write_text(side)
    with Journal(tmp_path / "journal.jsonl") as journal:
        yield Study(journal, items, kind="pairs", questions=["preference"], labels_per_item=None)


def test_wins_ties_and_losses(study: Study) -> None:
    votes = {
        "p0": ["right", "right", "right"],
        "p1": ["right", "tie", "left"],
        "p2": ["left", "left", "tie"],
        "p3": ["right", "right", "tie"],
    }
    votes_of(study, votes)
    result = compare(study, "base", "prfl")
    found = result["questions"]["preference"]
    assert {name: vote["count"] for name, vote in found["votes"].items()} == {"left": 3, "tie": 3, "right": 6}
    # Wilson's interval by its formula.
    share, number, z = 6 / 12, 12, 1.959964
    centre = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    assert found["votes"]["right"]["interval"] == pytest.approx([centre - half, centre + half], abs=1e-6)
    assert found["prompts"] == {"left": 1, "tie": 1, "right": 2}
    # One of three winners is left: 2 * P(X <= 1) of Binomial(3, 1/2) is 1.
    assert found["p_value"] == pytest.approx(1.0)
    means = [1.0, 0.5, 1 / 6, 5 / 6]
    assert found["score"]["mean"] == pytest.approx(np.mean(means))
    low, high = found["score"]["interval"]
    draws = np.random.default_rng(1).choice(means, (20000, 4)).mean(axis=1)
    assert [low, high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.09)
    assert found["per_prompt"][1] == {
        "id": "p1", "caption": "1", "num_videos": 1, "left": 1, "tie": 1, "right": 1, "majority": None
    }  # fmt: skip
    assert found["per_annotator"]["person 2"] == {
        "left": 1, "tie": 2, "right": 1, "score": pytest.approx(0.5), "median_seconds": 3
    }  # fmt: skip
    assert found["agreement"]["num_items"] == 4
    assert (result["num_prompts"], result["num_annotators"]) == (5, 3)
    json.dumps(result, allow_nan=False)


def test_the_protocol_of_the_paper(tmp_path: Path) -> None:
    """25 prompts, 30 raters: a clear preference is found as one, with an interval that excludes a draw."""
    rng = np.random.default_rng(0)
    clips = tuple(Clip(id=side, video=Path(side), caption="") for side in "ab")
    items = [Item(id=f"q{index}", clips=clips) for index in range(25)]
    lines = [{"type": "study", "format": 1, "kind": "pairs", "questions": ["preference"], "secret": "00"}]
    for item in items:
        for rater, answer in enumerate(rng.choice(["first", "tie", "second"], 30, p=[0.2213, 0.1853, 0.5934])):
            event = {"type": "label", "item": item.id, "annotator": f"rater {rater}", "seconds": None, "key": ""}
            lines.append({**event, "answers": {"preference": str(answer)}, "time": "2026-01-01T10:00:00+00:00"})
    (tmp_path / "paper.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Journal(tmp_path / "paper.jsonl") as journal:
        study = Study(journal, items, kind="pairs", questions=["preference"], labels_per_item=None)
        found = compare(study, "sft", "prfl")["questions"]["preference"]
    assert sum(vote["count"] for vote in found["votes"].values()) == 750
    assert found["votes"]["right"]["interval"][0] < 0.5934 < found["votes"]["right"]["interval"][1]
    assert found["score"]["interval"][0] > 0.6
    assert found["p_value"] < 1e-5
    # Nobody agrees beyond chance where votes are drawn.
    assert abs(found["agreement"]["fleiss_kappa"]) < 0.03


def test_prompts_are_resampled_and_not_videos(tmp_path: Path) -> None:
    """Ten videos of each of four prompts are four observations, however many videos and votes there are."""
    clips = tuple(Clip(id=side, video=tmp_path / side, caption="x") for side in "ab")
    for side in "ab":
        (tmp_path / side).write_text(side)
    items = [Item(id=f"{i}_seed_{seed}", clips=clips, prompt=f"{i}") for i in range(4) for seed in range(10)]
    # Means 1, 1, 0.6 and 0.1 of the right folder: majorities right, right, right, left.
    rights = {"0": 10, "1": 10, "2": 6, "3": 1}
    with Journal(tmp_path / "journal.jsonl") as journal:
        study = Study(journal, items, kind="pairs", questions=["preference"], labels_per_item=None)
        for item in items:
            right = int(item.id.rsplit("_", 1)[1]) < rights[item.prompt]
            votes_of(study, {item.id: ["right" if right else "left"]})
        result = compare(study, "a", "b")
    found = result["questions"]["preference"]
    assert (result["num_prompts"], result["num_videos"]) == (4, 40)
    assert found["prompts"] == {"left": 1, "tie": 0, "right": 3}
    # 2 * P(X >= 3) of Binomial(4, 1/2) = 2 * 5 / 16.
    assert found["p_value"] == pytest.approx(0.625)
    means = [1.0, 1.0, 0.6, 0.1]
    assert found["score"]["mean"] == pytest.approx(np.mean(means))
    draws = np.random.default_rng(1).choice(means, (20000, 4)).mean(axis=1)
    low, high = found["score"]["interval"]
    assert high - low == pytest.approx(np.subtract(*np.quantile(draws, [0.975, 0.025])), abs=0.15)
    assert [row["num_videos"] for row in found["per_prompt"]] == [10] * 4


def test_a_prompt_is_caption_and_images(tmp_path: Path) -> None:
    """As `generate` names and records videos: two seeds of a prompt, the same words with another image, no words."""
    ids = ["a_seed_1", "a_seed_2", "b_seed_1", "c_seed_1", "d_seed_1", "e_seed_1", "e_seed_2", "a_seed_3"]
    captions = ["x", "x", "x", "x", "y", "", "", "z"]
    images = [None, None, None, "c0ffee", None, None, None, None]
    for side in ("left", "right"):
        rows = []
        for video_id, caption, image in zip(ids, captions, images, strict=True):
            frames = np.zeros((1, 16, 16, 3), np.uint8)
            record = {"caption": caption, "image": image, "last_image": None}
            write_video(tmp_path / side / f"{video_id}.mp4", frames, 16, comment=json.dumps(record))
            rows.append({"id": video_id, "video": f"{video_id}.mp4", "caption": caption})
        (tmp_path / side / "manifest.json").write_text(json.dumps(rows))
    prompts = [item.prompt for item in read_pairs(tmp_path / "left", tmp_path / "right")]
    assert prompts == ["a", "a", "a", "c", "d", "e", "e", "a_seed_3"]


def test_nothing_yet(study: Study) -> None:
    found = compare(study, "a", "b")["questions"]["preference"]
    assert found["votes"]["right"] == {"count": 0, "share": None, "interval": None}
    assert found["score"] == {"mean": None, "interval": None}
    assert found["p_value"] is None
    votes_of(study, {"p0": ["right"]})
    found = compare(study, "a", "b")["questions"]["preference"]
    assert found["score"] == {"mean": 1.0, "interval": None}


@pytest.fixture
def folders(tmp_path: Path, write_video: Callable[..., Path]) -> list[Path]:
    for side in ("base", "prfl"):
        rows = []
        for index in range(2):
            write_video(tmp_path / side / f"{index}_seed_7.mp4", seed=index + 2 * (side == "prfl"))
            rows.append({"id": f"{index}_seed_7", "video": f"{index}_seed_7.mp4", "caption": f"c{index}", "seed": 7})
        (tmp_path / side / "manifest.json").write_text(json.dumps(rows))
    return [tmp_path / "base", tmp_path / "prfl"]


def test_the_command(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    left, right = map(str, folders)
    items = read_pairs(left, right)
    assert [[clip.video.parent.name for clip in item.clips] for item in items] == [["base", "prfl"]] * 2
    main(["--left", left, "--right", right, "--serve", "false"])
    assert "preference: no answers yet" in capsys.readouterr().out
    with Journal(folders[1] / "comparison.json.journal.jsonl") as journal:
        study = Study(journal, items, kind="pairs", questions=["preference"], labels_per_item=None)
        votes_of(study, {"0_seed_7": ["right", "tie"], "1_seed_7": ["right", "left"]})
    main(["--left", left, "--right", right, "--serve", "false"])
    assert "preference: left 25.0%, tie 25.0%, right 50.0%" in capsys.readouterr().out
    result = json.loads((folders[1] / "comparison.json").read_text())
    assert result["right"] == right
    assert result["questions"]["preference"]["score"]["mean"] == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:1], "1 videos of '.*base' are not in '.*prfl', the first is '1_seed_7'"),
        (lambda rows: [rows[0] | {"caption": "x"}, rows[1]], "the caption of '0_seed_7' is 'x', but 'c0' in"),
    ],
)
def test_folders_must_fit(folders: list[Path], change: Callable[..., Any], words: str) -> None:
    path = folders[1] / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=words):
        read_pairs(*folders)
    with pytest.raises(ValueError, match="are the same folder"):
        read_pairs(folders[0], folders[0] / ".." / "base")


def test_votes_are_not_counted_for_other_videos(folders: list[Path], tmp_path: Path) -> None:
    """The same ids and captions, but other videos, the other side, or another caption: another study."""
    left, right = map(str, folders)
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    (other / "0_seed_7.mp4").write_bytes((folders[1] / "1_seed_7.mp4").read_bytes())
    output = tmp_path / "result.json"
    options = ["--output", str(output), "--serve", "false"]
    # Nobody has judged anything yet, so the journal may become another study's.
    main(["--left", left, "--right", str(other), *options])
    main(["--left", left, "--right", right, *options])
    with Journal(Path(f"{output}.journal.jsonl")) as journal:
        assert [event["inputs"] for event in journal.events] == [{"left": left, "right": right}]
        items, inputs = read_pairs(left, right), journal.events[0]["inputs"]
        study = Study(journal, items, kind="pairs", questions=["preference"], labels_per_item=None, inputs=inputs)
        votes_of(study, {"0_seed_7": ["right", "right"]})
    before = output.read_bytes()
    for sides in ((left, str(other)), (right, left), (str(other), right)):
        with pytest.raises(ValueError, match=r"'0_seed_7' was judged with another video or caption") as error:
            main(["--left", sides[0], "--right", sides[1], *options])
        message = str(error.value)
        assert "\n" not in message
        assert f"of `left` '{left}' and `right` '{right}'; the input, `left` '{sides[0]}'" in message
    assert output.read_bytes() == before
    # The same videos in another place are the same study.
    moved = tmp_path / "moved"
    shutil.copytree(folders[1], moved)
    main(["--left", left, "--right", str(moved), *options])
    for folder in folders:
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace('"c0"', '"another prompt"'))
    with pytest.raises(ValueError, match="another video or caption"):
        main(["--left", left, "--right", right, *options])


@pytest.mark.parametrize("side", ["left", "right"])
def test_manifests_are_not_overwritten(folders: list[Path], side: str) -> None:
    path = folders[side == "right"] / "manifest.json"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"`output` '{path}' would overwrite the manifest of `{side}`"):
        main(["--left", str(folders[0]), "--right", str(folders[1]), "--output", str(path), "--serve", "false"])
    assert path.read_bytes() == before
