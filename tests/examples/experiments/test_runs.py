"""Runs of an experiment go side by side, each once, and their numbers are put together."""

import statistics
import sys
import time
from pathlib import Path

import pytest

from examples.shapes.experiments.runs import ExperimentConfig, mean_and_spread, run_all
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
