"""The chain of commands on tiny pipelines of Wan 2.2's kinds: videos to latents, reward model, PRFL, new videos."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from PIL import Image

from hy_prfl.data.schema import table_to_rows
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.scripts import generate, preprocess, score, train_prfl, train_reward


KINDS: dict[str, dict[str, Any]] = {
    "t2v-a14b": {"boundary_ratio": 0.875},
    "i2v-a14b": {"boundary_ratio": 0.9, "image_to_video": True},
    "t2v-5b": {"expand_timesteps": True},
    "i2v-5b": {"expand_timesteps": True, "image_to_video": True},
}


def as_options(**values: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_chain(kind: str, tmp_path: Path, write_video: Callable[..., Path]) -> None:
    pipeline = tmp_path / "pipeline"
    build_pipeline(num_layers=3, **KINDS[kind]).save_pretrained(pipeline)
    is_pair, is_i2v = kind.endswith("a14b"), kind.startswith("i2v")
    clips = []
    for index in range(4):
        write_video(tmp_path / f"{index}.mp4", seed=index, height=64, width=96)
        label = index % 2
        clips.append(
            {"video": f"{index}.mp4", "caption": "a circle", "physics_quality": label, "human_quality": label}
        )
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    data = tmp_path / "data"
    preprocess.main(
        [
            *as_options(manifest=tmp_path / "clips.json", output_dir=data, num_frames=9, max_sequence_length=16),
            *as_options(pretrained_model_name_or_path=pipeline, buckets="64x96"),
        ]
    )
    rows = table_to_rows(load_from_disk(data).data.table)
    assert {tuple(row["latents_shape"]) for row in rows} == {(16, 3, 8, 12) if is_pair else (48, 3, 4, 6)}
    assert {row["image_embeds"] is None for row in rows} == {True}
    assert {row["condition"] is None for row in rows} == {not is_i2v}

    common = as_options(
        pretrained_model_name_or_path=pipeline, train_dataset=data, train_batch_size=2, max_train_steps=2,
        report_to="none",
    )  # fmt: skip
    expert = as_options(expert="low_noise") if is_pair else []
    train_reward.main([*common, *expert, *as_options(output_dir=tmp_path / "reward", num_layers=2)])
    reward_model = tmp_path / "reward" / "reward_model"
    expert = as_options(expert="both") if is_pair else []
    tuning = as_options(
        output_dir=tmp_path / "prfl", reward_model=reward_model, lora_rank=2, learning_rate=1e-2, num_inference_steps=6,
        validation_dataset=data, num_validation_samples=1, validation_videos=True,
    )  # fmt: skip
    train_prfl.main([*common, *expert, *tuning])
    assert (tmp_path / "prfl/validation/step-2/0000.mp4").is_file()

    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "a.png")
    (tmp_path / "prompts.json").write_text(json.dumps([{"caption": "a", "id": "a", **({"image": "a.png"} if is_i2v else {})}]))  # fmt: skip
    loras = {"lora_path": tmp_path / "prfl", **({"lora_2_path": tmp_path / "prfl"} if is_pair else {})}
    sampling = as_options(
        prompts=tmp_path / "prompts.json", output_dir=tmp_path / "videos", dtype="float32", num_frames=5,
        num_inference_steps=4, max_sequence_length=16, pretrained_model_name_or_path=pipeline, **loras,
    )  # fmt: skip
    generate.main([*sampling, "--height=64", "--width=96"])
    if not is_pair:
        with pytest.raises(ValueError, match="`height` must be a multiple of 32"):
            generate.main([*sampling, "--height=48", "--width=96", "--overwrite=true"])
    videos = tmp_path / "videos"
    score.main(
        [
            *as_options(manifest=videos / "manifest.json", reward_model=reward_model, output=tmp_path / "scores.csv"),
            *as_options(pretrained_model_name_or_path=pipeline, num_frames=5, max_sequence_length=16, buckets="64x96"),
        ]
    )
    assert (tmp_path / "scores.csv").read_text().count("\n") >= 2
