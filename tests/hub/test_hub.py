"""Everything here goes through the real client, over HTTP, to the server of `hub_server.py`."""

import copy
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from huggingface_hub import DatasetCard, HfApi, ModelCard

from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.formats.layout import LORA_FILES
from hy_prfl.hub import HubError, HubUploader, open_repo, pull, push_folder
from hy_prfl.hub.files import run_files, stage
from hy_prfl.hub.model_card import OWN_CARD
from hy_prfl.hub.repositories import PENDING_FILE
from hy_prfl.models.loading import load_reward_model
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.runtime.provenance import save_config
from tests.hub.hub_server import READER, STRANGER, HubServer


WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_reward_model(seed: int = 0) -> WanRewardModel:
    torch.manual_seed(seed)
    return WanRewardModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2,
        num_query_heads=2, head_dims=(16, 8), base_num_layers=3,
    ).eval()  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a run of `train_reward` leaves behind: two checkpoints, the best model, the last one."""
    run = tmp_path / "run"
    for seed, folder in enumerate(("best", "reward_model", "checkpoint-1/reward_model", "checkpoint-2/reward_model")):
        tiny_reward_model(seed).save_pretrained(run / folder)
    (run / "best" / "metrics.json").write_text(json.dumps({"global_step": 1, "accuracy/t400": 0.75, "accuracy": 0.75}))
    (run / "checkpoint-1" / "optimizer.bin").write_bytes(b"state")
    (run / "logs").mkdir()
    (run / "logs" / "events.out").write_bytes(b"log")
    config = RewardTrainingConfig(
        output_dir=str(run),
        pretrained_model_name_or_path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        train_dataset="data/train",
        validation_dataset="data/validation",
    )
    save_config(config, run / "config.yaml")
    lines = [{"step": step, "train/loss": 1 / step} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited for 30 seconds"
        time.sleep(0.02)


def test_reward_model_round_trip(hub: HubServer) -> None:
    first, second = tiny_reward_model(0), tiny_reward_model(1)
    first.push_to_hub("user/reward", private=True)
    first_commit = hub.repos["models", "user/reward"].branches["main"]
    HfApi().create_branch("user/reward", branch="old")
    second.push_to_hub("user/reward", commit_message="better")
    first.push_to_hub("user/reward", subfolder="early")

    # The Hub shows no code of diffusers, which would load it as a pipeline.
    assert ModelCard.load("user/reward").data.library_name == "hy-prfl"
    newest = WanRewardModel.from_pretrained("user/reward").eval()
    assert same_weights(newest, second)
    inputs = (torch.randn(2, 16, 3, 4, 4), torch.tensor([200.0, 900.0]), torch.randn(2, 5, 32))
    with torch.no_grad():
        # A copy, because mapped weights begin anywhere in memory, and that alone changes a CPU kernel's last bit.
        assert torch.equal(copy.deepcopy(newest)(*inputs).logits, second(*inputs).logits)
    assert same_weights(WanRewardModel.from_pretrained("user/reward", revision=first_commit), first)
    assert same_weights(WanRewardModel.from_pretrained("user/reward", revision="old"), first)
    assert same_weights(WanRewardModel.from_pretrained("user/reward", subfolder="early", token=READER), first)
    assert newest.config.task == "motion_quality"


def test_private_reward_model_needs_the_right_token(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_reward_model()
    model.push_to_hub("user/reward", private=True)
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, STRANGER):
        with pytest.raises(OSError, match="private repository"):
            WanRewardModel.from_pretrained("user/reward", token=token)
    assert same_weights(WanRewardModel.from_pretrained("user/reward", token=READER), model)


def test_a_run_goes_up_without_states(hub: HubServer, run_dir: Path) -> None:
    uploader = HubUploader(run_dir, "user/run", private=True)
    uploader.upload(commit_message="Step 1", weights_dir=run_dir / "checkpoint-1")
    assert uploader.finish(commit_message="End of training")

    files = hub.files("user/run")
    expected = {"config.json", WEIGHTS, "metrics.json", "config.yaml", "metrics.jsonl", "README.md", "training.png"}
    assert set(files) == expected
    assert files[WEIGHTS] == (run_dir / "best" / WEIGHTS).read_bytes()
    assert files["metrics.jsonl"] == (run_dir / "metrics.jsonl").read_bytes()
    assert hub.repos["models", "user/run"].private
    # The card is also where the run is, and nothing else is left there.
    assert (run_dir / "README.md").read_bytes() == files["README.md"]
    left = {path.name for path in run_dir.iterdir()}
    assert left == {
        "best", "reward_model", "checkpoint-1", "checkpoint-2", "logs", "config.yaml", "metrics.jsonl", "README.md",
        "training.png",
    }  # fmt: skip
    # An id is enough: for the class, and for the option `reward_model` of the trainer.
    assert same_weights(load_reward_model("user/run"), tiny_reward_model(0))


@pytest.mark.parametrize(
    ("removed", "weights_dir", "seed"),
    [((), None, 0), (("best",), None, 1), (("best",), "checkpoint-1", 2), (("best", "reward_model"), None, 3)],
)
def test_which_weights_go_up(run_dir: Path, removed: tuple[str, ...], weights_dir: str | None, seed: int) -> None:
    for name in removed:
        shutil.rmtree(run_dir / name)
    files = run_files(run_dir, None if weights_dir is None else run_dir / weights_dir)
    expected = tiny_reward_model(seed)
    assert same_weights(WanRewardModel.from_pretrained(files["config.json"].parent), expected)


def test_transformer_and_adapter_keep_the_names_that_pipelines_know(tmp_path: Path) -> None:
    (tmp_path / "lora" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "lora" / "checkpoint-4" / LORA_FILES["high_noise"]).write_bytes(b"adapter")
    assert run_files(tmp_path / "lora") == {
        LORA_FILES["high_noise"]: tmp_path / "lora" / "checkpoint-4" / LORA_FILES["high_noise"]
    }
    (tmp_path / "full" / "transformer").mkdir(parents=True)
    (tmp_path / "full" / "transformer" / "config.json").write_text("{}")
    assert set(run_files(tmp_path / "full")) == {"transformer/config.json"}
    with pytest.raises(ValueError, match="there is no trained model to push"):
        run_files(tmp_path)


def test_uploads_wait_in_the_background_and_survive_deletion(
    hub: HubServer, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shutil.rmtree(run_dir / "best")
    shutil.rmtree(run_dir / "reward_model")
    first = (run_dir / "checkpoint-1" / "reward_model" / WEIGHTS).read_bytes()
    uploader = HubUploader(run_dir, "user/run")
    hub.gate.clear()
    uploader.upload(commit_message="Step 1", weights_dir=run_dir / "checkpoint-1")
    wait_for(lambda: any(method == "PUT" for method, _, _ in hub.requests))

    # The first is in the middle of its weights; the second waits, the third takes its place.
    uploader.upload(commit_message="Step 2", weights_dir=run_dir / "checkpoint-2")
    assert json.loads((run_dir / PENDING_FILE).read_text())["commit_message"] == "Step 2"
    uploader.upload(commit_message="Step 3", weights_dir=run_dir / "checkpoint-2")
    shutil.rmtree(run_dir / "checkpoint-1")
    shutil.rmtree(run_dir / "checkpoint-2")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n')
    assert hub.repos["models", "user/run"].messages == ["initial commit"]
    hub.gate.set()
    wait_for(lambda: not (run_dir / PENDING_FILE).exists())

    repo = hub.repos["models", "user/run"]
    assert repo.messages == ["initial commit", "Step 1", "Step 3"]
    by_message = dict(zip(repo.messages, repo.commits.values(), strict=True))
    assert by_message["Step 1"][WEIGHTS].content == first
    assert by_message["Step 1"]["metrics.jsonl"].content.count(b"\n") == 2
    assert hub.files("user/run")[WEIGHTS] != first
    assert "'Step 3' replaces it" in caplog.text
    assert not list(run_dir.glob(".hub-*"))


def break_quota(hub: HubServer) -> None:
    hub.fail("POST", "objects/batch", 403, "Private repository storage limit reached")


def break_commit(hub: HubServer) -> None:
    hub.fail("POST", "/commit/", 500, "Internal Error")


def break_connection(hub: HubServer) -> None:
    hub.drop("POST", "/commit/")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_quota, "the Hub answered 403: Private repository storage limit reached"),
        (break_commit, "the Hub answered 500: Internal Error"),
        (break_connection, "cannot be reached"),
    ],
)
def test_what_could_not_be_pushed_is_finished_later(
    hub: HubServer, run_dir: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[HubServer], None], reason: str
) -> None:
    uploader = HubUploader(run_dir, "user/run", private=True)
    damage(hub)
    assert not uploader.finish(commit_message="End of training")
    assert reason in caplog.text
    assert f"hy-prfl push --folder {run_dir}" in caplog.text
    assert "Traceback" not in caplog.text
    pending = json.loads((run_dir / PENDING_FILE).read_text())
    assert (pending["repo_id"], pending["private"], pending["commit_message"]) == ("user/run", True, "End of training")
    assert reason in pending["reason"]
    assert not list(run_dir.glob(".hub-*"))

    with pytest.raises(HubError, match=reason):
        push_folder(run_dir)
    assert (run_dir / PENDING_FILE).exists()
    hub.faults.clear()
    push_folder(run_dir)
    assert not (run_dir / PENDING_FILE).exists()
    assert hub.repos["models", "user/run"].messages == ["initial commit", "End of training"]
    assert hub.files("user/run")[WEIGHTS] == (run_dir / "best" / WEIGHTS).read_bytes()


def test_no_network_at_the_start_is_a_warning(hub: HubServer, run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.drop("POST", "/api/repos/create", times=1)
    uploader = HubUploader(run_dir, "user/run", private=True)
    assert "Training continues" in caplog.text
    assert uploader.finish(commit_message="End of training")
    assert hub.repos["models", "user/run"].private


def test_a_killed_run_leaves_a_note_and_no_litter(hub: HubServer, run_dir: Path) -> None:
    uploader = HubUploader(run_dir, "user/run")
    hub.gate.clear()
    uploader.upload(commit_message="Step 2")
    pending = json.loads((run_dir / PENDING_FILE).read_text())
    assert pending["reason"] == "the upload did not finish"
    hub.gate.set()
    wait_for(lambda: not (run_dir / PENDING_FILE).exists())
    (run_dir / ".hub-litter").mkdir()
    HubUploader(run_dir, "user/run")
    assert not (run_dir / ".hub-litter").exists()


def test_what_the_user_must_correct_is_said_before_training(
    hub: HubServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("other/theirs")
    hub.create("user/public")
    for repo_id, token, message in [
        ("user//run", None, "not a valid repository name"),
        ("user/run", "hf_expired", "the token was refused"),
        ("user/run", READER, "could not be created: .* rights to create"),
        ("user/public", READER, "exists, but this token may not write"),
        ("other/theirs", None, "exists, but this token may not write"),
        ("other/new", None, "could not be created: .* rights to create"),
    ]:
        with monkeypatch.context() as patch:
            if token is not None:
                patch.setenv("HF_TOKEN", token)
            with pytest.raises(ValueError, match=message):
                HubUploader(run_dir, repo_id)
    with pytest.raises(ValueError, match="public, but a private repository was requested"):
        HubUploader(run_dir, "user/public", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no Hugging Face token.*hf auth login"):
        HubUploader(run_dir, "user/run")
    assert set(hub.repos) == {("models", "other/theirs"), ("models", "user/public")}


def test_open_repo(hub: HubServer) -> None:
    assert open_repo("short") == "user/short"
    assert open_repo("short") == "user/short"
    assert open_repo("user/clips", repo_type="dataset", private=True) == "user/clips"
    assert hub.repos["datasets", "user/clips"].private
    hub.fail("POST", "/api/repos/create", 503, "Service Unavailable")
    with pytest.raises(HubError, match="'user/short' could not be opened: the Hub answered 503"):
        open_repo("user/short")


def test_staging_without_hard_links_copies(tmp_path: Path) -> None:
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        staged = stage({f"transformer/{WEIGHTS}": tmp_path / WEIGHTS}, Path(folder))
        (tmp_path / WEIGHTS).write_bytes(b"others")
        assert staged[f"transformer/{WEIGHTS}"].read_bytes() == b"weights"


def test_a_card_of_ones_own_is_left_alone(hub: HubServer, run_dir: Path) -> None:
    (run_dir / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    push_folder(run_dir, "user/run")
    assert hub.files("user/run")["README.md"] == b"---\nlicense: mit\n---\n\nMine.\n"
    (run_dir / "README.md").write_text(OWN_CARD)
    push_folder(run_dir, "user/run")
    assert b"WanRewardModel" in hub.files("user/run")["README.md"]


def test_push_of_a_model_folder_to_a_branch(hub: HubServer, run_dir: Path) -> None:
    url = push_folder(run_dir / "best", "user/best", revision="v1", commit_message="First")
    repo = hub.repos["models", "user/best"]
    assert url.endswith(repo.branches["v1"])
    assert repo.branches["v1"] != repo.branches["main"]
    assert WEIGHTS in hub.files("user/best", branch="v1")
    assert hub.files("user/best") == {}


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("nothing", {"repo_id": "user/x"}, "there is no folder"),
        ("run", {}, "`repo_id` must be given"),
        ("run/logs", {"repo_id": "user/x"}, "neither a run nor a folder with a model"),
        ("run", {"repo_id": "user/x", "repo_type": "dataset"}, "no dataset written by `preprocess`"),
        ("run", {"repo_id": "x/y/z"}, "not a valid repository name"),
    ],
)
def test_push_refuses(hub: HubServer, run_dir: Path, folder: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        push_folder(run_dir.parent / folder, **options)  # type: ignore[arg-type]
    assert not hub.requests


def test_a_whole_pipeline_is_not_pushed_as_a_result(hub: HubServer, pipeline_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"is a whole pipeline \(model_index\.json\)\. Push the run"):
        push_folder(pipeline_dir, "user/x")
    with pytest.raises(ValueError, match="is the transformer itself. Push the folder that contains it"):
        push_folder(pipeline_dir / "transformer", "user/x")
    assert not hub.requests


@pytest.mark.parametrize("image_to_video", [False, True])
def test_latent_dataset_round_trip(
    hub: HubServer, tmp_path: Path, write_latents: Callable[..., Path], image_to_video: bool
) -> None:
    shapes = ((2, 4, 4), (1, 4, 6))
    overrides = {1: {"human_quality": None}, 2: {"pair_id": "scene"}}
    source = write_latents(tmp_path / "data", 6, image_to_video=image_to_video, shapes=shapes, overrides=overrides)
    push_folder(source, "user/clips", private=True, repo_type="dataset", commit_message="Six clips")
    assert hub.repos["datasets", "user/clips"].messages[-1] == "Six clips"
    with pytest.raises(ValueError, match="`repo_type` is 'model', but .* is a dataset"):
        push_folder(source, "user/clips")

    # The Hub tells by the files that it is one for `datasets`; its code, `load_dataset(id)`, is that of the next lines.
    assert DatasetCard.load("user/clips").data.get("library_name") is None
    ours = load_latent_dataset(str(source))
    by_id = load_latent_dataset("user/clips")
    pulled = load_latent_dataset(str(pull("user/clips", tmp_path / "pulled", repo_type="dataset")))
    for theirs in (by_id, pulled):
        assert theirs.features == ours.features
        assert len(theirs) == 6
        for index in range(6):
            assert theirs[index].combine_chunks().equals(ours[index].combine_chunks())
        assert theirs[0].schema.field("latents").type.value_type == pa.float16()


def test_pull_is_complete_or_absent_and_goes_on(hub: HubServer, run_dir: Path, tmp_path: Path) -> None:
    push_folder(run_dir, "user/run")
    repo = hub.repos["models", "user/run"]
    weights = repo.commits[repo.branches["main"]][WEIGHTS]
    hub.fail("GET", f"/content-host/{weights.sha256}", 403, "Forbidden")
    with pytest.raises(HubError, match="'user/run' was not pulled: the Hub answered 403"):
        pull("user/run", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    (partial,) = tmp_path.glob(".pulled.*.partial")
    assert (partial / "config.json").is_file()

    hub.faults.clear()
    hub.requests.clear()
    # Cut off after 1000 bytes: the client asks for the rest.
    hub.drop("GET", "/content-host/", after_bytes=1000, times=1)
    assert pull("user/run", tmp_path / "pulled") == tmp_path / "pulled"
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    assert not any(path.endswith("config.json") for path in fetched)
    pulled = {p.relative_to(tmp_path / "pulled").as_posix() for p in (tmp_path / "pulled").rglob("*") if p.is_file()}
    assert pulled == set(hub.files("user/run")) | {".gitattributes"}
    assert (tmp_path / "pulled" / WEIGHTS).read_bytes() == weights.content
    assert not list(tmp_path.glob(".pulled*"))


def test_pull_of_a_revision_and_of_a_folder(hub: HubServer, tmp_path: Path) -> None:
    first, second = tiny_reward_model(0), tiny_reward_model(1)
    first.push_to_hub("user/reward", private=True)
    commit = hub.repos["models", "user/reward"].branches["main"]
    second.push_to_hub("user/reward")
    second.push_to_hub("user/reward", subfolder="early/best")
    old = pull("user/reward", tmp_path / "old", revision=commit)
    assert same_weights(WanRewardModel.from_pretrained(old), first)
    folder = pull("user/reward", tmp_path / "folder", subfolder="early/best", token=READER)
    assert {path.name for path in folder.iterdir()} == {"config.json", WEIGHTS}
    assert same_weights(WanRewardModel.from_pretrained(folder), second)

    for options, error, message in [
        ({"revision": "no-such"}, HubError, "there is no such revision"),
        ({"token": STRANGER}, HubError, "there is no such repository, or this token has no access to it"),
        ({"token": "hf_expired"}, HubError, "the token was refused"),
        ({"subfolder": "late"}, ValueError, "there is no folder 'late'"),
    ]:
        with pytest.raises(error, match=message):
            pull("user/reward", tmp_path / "none", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="`output_dir`.*not an empty folder"):
        pull("user/reward", tmp_path / "old")


def test_offline_is_said(hub: HubServer, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        pull("user/run", tmp_path / "pulled")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_folder(run_dir, "user/run")
    assert not hub.requests
