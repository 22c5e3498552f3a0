"""Inputs of real launches of two processes."""

from pathlib import Path

import pytest

from .training import write_inputs


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny pipeline, a reward model and 16 rows; runs go into it too."""
    folder = tmp_path_factory.mktemp("parity")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def in_project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch configurations name DeepSpeed's files relative to it."""
    monkeypatch.chdir(ROOT)
