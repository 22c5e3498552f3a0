import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.hub import HubError
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.scripts import pull, push
from hy_prfl.scripts.running import is_mistake
from tests.hub.hub_server import STRANGER, HubServer, client_environment, running_hub, use_in_this_process


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    model = WanRewardModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=1,
        num_query_heads=2, head_dims=(16, 8),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def options(**values: object) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.mark.launch
def test_as_users_run_them(hub: HubServer, model_dir: Path, tmp_path: Path) -> None:
    """Processes of their own, which learn from the environment where the Hub is and who asks."""
    environment = os.environ | client_environment(hub, tmp_path / "home") | {"OMP_NUM_THREADS": "1"}

    def run(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hy_prfl.cli", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment | changes, text=True, capture_output=True, timeout=120
        )

    pushed = run("push", *options(folder=model_dir, repo_id="user/reward", commit_message="First"), "--private")
    assert pushed.returncode == 0, pushed.stderr
    repo = hub.repos["models", "user/reward"]
    assert repo.private
    assert repo.messages == ["initial commit", "First"]
    assert f"{hub.url}/user/reward/commit/{repo.branches['main']}" in pushed.stdout

    refused = run("pull", *options(repo_id="user/reward", output_dir="pulled"), HF_TOKEN=STRANGER)
    assert refused.returncode == 2
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 'user/reward' was not pulled: there is no such repository, or this token")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "pulled").exists()


def test_model(hub: HubServer, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_this_process(hub, tmp_path / "home", monkeypatch)
    push.main(options(folder=model_dir, repo_id="user/reward"))
    assert not hub.repos["models", "user/reward"].private
    pull.main(options(repo_id="user/reward", output_dir=tmp_path / "pulled"))
    ours, theirs = (WanRewardModel.from_pretrained(path).state_dict() for path in (model_dir, tmp_path / "pulled"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dataset(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_latents: Callable[..., Path]
) -> None:
    use_in_this_process(hub, tmp_path / "home", monkeypatch)
    source = write_latents(tmp_path / "data", 4)
    push.main(options(folder=source, repo_id="user/clips", repo_type="dataset", private=True))
    pull.main(options(repo_id="user/clips", repo_type="dataset", output_dir=tmp_path / "pulled"))
    ours, theirs = (load_latent_dataset(str(path)) for path in (source, tmp_path / "pulled"))
    assert ours[:].combine_chunks().equals(theirs[:].combine_chunks())


def test_each_failure_is_one_line(
    hub: HubServer, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_in_this_process(hub, tmp_path / "home", monkeypatch)
    hub.create("other/theirs")

    def message(script: Callable[[list[str]], None], **values: object) -> str:
        with pytest.raises((HubError, ValueError, FileNotFoundError)) as refused:
            script(options(**values))
        assert is_mistake(refused.value)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "there is no file or folder" in message(push.main, folder=tmp_path / "none", repo_id="user/x")
    assert "`repo_id` must be given" in message(push.main, folder=model_dir)
    theirs = message(push.main, folder=model_dir, repo_id="other/theirs")
    assert theirs.startswith("'other/theirs' exists, but this token may not write to it: the Hub")
    assert "the token was refused" in message(push.main, folder=model_dir, repo_id="user/x", token="hf_old")
    hub.fail("POST", "/objects/batch", 403, "Private repository storage limit reached", times=1)
    quota = message(push.main, folder=model_dir, repo_id="user/x")
    assert quota.endswith("the Hub answered 403: Private repository storage limit reached.")
    hub.drop("POST", "/api/repos/create", times=1)
    assert f"{hub.url} cannot be reached" in message(push.main, folder=model_dir, repo_id="user/x")
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no Hugging Face token" in message(push.main, folder=model_dir, repo_id="user/x")

    assert "no such revision" in message(pull.main, repo_id="other/theirs", output_dir=tmp_path / "new", revision="v9")
    assert "not an empty folder" in message(pull.main, repo_id="other/theirs", output_dir=model_dir)
    assert "`subfolder` must be" in message(
        pull.main, repo_id="other/theirs", output_dir=tmp_path / "new", subfolder="../up"
    )
    assert not (tmp_path / "new").exists()


def test_options() -> None:
    with pytest.raises(ValueError, match="'repo' is not a field of PushConfig. Did you mean 'repo_id'"):
        push.main(options(folder="x", repo="user/x"))
    with pytest.raises(ValueError, match="`output_dir` must be a text that is not empty"):
        pull.main(options(repo_id="user/x", output_dir=""))
