"""Runs of an experiment go side by side, each once, and their numbers are put together."""

import json
import statistics
import sys
import time
from pathlib import Path

import pytest

from examples.shapes.experiments.runs import ExperimentConfig, mean_and_spread, run_all, with_other_arms
from examples.shapes.stages import Stage
from examples.stages import StageError


def meeting(name: str, other: str, folder: Path) -> Stage:
    """A stage that ends only when the other one has begun."""
    code = (
        f"import pathlib, time; folder = pathlib.Path({str(folder)!r}); (folder / {name!r}).touch()\n"
        f"while not (folder / {other!r}).exists(): time.sleep(0.01)"
    )
    return Stage(name, name, [[sys.executable, "-c", code]], [])


def test_two_run_at_a_time_and_none_twice(tmp_path: Path) -> None:
    stages = [meeting("a", "b", tmp_path), meeting("b", "a", tmp_path)]
    run_all(stages, tmp_path, num_parallel=2)
    written = [stage.record(tmp_path).stat().st_mtime_ns for stage in stages]
    run_all(stages, tmp_path, num_parallel=2)
    assert [stage.record(tmp_path).stat().st_mtime_ns for stage in stages] == written


def test_a_failure_starts_nothing_more_and_names_the_log(tmp_path: Path) -> None:
    failing = Stage("bad", "bad", [[sys.executable, "-c", "raise SystemExit(4)"]], [])
    later = [Stage(name, name, [[sys.executable, "-c", "import time; time.sleep(0.2)"]], []) for name in "abcdef"]
    start = time.monotonic()
    with pytest.raises(StageError, match=r"exit code 4(.|\n)*logs/bad.txt"):
        run_all([failing, *later], tmp_path, num_parallel=1)
    assert time.monotonic() - start < 60
    assert not all(stage.is_complete(tmp_path) for stage in later)


def test_mean_and_spread() -> None:
    values = [0.25, 0.5, 0.9]
    found = mean_and_spread(values)
    assert found["mean"] == pytest.approx(statistics.mean(values), abs=1e-4)
    assert found["std"] == pytest.approx((sum((value - 0.55) ** 2 for value in values) / 2) ** 0.5, abs=1e-4)
    assert found["values"] == values
    assert mean_and_spread([0.5])["std"] == 0.0


def test_unknown_arms_are_refused() -> None:
    assert ExperimentConfig(arms=["b", "a"]).choose(["a", "b", "c"]) == ["a", "b"]
    assert ExperimentConfig().choose(["a", "b"]) == ["a", "b"]
    with pytest.raises(ValueError, match="`arms` must be of a, b"):
        ExperimentConfig(arms=["x"]).choose(["a", "b"])


def test_arms_that_were_not_run_again_stay(tmp_path: Path) -> None:
    path, known = tmp_path / "results.json", ["a", "b", "c"]
    whole = {"seeds": [0, 1], "num_videos": 4, "arms": {"base": 0.1, "a": 0.2, "b": 0.3}}
    assert with_other_arms(path, whole, known) == whole["arms"]
    path.write_text(json.dumps({**whole, "arms": {"base": 0.1, "b": 0.3, "a": 0.2, "renamed": 0.4}}))
    some = {**whole, "arms": {"base": 0.1, "c": 0.5, "a": 0.6}}
    assert list(with_other_arms(path, some, known).items()) == [("base", 0.1), ("a", 0.6), ("b", 0.3), ("c", 0.5)]
    for other, name in (({"seeds": [0]}, "seeds"), ({"num_videos": 5}, "num_videos")):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            with_other_arms(path, {**some, **other}, known)
    with pytest.raises(ValueError, match="`results_dir` must be another folder: the base has other verdicts"):
        with_other_arms(path, {**some, "arms": {"base": 0.2, "c": 0.5}}, known)
    # Nothing of the old results stays, so they may be of anything.
    everything = {"seeds": [0], "num_videos": 5, "arms": {"base": 0.2, "a": 0.1, "b": 0.1}}
    assert with_other_arms(path, everything, known) == everything["arms"]
