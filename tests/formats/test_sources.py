"""What is said of a model that cannot be read, by the Hub's own client against a server of our own or against none."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import http_backoff

from hy_prfl.formats.pipeline_info import PipelineInfo
from hy_prfl.formats.sources import reading
from hy_prfl.inference.pipelines import load_pipeline
from hy_prfl.models.loading import read_reward_config
from tests.hub.hub_server import HubServer, running_hub, use_in_this_process


NAME = "outputs/rewrd"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        use_in_this_process(server, tmp_path / "home", monkeypatch)
        yield server


def unread(reason: str, option: str = "reward_model", name: str = NAME) -> str:
    """Pattern of the message."""
    return rf"^`{option}`: there is no file or folder '{name}' here, and as a repository on the Hub it cannot be read: {reason}\.$"


def test_a_folder_that_holds_something_else(pipeline_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^`reward_model` '{tmp_path}': .*config\.json"):
        read_reward_config(str(tmp_path), option="reward_model")
    folder = str(pipeline_dir / "transformer")
    expected = (
        f"`reward_models` '{folder}' is not a reward model: {folder}: expected a WanRewardModel, found a WanTransf"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        read_reward_config(folder, option="reward_models")
    with pytest.raises(FileNotFoundError, match=rf"^`pretrained_model_name_or_path` '{folder}': .*model_index\.json"):
        PipelineInfo.read(folder)


def test_offline(pipeline_dir: Path) -> None:
    """The tests run so. diffusers would say that the repository has no config.json."""
    reason = "HF_HUB_OFFLINE is set, and it is not in the cache"
    with pytest.raises(FileNotFoundError, match=unread(reason)):
        read_reward_config(NAME, option="reward_model")
    with pytest.raises(FileNotFoundError, match=unread(reason, "pretrained_model_name_or_path")):
        PipelineInfo.read(NAME)
    for option in ("lora_path", "transformer_path"):
        with pytest.raises(FileNotFoundError, match=unread(reason, option)):
            load_pipeline(str(pipeline_dir), **{option: NAME})  # type: ignore[arg-type]


def test_no_such_repository(hub: HubServer, pipeline_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match=unread(".*not a valid model identifier.*")):
        read_reward_config(NAME, option="reward_model")
    with pytest.raises(FileNotFoundError, match=unread("the Hub answered 404: .*", "lora_path")):
        load_pipeline(str(pipeline_dir), lora_path=NAME)
    # A repository without the file.
    HfApi().create_repo("user/rewrd")
    expected = unread(r".*does not appear to have a file named config\.json", name="user/rewrd")
    with pytest.raises(FileNotFoundError, match=expected):
        read_reward_config("user/rewrd", option="reward_model")


def test_no_network(hub: HubServer) -> None:
    """Without the client's repetitions, which last half a minute. The client raises two kinds of errors."""
    with pytest.raises(FileNotFoundError, match=unread(rf"{hub.url} cannot be reached \(.*refused\)")):
        with reading("reward_model", NAME):
            http_backoff("GET", "http://127.0.0.1:1", max_retries=0)
    with pytest.raises(FileNotFoundError, match=unread(f"{hub.url} cannot be reached, and it is not in the cache")):
        with reading("reward_model", NAME):
            hf_hub_download(NAME, "config.json", local_files_only=True)


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="^mine$"), reading("transformer_path", NAME):
        raise ValueError("mine")
