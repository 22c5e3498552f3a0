import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import diffusers
import pytest
import torch

import hy_prfl
from hy_prfl.runtime.provenance import (
    finish_run_record,
    git_state,
    path_identity,
    read_metric_lines,
    read_run_records,
    run_record,
    write_run_record,
)


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


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text("a = 1\n")
    git(folder, "add", "code.py")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


class TestGitState:
    def test_commit_and_changes(self, repository: Path) -> None:
        commit = git(repository, "rev-parse", "HEAD")
        assert git_state(repository) == {"commit": commit, "dirty": False}
        (repository / "outputs").mkdir()
        (repository / "outputs" / "x.txt").write_text("not tracked")
        assert git_state(repository / "outputs") == {"commit": commit, "dirty": False}
        (repository / "code.py").write_text("a = 2\n")
        assert git_state(repository) == {"commit": commit, "dirty": True}

    def test_nothing_to_tell(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
        (tmp_path / "plain").mkdir()
        assert git_state(tmp_path / "plain") is None
        git(tmp_path / "plain", "init", "--quiet")
        assert git_state(tmp_path / "plain") is None  # no commit yet
        monkeypatch.setenv("PATH", str(tmp_path / "plain"))
        assert git_state(repository) is None  # no git


class TestRunRecord:
    def test_record(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(repository)
        words = ["train_prfl.py", "--seed", "7", "--hub_token", "hf_secret", "--token=hf_secret", "--max_tokens=3"]
        monkeypatch.setattr(sys, "argv", words)
        record = run_record(seed=7, num_processes=2)
        assert json.loads(json.dumps(record)) == record
        assert (record["seed"], record["num_processes"]) == (7, 2)
        assert record["command"] == [
            "train_prfl.py",
            "--seed",
            "7",
            "--hub_token",
            "...",
            "--token=...",
            "--max_tokens=3",
        ]
        age = datetime.now(timezone.utc) - datetime.fromisoformat(record["started"])
        assert timedelta(0) <= age < timedelta(minutes=1)
        assert record["hy_prfl"] == hy_prfl.__version__
        assert record["python"] == platform.python_version()
        assert record["platform"]
        assert record["libraries"]["diffusers"] == diffusers.__version__
        assert record["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert {"accelerate", "deepspeed", "transformers", "peft", "datasets"} <= set(record["libraries"])
        if not torch.accelerator.is_available():
            assert record["devices"] == {"type": "cpu", "names": []}
        assert record["git"] == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}

    def test_file_has_a_record_for_each_start(self, tmp_path: Path) -> None:
        path = tmp_path / "out" / "run.json"
        write_run_record(path, {"seed": 1})
        write_run_record(path, {"seed": 2})
        assert json.loads(path.read_text()) == [{"seed": 1}, {"seed": 2}]
        assert [file.name for file in path.parent.iterdir()] == ["run.json"]

    def test_the_end_is_noted_in_the_last_record(self, tmp_path: Path) -> None:
        path = tmp_path / "run.json"
        assert read_run_records(path) == []
        write_run_record(path, {"seed": 1})
        write_run_record(path, {"seed": 2})
        finish_run_record(path, 8, peak_gpu_memory=[3, 5])
        first, last = read_run_records(path)
        finished = datetime.fromisoformat(last.pop("finished"))
        assert abs(datetime.now(timezone.utc) - finished) < timedelta(minutes=1)
        assert [first, last] == [{"seed": 1}, {"seed": 2, "finished_step": 8, "peak_gpu_memory": [3, 5]}]

    @pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("{}", "expected a JSON list")])
    def test_another_file_is_not_overwritten(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "run.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            write_run_record(path, {})
        assert path.read_text() == text


class TestMetricLines:
    def test_lines_with_their_steps(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        assert read_metric_lines(path) == []
        path.write_text('{"step": 9, "a": NaN}\n{"step": 10}')
        assert read_metric_lines(path) == [(9, '{"step": 9, "a": NaN}'), (10, '{"step": 10}')]

    @pytest.mark.parametrize("line", ['{"step": 1', '{"loss": 1}', "[]", "1"])
    def test_only_the_last_may_be_cut_off(self, tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n' + line)
        assert read_metric_lines(path) == [(1, '{"step": 1}')]
        assert "metrics.jsonl, line 2: the line was cut off" in caplog.text
        path.write_text(line + '\n{"step": 1}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: expected a JSON object with `step`"):
            read_metric_lines(path)
