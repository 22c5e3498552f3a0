import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score

from hy_prfl.data.video import VideoError
from hy_prfl.evaluation.score_table import is_scored, summary_path, write_scores


TIMESTEPS = (201, 1000)
REQUEST = {"model": "a", "timesteps": (201, 1000)}
CLIPS = [
    {
        "id": f"clip{index}",
        "prompt": f"prompt, {index}",
        "source": None if index == 0 else f"{index}.mp4",
        "physics_quality": [1, 0, None, 1, 0, 1][index],
        "human_quality": [1, 1, 1, 1, None, 0][index],
        "text_alignment": None,
        "blur_quality": None,
    }
    for index in range(6)
]
BATCHES = [[0, 3], [5, 1], [2], [4]]
MOTION_LABELS = [1, 0, None, 1, None, 0]


def logits_of(position: int) -> list[float]:
    return [0.5 * position - 1.0, 2.0 - position]


class Scorer:
    """Scores batches, counts them, and stops after some."""

    def __init__(self, limit: int | None = None, bad: int | None = None) -> None:
        self.calls: list[list[int]] = []
        self.limit = limit
        self.bad = bad

    def __call__(self, positions: list[int]) -> list[list[float]]:
        if self.limit is not None and len(self.calls) == self.limit:
            raise KeyboardInterrupt
        self.calls.append(positions)
        if self.bad in positions:
            raise VideoError("too short")
        return [logits_of(position) for position in positions]


def write(output: Path, scorer: Callable, task: str = "motion_quality", request: dict = REQUEST) -> list[dict]:
    return write_scores(CLIPS, BATCHES, scorer, output, TIMESTEPS, task=task, request=request)


def read(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_table(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / "new" / f"scores{suffix}"
    rows = write(output, Scorer())
    names = ["id", "prompt", "source", "label", "reward", "logit"]
    names += ["reward_t201", "logit_t201", "reward_t1000", "logit_t1000"]
    for position, (row, found) in enumerate(zip(rows, read(output), strict=True)):
        logits = logits_of(position)
        rewards = [1 / (1 + math.exp(-logit)) for logit in logits]
        clip = CLIPS[position]
        expected = [clip["id"], clip["prompt"], clip["source"], MOTION_LABELS[position]]
        assert list(row) == names
        assert list(row.values())[:4] == expected
        assert row["reward"] == pytest.approx(sum(rewards) / 2)
        assert row["logit"] == pytest.approx(sum(logits) / 2)
        assert [row["reward_t201"], row["reward_t1000"]] == pytest.approx(rewards)
        assert [row["logit_t201"], row["logit_t1000"]] == logits
        if suffix == ".csv":
            assert list(found) == names
            assert found == {name: "" if value is None else str(value) for name, value in row.items()}
        else:
            assert found == row
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name, f"{output.name}.summary.json"]


def test_summary(tmp_path: Path) -> None:
    write(tmp_path / "scores.csv", Scorer())
    summary = json.loads(summary_path(tmp_path / "scores.csv").read_text())
    assert (summary["num_clips"], summary["num_scored"], summary["num_labeled"]) == (6, 6, 4)
    known = [(label, logits_of(position)) for position, label in enumerate(MOTION_LABELS) if label is not None]
    labels = [label for label, _ in known]
    for column, timestep in enumerate(TIMESTEPS):
        logits = [logits[column] for _, logits in known]
        correct = [(logit > 0) == bool(label) for label, logit in zip(labels, logits, strict=True)]
        assert summary["metrics"][f"accuracy/t{timestep}"] == pytest.approx(sum(correct) / 4)
        assert summary["metrics"][f"auc/t{timestep}"] == pytest.approx(roc_auc_score(labels, logits))
    means = [summary["metrics"][f"auc/t{timestep}"] for timestep in TIMESTEPS]
    assert summary["metrics"]["auc"] == pytest.approx(sum(means) / 2)
    rewards = [1 / (1 + math.exp(-logits_of(position)[0])) for position in range(6)]
    assert summary["rewards"]["reward_t201"] == pytest.approx(sum(rewards) / 6)


@pytest.mark.parametrize("task", ["text_alignment", "beauty"])
def test_no_labels(tmp_path: Path, task: str) -> None:
    rows = write(tmp_path / "scores.csv", Scorer(), task=task)
    assert "label" not in rows[0]
    assert json.loads(summary_path(tmp_path / "scores.csv").read_text())["metrics"] == {}


class TestResume:
    def test_nothing_is_scored_twice(self, tmp_path: Path) -> None:
        write(tmp_path / "expected.csv", Scorer())
        output = tmp_path / "scores.csv"
        killed = Scorer(limit=2)
        with pytest.raises(KeyboardInterrupt):
            write(output, killed)
        assert not output.exists()
        again = Scorer()
        write(output, again)
        assert killed.calls + again.calls == BATCHES
        assert output.read_bytes() == (tmp_path / "expected.csv").read_bytes()
        assert not list(tmp_path.glob("*.partial*"))

    def test_unfinished_line(self, tmp_path: Path) -> None:
        write(tmp_path / "expected.csv", Scorer())
        output = tmp_path / "scores.csv"
        with pytest.raises(KeyboardInterrupt):
            write(output, Scorer(limit=2))
        (partial,) = tmp_path.glob("*.partial*")
        for length in (1, 40, 90, 150, 10_000):
            with open(partial, "r+b") as file:
                content = file.read()
                file.truncate(max(len(content) - length, 0))
            if length < 10_000:
                with pytest.raises(KeyboardInterrupt):
                    write(output, Scorer(limit=1))
        write(output, Scorer())
        assert output.read_bytes() == (tmp_path / "expected.csv").read_bytes()

    def test_files_of_other_processes_are_used(self, tmp_path: Path) -> None:
        output = tmp_path / "scores.csv"
        with pytest.raises(KeyboardInterrupt):
            write(output, Scorer(limit=3))
        (partial,) = tmp_path.glob("*.partial*")
        partial.rename(partial.with_name("scores.csv.partial-5.jsonl"))
        again = Scorer()
        write(output, again)
        assert again.calls == BATCHES[3:]
        assert not list(tmp_path.glob("*.partial*"))

    def test_another_request_starts_over(self, tmp_path: Path) -> None:
        output = tmp_path / "scores.csv"
        with pytest.raises(KeyboardInterrupt):
            write(output, Scorer(limit=3))
        again = Scorer()
        write(output, again, request={"model": "b"})
        assert again.calls == BATCHES


class TestIsScored:
    def test_states(self, tmp_path: Path) -> None:
        output = tmp_path / "scores.csv"
        assert not is_scored(output, REQUEST)
        write(output, Scorer())
        assert is_scored(output, REQUEST)
        other = {**REQUEST, "model": "b"}
        with pytest.raises(ValueError, match=r"scores\.csv.*\(different: model\).*overwrite"):
            is_scored(output, other)
        assert not is_scored(output, other, overwrite=True)

    def test_replacing_can_be_resumed(self, tmp_path: Path) -> None:
        output = tmp_path / "scores.csv"
        write(output, Scorer())
        other = {**REQUEST, "model": "b"}
        with pytest.raises(KeyboardInterrupt):
            write(output, Scorer(limit=1), request=other)
        assert not is_scored(output, other)

    def test_foreign_file(self, tmp_path: Path) -> None:
        (tmp_path / "scores.csv").write_text("mine")
        with pytest.raises(ValueError, match="overwrite"):
            is_scored(tmp_path / "scores.csv", REQUEST)


def test_bad_clip(tmp_path: Path) -> None:
    rows = write(tmp_path / "scores.json", Scorer(bad=2))
    assert [row["error"] for row in rows] == [None, None, "too short", None, None, None]
    assert rows[2]["reward"] is rows[2]["logit_t201"] is None
    assert json.loads(summary_path(tmp_path / "scores.json").read_text())["num_scored"] == 5


def test_no_good_clip(tmp_path: Path) -> None:
    def score(positions: list[int]) -> list[list[float]]:
        raise VideoError("there is no file")

    with pytest.raises(ValueError, match="none of the 6 clips could be scored, .*'clip0'.*there is no file"):
        write(tmp_path / "scores.csv", score)
    assert not list(tmp_path.iterdir())


def test_score_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'clip0' is not finite"):
        write(tmp_path / "scores.csv", lambda positions: [[1.0, math.nan]] * len(positions))
