"""The scripts in examples/ run on the tiny pipeline, and what they report is computed again without them."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from datasets import load_from_disk
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from examples import (
    before_after,
    finetune_with_prfl,
    push_and_pull,
    reward_in_diffusers_loop,
    score_folder,
    train_reward_on_your_labels,
)
from hy_prfl import WanRewardModel
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.flow_matching import row_noise
from tests.hub.hub_server import HubServer


ROOT = Path(__file__).parents[2]
SIZE = ["--height=32", "--width=48", "--num_frames=9"]


@pytest.fixture
def pipeline(pipeline_dir: Path) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def reward_dir(tmp_path: Path, pipeline_dir: Path, tiny_vae: str) -> Path:
    """Folder of a reward model that no one trained."""
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    torch.manual_seed(1)
    model = WanRewardModel.from_transformer(transformer, num_layers=2, vae_fingerprint=tiny_vae)
    model.head.linear_3.weight.data.mul_(50)  # so that rewards differ
    model.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def reward_of(model: WanRewardModel, latents: torch.Tensor, prompt_embeds: torch.Tensor, timestep: float) -> float:
    with torch.no_grad():
        return model(latents, torch.tensor([float(timestep)]), prompt_embeds).logits.sigmoid().item()


def noised(latents: torch.Tensor, row_id: str, timestep: int) -> torch.Tensor:
    sigma = timestep / 1000
    return (1 - sigma) * latents + sigma * row_noise(row_id, latents.shape[1:], seed=0)[None]


def embed(pipeline: WanPipeline, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0]


def test_score_folder(
    pipeline: WanPipeline,
    pipeline_dir: Path,
    reward_dir: Path,
    write_video: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for index in range(3):
        write_video(tmp_path / "videos" / f"clip{index}.mp4", num_frames=9, height=32, width=32, seed=index)
    (tmp_path / "videos" / "clip1.txt").write_text("a square\n")
    rewards = score_folder.main(
        [
            f"--folder={tmp_path / 'videos'}",
            f"--reward_model={reward_dir}",
            f"--pretrained_model_name_or_path={pipeline_dir}",
            "--caption=moving",
            "--timesteps", "201", "800",
            "--num_frames=9",
            "--resolution=32",
        ]
    )  # fmt: skip
    model = WanRewardModel.from_pretrained(reward_dir).eval()
    vae = pipeline.vae
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    expected = {}
    for index, caption in enumerate(("moving", "a square", "moving")):
        frames = torch.from_numpy(decode(tmp_path / "videos" / f"clip{index}.mp4")).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            latents = (vae.encode(frames / 127.5 - 1).latent_dist.mode() - mean) / std
        expected[f"clip{index}.mp4"] = [
            reward_of(model, noised(latents, f"clip{index}", timestep), embed(pipeline, caption), timestep)
            for timestep in (201, 800)
        ]
    assert list(rewards) == list(expected)
    for name, values in expected.items():
        assert rewards[name] == pytest.approx(values, abs=2e-4)  # latents pass through float16
    table = [line.split() for line in capsys.readouterr().out.splitlines() if ".mp4" in line]
    assert [row[0] for row in table] == sorted(expected, key=lambda name: -sum(expected[name]))
    assert float(table[0][1]) == pytest.approx(np.mean(expected[table[0][0]]), abs=1e-3)


def test_train_reward_on_your_labels(
    pipeline_dir: Path, write_video: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "caption", "blur_quality"])
        for index in range(8):
            write_video(tmp_path / "videos" / f"{index}.mp4", num_frames=9, seed=index)
            writer.writerow([f"videos/{index}.mp4", f"square {index}", ["good", "poor", "1", "0"][index % 4]])
    trainer = train_reward_on_your_labels.main(
        [
            f"--labels={tmp_path / 'labels.csv'}",
            f"--output_dir={tmp_path / 'out'}",
            f"--pretrained_model_name_or_path={pipeline_dir}",
            "--task=blur_quality",
            "--num_frames=9",
            "--resolution=32",
            "--num_layers=2",
            "--max_train_steps=2",
            "--validation_share=0.25",
        ]
    )
    rows = load_from_disk(tmp_path / "out" / "data").with_format(None)
    assert {row["id"]: row["blur_quality"] for row in rows} == {str(index): 1 - index % 2 for index in range(8)}
    train, validation = (list(part.with_format(None)["id"]) for part in trainer.datasets.by_source().values())
    assert (len(train), len(validation)) == (6, 2)
    assert {*train, *validation} == {str(index) for index in range(8)}
    best = WanRewardModel.from_pretrained(tmp_path / "out" / "best")
    assert (best.config.task, best.config.num_layers) == ("blur_quality", 2)
    start = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    assert not torch.equal(best.blocks[0].attn1.to_q.weight, start.blocks[0].attn1.to_q.weight)
    assert torch.equal(best.patch_embedding.weight, start.patch_embedding.weight)
    metrics = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    assert metrics["accuracy"] == trainer.best_metric
    assert f"accuracy {trainer.best_metric:.2f}" in capsys.readouterr().out


def test_finetune_with_prfl(
    pipeline_dir: Path,
    reward_dir: Path,
    write_latents: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned = finetune_with_prfl.main(
        [
            f"--train_dataset={write_latents(tmp_path / 'data', 4)}",
            f"--reward_model={reward_dir}",
            f"--pretrained_model_name_or_path={pipeline_dir}",
            f"--output_dir={tmp_path / 'out'}",
            "--lora_rank=2",
            "--num_inference_steps=3",
            "--max_train_steps=2",
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert printed == [f"step {line['step']}: reward {line['train/reward']:.3f}" for line in lines]
    assert len(printed) == 2
    saved = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    loaded = get_peft_model_state_dict(tuned.transformer, adapter_name="default_0")
    assert {f"transformer.{name}" for name in loaded} == set(saved)
    for name, weight in loaded.items():
        assert torch.equal(weight.float(), saved[f"transformer.{name}"].to(weight.dtype).float()), name
    assert all(weight.abs().sum() > 0 for name, weight in saved.items() if "lora_B" in name)


def rollout_by_hand(pipeline_dir: Path, seed: int, prompt_embeds: torch.Tensor, num_steps: int) -> Iterator[tuple]:
    """Latents after each step and the timestep whose noise they have; the last ones are clean."""
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    scheduler = UniPCMultistepScheduler.from_pretrained(pipeline_dir, subfolder="scheduler")
    scheduler.set_timesteps(num_steps)
    levels = [*scheduler.timesteps.tolist(), 0]
    latents = torch.randn((1, 16, 3, 4, 6), generator=torch.Generator().manual_seed(seed))
    for index, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            velocity = transformer(latents, timestep[None], prompt_embeds, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        yield latents, levels[index + 1]


@pytest.mark.parametrize(("option", "value"), [("num_candidates", "0"), ("decide_at", "39")])
def test_options_of_the_diffusers_loop_are_checked(option: str, value: str) -> None:
    required = ["--prompt", "a", "--pretrained_model_name_or_path", "b", "--reward_model", "c"]
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        reward_in_diffusers_loop.main([*required, f"--{option}", value])


def test_reward_in_diffusers_loop(
    pipeline: WanPipeline, pipeline_dir: Path, reward_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = reward_in_diffusers_loop.main(
        [
            "--prompt=a square moves",
            f"--pretrained_model_name_or_path={pipeline_dir}",
            f"--reward_model={reward_dir}",
            f"--output={tmp_path / 'best.mp4'}",
            "--num_candidates=4",
            "--decide_at=2",
            "--num_inference_steps=5",
            "--guidance_scale=1",
            *SIZE,
        ]
    )
    model = WanRewardModel.from_pretrained(reward_dir).eval()
    prompt_embeds = embed(pipeline, "a square moves")
    to_beat, winner = 0.0, -1
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed ")]
    for seed, callback in enumerate(tried):
        chain = list(rollout_by_hand(pipeline_dir, seed, prompt_embeds, num_steps=5))
        rewards = [reward_of(model, latents, prompt_embeds, timestep) for latents, timestep in chain[:-1]]
        stopped = rewards[2] < to_beat
        assert callback.stopped == stopped
        # A chain that is stopped costs nothing more; one that goes on is judged while there is noise.
        assert list(callback.rewards) == list(range(3 if stopped else 4))
        assert list(callback.rewards.values()) == pytest.approx(rewards[: len(callback.rewards)], abs=1e-5)
        assert printed[seed].endswith("stopped") == stopped
        if not stopped:
            to_beat, winner = rewards[2], seed
    assert {callback.stopped for callback in tried} == {True, False}
    expected = pipeline(
        "a square moves", height=32, width=48, num_frames=9, num_inference_steps=5, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(winner),
    ).frames[0]  # fmt: skip
    assert abs(decode(tmp_path / "best.mp4") / 255 - expected).mean() < 0.03


def test_before_after(
    pipeline: WanPipeline, pipeline_dir: Path, reward_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    torch.manual_seed(0)
    adapted.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    WanPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=get_peft_model_state_dict(adapted))
    (tmp_path / "prompts.txt").write_text("a square\n\na circle\n")
    rewards = before_after.main(
        [
            f"--prompts={tmp_path / 'prompts.txt'}",
            f"--lora_path={tmp_path / 'lora'}",
            f"--reward_model={reward_dir}",
            f"--pretrained_model_name_or_path={pipeline_dir}",
            f"--output_dir={tmp_path / 'out'}",
            "--seed=3",
            "--timesteps", "400", "800",
            "--num_inference_steps=3",
            "--guidance_scale=2",
            *SIZE,
        ]
    )  # fmt: skip
    model = WanRewardModel.from_pretrained(reward_dir).eval()
    options: dict[str, Any] = {
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 3,
        "guidance_scale": 2,
    }
    for index, prompt in enumerate(("a square", "a circle")):
        halves = np.split(decode(tmp_path / "out" / f"{index:03d}.mp4") / 255, 2, axis=2)
        for half, version, transformer in zip(halves, rewards, (pipeline.transformer, adapted), strict=True):
            stock = WanPipeline.from_pretrained(pipeline_dir, transformer=transformer)
            latents = stock(prompt, generator=torch.Generator().manual_seed(3), output_type="latent", **options).frames
            video = stock(prompt, generator=torch.Generator().manual_seed(3), **options).frames[0]
            expected = [
                reward_of(model, noised(latents, str(index), timestep), embed(pipeline, prompt), timestep)
                for timestep in (400, 800)
            ]
            assert rewards[version][index] == pytest.approx(np.mean(expected), abs=1e-5)
            assert abs(half - video).mean() < 0.03
    assert rewards["before"] != pytest.approx(rewards["after"], abs=1e-4)
    assert "mean of 2 prompts" in capsys.readouterr().out


def test_push_and_pull(hub: HubServer, reward_dir: Path, write_latents: Callable[..., Path], tmp_path: Path) -> None:
    source = write_latents(tmp_path / "data", 4)
    model, dataset = push_and_pull.main(["--user=user", f"--reward_model={reward_dir}", f"--dataset={source}"])
    assert hub.repos["models", "user/my-reward-model"].private
    assert hub.repos["datasets", "user/my-latents"].private
    own = WanRewardModel.from_pretrained(reward_dir).state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())
    assert dataset.features == load_latent_dataset(str(source)).features
    assert dataset.with_format(None)["latents"][:] == load_from_disk(source).with_format(None)["latents"][:]


def test_every_script_is_in_the_table() -> None:
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in table
    for folder in (ROOT / "examples").glob("*/"):
        assert f"{folder.name}/" in table or folder.name == "__pycache__"
