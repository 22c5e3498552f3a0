"""What a run leaves behind for people: its record, its metrics, its trackers and its repository on the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanPipeline, WanTransformer3DModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hy_prfl
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.formats.lora_metadata import read_lora_metadata
from hy_prfl.hub import push_folder
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.trainers.base import Trainer
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer
from tests.hub.hub_server import HubServer, client_environment
from tests.pages.html import Page


FILES = {
    "best reward model": ("best/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
    "last reward model": ("reward_model/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
    "reward adapter": ("reward_model/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
    "adapter": ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors"),
    "transformer": ("transformer/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"),
    "average": ("transformer/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"),
}  # fmt: skip


@pytest.fixture
def build(
    tmp_path: Path, pipeline_dir: Path, tiny_vae: str, write_latents: Callable[..., Path]
) -> Callable[..., Trainer]:
    """Function that builds a short run of one kind of `FILES`."""
    write_latents(tmp_path / "train", 6)
    write_latents(tmp_path / "validation", 4, seed=1)
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    reward_model = WanRewardModel.from_transformer(transformer, num_layers=1, vae_fingerprint=tiny_vae)
    reward_model.save_pretrained(tmp_path / "reward")

    def builder(kind: str, **options: Any) -> Trainer:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "pretrained_model_name_or_path": str(pipeline_dir),
            "train_dataset": str(tmp_path / "train"),
            "validation_dataset": str(tmp_path / "validation"),
            "validation_timesteps": [200, 900],
            "validation_steps": 2,
            "train_batch_size": 2,
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "report_to": ["none"],
            "write_report": False,
        }
        if kind in ("last reward model", "reward adapter"):
            values["validation_dataset"] = None
        if kind in ("adapter", "reward adapter"):
            values["lora_rank"] = 2
        if "reward" in kind:
            return RewardTrainer.from_config(RewardTrainingConfig(**values | {"num_layers": 2} | options))
        values |= {"reward_model": str(tmp_path / "reward"), "num_inference_steps": 3, "use_ema": kind == "average"}
        return PRFLTrainer.from_config(PRFLTrainingConfig(**values | options))

    return builder


HUB_OPTIONS: dict[str, Any] = {
    "push_to_hub": True,
    "hub_private_repo": True,
    "hub_push_checkpoints": 2,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
}


@pytest.mark.parametrize("kind", FILES)
def test_a_run_is_on_the_hub_when_it_ends(
    hub: HubServer, build: Callable[..., Trainer], kind: str, tmp_path: Path
) -> None:
    build(kind, **HUB_OPTIONS).train()
    run, (local, remote) = tmp_path / "out", FILES[kind]
    files = hub.files("user/out")
    assert files[remote] == (run / local).read_bytes()
    assert {"README.md", "config.yaml", "metrics.jsonl", "run.json"} <= set(files)
    assert not any("optimizer" in name or "random_states" in name for name in files)
    assert hub.repos["models", "user/out"].messages[-1] == "Step 4, end of training"
    assert not (run / "hub_pending.json").exists()


@pytest.mark.parametrize("kind", ["best reward model", "adapter"])
def test_a_broken_hub_costs_no_training_and_push_finishes_it(
    hub: HubServer, build: Callable[..., Trainer], kind: str, tmp_path: Path
) -> None:
    hub.fail("POST", "/commit/", 503, "Service Unavailable")
    build(kind, **HUB_OPTIONS).train()
    run, (local, remote) = tmp_path / "out", FILES[kind]
    assert hub.repos["models", "user/out"].messages == ["initial commit"]
    assert "503" in json.loads((run / "hub_pending.json").read_text())["reason"]
    hub.faults.clear()
    push_folder(run)
    assert not (run / "hub_pending.json").exists()
    assert hub.files("user/out")[remote] == (run / local).read_bytes()


@pytest.mark.launch
def test_two_processes_push_once_and_stop_together(
    hub: HubServer,
    tmp_path: Path,
    pipeline_dir: Path,
    write_latents: Callable[..., Path],
    accelerate_launch: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in client_environment(hub, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    write_latents(tmp_path / "train", 8)
    options = [
        "--pretrained_model_name_or_path", pipeline_dir, "--train_dataset", tmp_path / "train", "--num_layers", 2,
        "--train_batch_size", 2, "--max_train_steps", 2, "--checkpointing_steps", 1, "--report_to", "none",
        "--push_to_hub", "--hub_push_checkpoints", 1,
    ]  # fmt: skip
    accelerate_launch(
        "train_reward", "--output_dir", tmp_path / "out", "--hub_model_id", "user/two", *options, num_processes=2
    )
    assert hub.repos["models", "user/two"].messages[-1] == "Step 2, end of training"
    assert sum(path == "/api/repos/create" for _, path, _ in hub.requests) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(RuntimeError, match="the token was refused"):
        accelerate_launch(
            "train_reward", "--output_dir", tmp_path / "other", "--hub_model_id", "user/three", *options,
            num_processes=2,
        )  # fmt: skip
    assert not (tmp_path / "other").exists()


def test_videos_curves_and_the_record_of_each_start(build: Callable[..., Trainer], tmp_path: Path) -> None:
    options = {"report_to": ["tensorboard"], "validation_videos": True, "num_validation_samples": 2}
    options["write_report"] = True
    build("adapter", max_train_steps=2, **options).train()
    build("adapter", max_train_steps=4, resume_from_checkpoint="latest", seed=0, **options).train()
    run = tmp_path / "out"
    events = sorted(run.rglob("events.out.tfevents*"))
    scalars: dict[str, list[tuple[int, float]]] = {}
    images: dict[str, list[int]] = {}
    for path in events:
        accumulator = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
        tags = accumulator.Tags()
        for tag in tags["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in accumulator.Scalars(tag))
        for tag in tags["images"]:
            images.setdefault(tag, []).extend(event.step for event in accumulator.Images(tag))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [(entry["step"], entry["train/reward_loss"]) for entry in metrics if "train/reward_loss" in entry]
    assert dict(scalars["train/reward_loss"]) == pytest.approx(dict(expected))
    for name in ("validation/0000", "validation/0001", "validation/by_timestep"):
        assert sorted(images[name]) == [2, 4], (name, sorted(images))

    first, second = json.loads((run / "run.json").read_text())
    assert first["seed"] == 0
    assert first["hy_prfl"] == hy_prfl.__version__
    assert first["started"] <= second["started"]
    # Of each process, none on a CPU.
    assert second["peak_gpu_memory"] == []

    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    # Two samples at two validations, the metrics of both kinds, and both starts.
    assert len(page.all("video")) == 4
    assert {"flow loss", "reward loss", "reward", "reward by noise level"} <= {
        image["alt"] for image in page.all("img")
    }
    assert any(text.startswith("start 2 of 2, ") for text in page.texts)


def test_the_adapter_tells_where_it_comes_from(
    build: Callable[..., Trainer], tmp_path: Path, pipeline_dir: Path
) -> None:
    build("adapter", lora_alpha=6.0).train()
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    known = read_lora_metadata(file)
    assert known["base_model"] == str(pipeline_dir)
    assert known["reward_model"] == str(tmp_path / "reward")
    assert (known["step"], known["run"], known["rank"], known["alpha"]) == ("4", "out", "2", "6")
    pipeline = WanPipeline.from_pretrained(pipeline_dir)
    pipeline.load_lora_weights(tmp_path / "out")
    config = pipeline.transformer.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (2, 6)
