from pathlib import Path

import pytest

from hy_prfl.runtime.atomic_writes import move, recover_folder, replace_folder, replacing, temporary_folder


def make(folder: Path, file: str) -> Path:
    folder.mkdir()
    (folder / file).touch()
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_replacing_a_folder(tmp_path: Path) -> None:
    make(tmp_path / "target", "old")
    replace_folder(make(temporary_folder(tmp_path / "target"), "new"), tmp_path / "target")
    assert files(tmp_path) == ["target", "target/new"]


def test_leftovers_do_not_get_into_a_new_folder(tmp_path: Path) -> None:
    make(tmp_path / ".target.tmp", "half")
    assert not temporary_folder(tmp_path / "target").exists()


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    make(tmp_path / ".target.old", "old")
    recover_folder(tmp_path / "target")
    assert files(tmp_path) == ["target", "target/old"]


def test_a_kill_after_the_two_renames_is_finished(tmp_path: Path) -> None:
    make(tmp_path / ".target.old", "old")
    make(tmp_path / "target", "new")
    recover_folder(tmp_path / "target")
    assert files(tmp_path) == ["target", "target/new"]


def test_replacing_does_not_lose_the_only_good_folder(tmp_path: Path) -> None:
    """After a kill between the two renames, the next replacement finds the old folder under its temporary name."""
    make(tmp_path / ".target.old", "old")
    replace_folder(make(tmp_path / "new", "new"), tmp_path / "target")
    assert files(tmp_path) == ["target", "target/new"]


def test_moving_what_another_process_has_moved(tmp_path: Path) -> None:
    make(tmp_path / "source", "file")
    move(tmp_path / "source", tmp_path / "target")
    move(tmp_path / "source", tmp_path / "target")
    assert files(tmp_path) == ["target", "target/file"]
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "source", tmp_path / "elsewhere")


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with replacing(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(TypeError), replacing(path) as temporary:
        temporary.write_bytes("no bytes")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    with replacing(path) as first, replacing(path, tag=".17") as second:
        assert first != second
        first.write_text("new")
        second.write_text("newer")
    assert files(tmp_path) == ["table.csv"]
