"""Each stage is run once, and again if it, or one before it, has changed."""

import sys
from pathlib import Path

import pytest

from examples.shapes.stages import Stage, launch
from examples.stages import StageError, run_stages


def stage(name: str, folder: Path, text: str = "") -> Stage:
    """A stage that leaves a folder behind and counts how often it was run."""
    code = (
        f"import pathlib; folder = pathlib.Path({str(folder)!r}); (folder / {name!r}).mkdir(); "
        f"file = (folder / 'runs_{name}').open('a'); file.write('x')  # {text}"
    )
    return Stage(name, name, [[sys.executable, "-c", code]], [name])


def runs(folder: Path) -> dict[str, int]:
    return {path.name.removeprefix("runs_"): len(path.read_text()) for path in folder.glob("runs_*")}


def test_complete_stages_are_skipped(tmp_path: Path) -> None:
    stages = [stage(name, tmp_path) for name in "abc"]
    first = run_stages(stages, tmp_path, fresh=False)
    assert run_stages(stages, tmp_path, fresh=False) == first
    assert runs(tmp_path) == {"a": 1, "b": 1, "c": 1}


def test_a_changed_stage_and_all_after_it_run_again(tmp_path: Path) -> None:
    stages = [stage(name, tmp_path) for name in "abc"]
    run_stages(stages, tmp_path, fresh=False)
    stages[1] = stage("b", tmp_path, text="changed")
    run_stages(stages, tmp_path, fresh=False)
    assert runs(tmp_path) == {"a": 1, "b": 2, "c": 2}


def test_fresh_runs_everything(tmp_path: Path) -> None:
    stages = [stage(name, tmp_path) for name in "ab"]
    run_stages(stages, tmp_path, fresh=False)
    run_stages(stages, tmp_path, fresh=True)
    assert runs(tmp_path) == {"a": 2, "b": 2}


def test_a_failed_stage_ends_the_run_and_is_not_complete(tmp_path: Path) -> None:
    failing = Stage("b", "b", [[sys.executable, "-c", "raise SystemExit(3)"]], [])
    with pytest.raises(StageError, match="exit code 3"):
        run_stages([stage("a", tmp_path), failing, stage("c", tmp_path)], tmp_path, fresh=False)
    assert runs(tmp_path) == {"a": 1}
    run_stages([stage(name, tmp_path) for name in "abc"], tmp_path, fresh=False)
    assert runs(tmp_path) == {"a": 1, "b": 1, "c": 1}


def test_a_stage_without_its_result_is_not_complete_and_goes_on(tmp_path: Path) -> None:
    """A training that is asked to stop ends well, but has no result yet."""
    code = f"import pathlib; path = pathlib.Path({str(tmp_path)!r}, 'a', 'result'); print(path.parent.exists())"
    training = Stage("a", "a", [[sys.executable, "-c", code]], ["a"], resumes=True, results=["a/result"])
    log = tmp_path / "log.txt"
    (tmp_path / "a").mkdir()
    with pytest.raises(StageError, match=rf"ended without '{tmp_path / 'a' / 'result'}'"):
        training.run(tmp_path, log=log)
    assert not training.is_complete(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result").touch()
    training.run(tmp_path, log=log)
    assert training.is_complete(tmp_path)
    # What another start left was deleted at first, and kept when the stage went on.
    assert [line for line in log.read_text().splitlines() if line[0] != "$"] == ["False", "True"]


def test_a_recipe_is_part_of_its_stage(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 0")
    described = Stage("a", "a", [["--config", str(recipe)]], [])
    before = described.digest()
    recipe.write_text("seed: 1")
    assert described.digest() != before


def test_output_goes_to_the_log_with_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    talking = Stage("a", "a", [[sys.executable, "-c", "print('told')"]], [])
    talking.run(tmp_path, log=tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "$ python -c print('told')\ntold\n"
    assert capfd.readouterr().out == ""


def test_commands_are_those_a_user_types() -> None:
    words = launch("score", ["--dtype", "float32"], two_processes=True)
    assert " ".join(words[1:]) == (
        "-m accelerate.commands.launch --config_file accelerate_configs/ddp_cpu.yaml -m hy_prfl.scripts.score "
        "--config examples/shapes/score.yaml --dtype float32"
    )
