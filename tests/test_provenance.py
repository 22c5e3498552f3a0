import os
import shutil
from pathlib import Path

from hy_prfl.provenance import path_identity


def test_changes_with_the_files_and_not_with_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights.bin").write_bytes(b"1234")
    identity = path_identity(str(folder))
    assert path_identity(f"{tmp_path}/./model/") == identity
    shutil.copytree(folder, tmp_path / "copy")
    assert path_identity(str(tmp_path / "copy")) == identity
    os.utime(folder / "sub" / "weights.bin", ns=(1, 1))
    assert path_identity(str(folder)) != identity
    (tmp_path / "copy" / "more.txt").write_text("x")
    assert path_identity(str(tmp_path / "copy")) != identity


def test_file_and_hub_id(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1")
    assert len(path_identity(str(tmp_path / "a.safetensors"))) == 16
    assert path_identity("owner/name") == "owner/name"
    assert path_identity("owner/name", "v2") == "owner/name@v2"
