"""Uploads through hf_xet, as the client does them by default: the server of `hub_server.py` offers it a folder."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, RepoFile, hf_hub_download
from safetensors.torch import save_file

from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.formats.layout import LORA_FILES
from hy_prfl.hub import HubError, HubUploader, pull, push_folder, repositories
from hy_prfl.hub.repositories import PENDING_FILE
from tests.hub.hub_server import HubServer, client_environment, running_hub, use_in_this_process


LORA = LORA_FILES["high_noise"]


@pytest.fixture(params=["lfs", "xet"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def hub(tmp_path: Path, store: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        if way == "xet":
            server.offer_xet(f"local://{store}")
        use_in_this_process(server, tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of `train_prfl` with a LoRA of some 800 kB, more than one chunk of Xet."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(0)
    save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.randn(400, 512)}, folder / LORA)
    (folder / "config.yaml").write_text("pretrained_model_name_or_path: weights/wan\n")
    return folder


def asked(hub: HubServer, word: str) -> int:
    return sum(word in path for _, path, _ in hub.requests)


def test_bytes_arrive_and_come_back(hub: HubServer, run_dir: Path, store: Path, way: str, tmp_path: Path) -> None:
    content = (run_dir / LORA).read_bytes()
    assert HubUploader(run_dir, "user/run", private=True).finish(commit_message="End of training")
    assert not (run_dir / PENDING_FILE).exists()
    assert hub.files("user/run")[LORA] == content

    stored = sum(path.stat().st_size for path in store.rglob("default.*"))
    if way == "xet":
        assert asked(hub, "objects/batch") == asked(hub, "lfs-storage") == 0
        assert 0.9 * len(content) < stored < 1.1 * len(content)
    else:
        assert asked(hub, "xet-write-token") == stored == 0
    # What a pointer says of it.
    (info,) = (each for each in HfApi().list_repo_tree("user/run") if each.path == LORA)
    assert isinstance(info, RepoFile)
    assert info.lfs is not None
    assert (info.lfs.sha256, info.lfs.size) == (hashlib.sha256(content).hexdigest(), len(content))

    hub.requests.clear()
    assert Path(hf_hub_download("user/run", LORA)).read_bytes() == content
    assert (pull("user/run", tmp_path / "pulled") / LORA).read_bytes() == content
    assert (asked(hub, "xet-read-token") > 0) == (way == "xet")
    assert (asked(hub, f"content-host/{hashlib.sha256(content).hexdigest()}") > 0) == (way == "lfs")

    # The same content again moves nothing.
    push_folder(run_dir, "user/copy", revision="first/try")
    assert sum(path.stat().st_size for path in store.rglob("default.*")) == stored
    assert hub.files("user/copy", branch="first/try")[LORA] == content


def test_dataset(hub: HubServer, store: Path, tmp_path: Path, write_latents: Callable[..., Path], way: str) -> None:
    source = write_latents(tmp_path / "data", 6)
    push_folder(source, "user/clips", repo_type="dataset", private=True)
    assert bool(list(store.rglob("default.*"))) == (way == "xet")
    pulled = pull("user/clips", tmp_path / "pulled", repo_type="dataset")
    ours, theirs = (load_latent_dataset(str(path)) for path in (source, pulled))
    assert ours[:].combine_chunks().equals(theirs[:].combine_chunks())


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        (401, "Invalid username or password.", "the token was refused"),
        (402, "Payment required: add a card", "the Hub answered 402: Payment required: add a card"),
        (403, "Private repository storage limit reached", "answered 403: Private repository storage limit reached"),
        (413, "File too large", "the Hub answered 413: File too large"),
    ],
)
def test_refusals_mean_the_same(
    hub: HubServer, run_dir: Path, way: str, caplog: pytest.LogCaptureFixture, status: int, message: str, reason: str
) -> None:
    """Whichever way is taken, before anything is moved: the Hub's own words, a `HubError`, and at once."""
    uploader = HubUploader(run_dir, "user/run")
    hub.fail("GET", "/xet-write-token/", status, message)
    hub.fail("POST", "/objects/batch", status, message)
    assert not uploader.finish(commit_message="End of training")
    with pytest.raises(HubError, match=f"{reason}.$"):
        push_folder(run_dir)
    # Refused at once: one request for each of the two.
    refused = [path for _, path, _ in hub.requests if re.search("/xet-write-token/|/objects/batch", path)]
    assert len(refused) == 2, refused
    assert reason in caplog.text
    assert reason in json.loads((run_dir / PENDING_FILE).read_text())["reason"]
    hub.faults.clear()
    push_folder(run_dir)
    assert hub.files("user/run")[LORA] == (run_dir / LORA).read_bytes()


@pytest.mark.parametrize("way", ["xet"], indirect=True)
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "the token was refused"),
        (402, "the Hub answered 402: Payment Required"),
        (403, "the Hub answered 403: Forbidden"),
        (413, "the Hub answered 413: (Request Entity|Payload|Content) Too Large"),
    ],
)
def test_refusals_of_the_storage(hub: HubServer, run_dir: Path, status: int, reason: str) -> None:
    """hf_xet passes on no words of the storage, only the status."""
    hub.offer_xet(hub.url)
    hub.fail("POST", "^/v1/", status, "not for you")
    hub.fail("GET", "^/v1/", 404)
    with pytest.raises(HubError, match=f"'{run_dir}' was not pushed to 'user/run': {reason}.$"):
        push_folder(run_dir, "user/run")
    stored = [path for method, path, _ in hub.requests if method == "POST" and path.startswith("/v1/")]
    assert len(stored) == len({*stored}) >= 1, stored
    assert hub.repos["models", "user/run"].messages == ["initial commit"]


@pytest.mark.parametrize("way", ["xet"], indirect=True)
def test_refusals_of_a_pull(hub: HubServer, run_dir: Path, store: Path, tmp_path: Path) -> None:
    push_folder(run_dir, "user/run")
    hub.fail("GET", "/xet-read-token/", 403, "Gated", times=1)
    with pytest.raises(HubError, match="'user/run' was not pulled: the Hub answered 403: Gated.$"):
        pull("user/run", tmp_path / "pulled")
    hub.offer_xet(hub.url)
    hub.fail("GET", "^/v[12]/", 403, "not for you")
    with pytest.raises(HubError, match="'user/run' was not pulled: the Hub answered 403: Forbidden.$"):
        pull("user/run", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("way", ["xet"], indirect=True)
def test_storage_that_is_not_there(hub: HubServer, run_dir: Path, tmp_path: Path) -> None:
    """In a process of its own, whose environment says how long hf_xet waits before it tries again."""
    hub.offer_xet("http://127.0.0.1:1")
    environment = os.environ | client_environment(hub, tmp_path / "home") | {"HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms"}
    command = [sys.executable, "-m", "hy_prfl.cli", "push", "--folder", str(run_dir), "--repo_id", "user/run"]
    finished = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert finished.returncode != 0
    assert f"'{run_dir}' was not pushed to 'user/run': the storage of {hub.url} cannot be reached (" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("way", ["xet"], indirect=True)
def test_a_fault_that_passes_is_tried_again_and_said(
    hub: HubServer, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    hub.fail("GET", "/xet-write-token/", 503, "Service Unavailable", times=1)
    push_folder(run_dir, "user/run")
    logging.getLogger("huggingface_hub").removeHandler(caplog.handler)
    assert "HTTP Error 503" in caplog.text
    assert "Retrying in 1" in caplog.text
    assert hub.files("user/run")[LORA] == (run_dir / LORA).read_bytes()


def test_repetitions_are_bounded() -> None:
    """hf_xet reads them from the environment; five of 3, 9, 27, .. seconds are its own."""
    assert os.environ.keys() >= repositories.XET_RETRIES.keys()
    attempts = int(repositories.XET_RETRIES["HF_XET_CLIENT_RETRY_MAX_ATTEMPTS"])
    delay = int(repositories.XET_RETRIES["HF_XET_CLIENT_RETRY_BASE_DELAY"].removesuffix("s"))
    assert sum(delay**index for index in range(1, attempts + 1)) <= 30


@pytest.mark.parametrize("way", ["lfs"], indirect=True)
def test_a_long_upload_says_that_it_lasts(
    hub: HubServer, run_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repositories, "SECONDS_BETWEEN_MESSAGES", 0.1)
    uploader = HubUploader(run_dir, "user/run")
    hub.gate.clear()
    uploader.upload(commit_message="Step 1")
    deadline = time.monotonic() + 30
    while caplog.text.count("The upload to 'user/run' is still running") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    hub.gate.set()
    assert uploader.finish(commit_message="End")
