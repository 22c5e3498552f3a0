"""Outputs that cannot be written are named before anything is loaded."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from hy_prfl.configs.outputs import check_output_files, check_output_folders


IMPOSSIBLE = {
    "behind a file": ("file/x", "'.*file' is a file"),
    "far behind a file": ("file/x/y/z", "'.*file' is a file"),
    # The same for root, whom permissions do not stop.
    "nobody may write": ("/proc/x", "'/proc' cannot be written to"),
    "nobody may write, far behind": ("/proc/x/y/z", "'/proc' cannot be written to"),
    "name too long": ("x" * 300, "too long"),
    "name almost too long": ("x" * 250, "too long"),
    "folder name too long": ("x" * 300 + "/y", "too long"),
    "NUL": ("a\0b", "NUL"),
}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


@pytest.mark.parametrize("check", [check_output_folders, check_output_files])
@pytest.mark.parametrize(("path", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_outputs(tmp_path: Path, path: str, message: str, check: object) -> None:
    assert callable(check)
    with pytest.raises(ValueError, match=f"`out`: .*{message}"):
        check(SimpleNamespace(out=path), "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_files_and_folders_of_the_other_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`out`: 'file' is a file, not a folder"):
        check_output_folders(SimpleNamespace(out="file"), "out")
    with pytest.raises(ValueError, match="`out`: '.' is a folder, not a file"):
        check_output_files(SimpleNamespace(out="."), "out")


def test_possible_outputs_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in ("new", "folder", "folder/new/newer", ".", str(tmp_path / "new"), "../" + tmp_path.name + "/x"):
        check_output_folders(SimpleNamespace(out=path), "out")
    for path in ("new.csv", "folder/new/newer.csv", "file", None):
        check_output_files(SimpleNamespace(out=path), "out")
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]


COMMANDS = {
    "preprocess": ["--pretrained_model_name_or_path=u/p", "--manifest=file", "--output_dir=file/x"],
    "generate": ["--pretrained_model_name_or_path=u/p", "--prompts=file", "--output_dir=file/x"],
    "score": ["--reward_model=u/r", "--dataset=u/d", "--output=file/x.csv"],
    "label": ["--dataset=u/d", "--annotations=file", "--output_dir=file/x"],
    "convert": ["--lora=file", "--output_dir=file/x"],
    "convert_recipe": ["--config=file", "--output=file/x.yaml"],
    "train_reward": ["--pretrained_model_name_or_path=u/p", "--train_dataset=u/d", "--output_dir=file/x"],
    "train_prfl": [
        "--pretrained_model_name_or_path=u/p", "--train_dataset=u/d", "--output_dir=file/x", "--reward_model=u/r",
    ],
    "pull": ["--repo_id=u/r", "--output_dir=file/x"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_checks_its_output(command: str) -> None:
    main = importlib.import_module(f"hy_prfl.scripts.{command}").main
    with pytest.raises(ValueError, match=r"`(output|output_dir)`: .*'.*file' is a file, so '.*x.*' cannot be created"):
        main(COMMANDS[command])


def test_plan_checks_its_output(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "examples/prfl/wan2.1_t2v_1.3b_480p_lora.yaml"
    with pytest.raises(ValueError, match="`output`: .*file' is a file"):
        importlib.import_module("hy_prfl.scripts.plan").main([f"--config={recipe}", "--output=file/x.json"])
