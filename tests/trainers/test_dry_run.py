"""A dry run makes the step that the real run would make, says what it took, and leaves nothing behind."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.data.dataset import load_latent_dataset, read_columns
from hy_prfl.data.encoding import vae_fingerprint
from hy_prfl.data.synthetic import synthetic_dataset
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.trainers.dry_run import dry_run, write_inputs
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return scratch


def reward_config(tmp_path: Path, pipeline_dir: Path, **options: object) -> RewardTrainingConfig:
    values = {"train_dataset": str(tmp_path / "none"), "num_layers": 2, "dry_run": True, "dry_run_size": [9, 32, 48]}
    return RewardTrainingConfig(
        output_dir=str(tmp_path / "out"), pretrained_model_name_or_path=str(pipeline_dir), **(values | options)
    )


@pytest.mark.parametrize("loss", ["bce", "bt"])
def test_reward(tmp_path: Path, pipeline_dir: Path, scratch: Path, loss: str) -> None:
    # A run that would log, validate and resume does none of it.
    report = dry_run(
        RewardTrainer.from_config,
        reward_config(
            tmp_path, pipeline_dir, loss=loss, train_batch_size=3, gradient_accumulation_steps=2,
            validation_dataset=str(tmp_path / "none"), push_to_hub=True, hub_model_id="nobody/nothing",
        ),
    )  # fmt: skip
    assert report.latents_shape == (16, 3, 4, 6)
    assert {"loss", "accuracy", "grad_norm"} == set(report.metrics)
    assert report.metrics["grad_norm"] > 0
    assert report.step_seconds > 0
    assert report.step_memory >= report.loading_memory > 0
    assert "latents 16 x 3 x 4 x 6, 1 process(es), engine whole" in str(report)
    assert not (tmp_path / "out").exists()
    assert not list(scratch.iterdir())


def test_reward_on_the_largest_clip_of_several_datasets(
    tmp_path: Path, pipeline_dir: Path, write_latents: Callable[..., Path], scratch: Path
) -> None:
    data = [write_latents(tmp_path / str(size), 2, shapes=((2, 4, size),)) for size in (4, 8, 6)]
    config = reward_config(
        tmp_path, pipeline_dir, dry_run_size=None, train_dataset=[str(path) for path in data],
        train_dataset_weights=[1.0, 2.0, 3.0], validation_dataset="none", validation_random_timesteps=5,
    )  # fmt: skip
    assert dry_run(RewardTrainer.from_config, config).latents_shape == (16, 2, 4, 8)


@pytest.mark.parametrize("image_to_video", [False, True])
def test_prfl_on_clips_as_large_as_the_largest(
    tmp_path: Path,
    pipeline_dir: Path,
    i2v_pipeline_dir: Path,
    write_latents: Callable[..., Path],
    scratch: Path,
    image_to_video: bool,
) -> None:
    data = write_latents(tmp_path / "data", 4, image_to_video=image_to_video, shapes=((2, 4, 4), (1, 6, 8), (1, 4, 4)))
    pipeline = i2v_pipeline_dir if image_to_video else pipeline_dir
    before = sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*"))
    transformer = WanTransformer3DModel.from_pretrained(pipeline, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=2).save_pretrained(tmp_path / "reward")
    config = PRFLTrainingConfig(
        output_dir=str(tmp_path / "out"),
        pretrained_model_name_or_path=str(pipeline),
        train_dataset=str(data),
        prompt_dataset=str(tmp_path / "none"),
        reward_model=str(tmp_path / "reward"),
        num_inference_steps=3,
        use_ema=True,
        lora_rank=2,
        dry_run=True,
    )
    report = dry_run(PRFLTrainer.from_config, config)
    assert report.latents_shape == (16, 1, 6, 8)
    assert report.metrics["flow_grad_norm"] > 0
    assert report.metrics["reward_grad_norm"] > 0
    assert report.reusing_seconds is None
    assert not (tmp_path / "out").exists()
    assert sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*")) == before


def test_a_step_that_reuses_rollouts_is_measured_too(tmp_path: Path, pipeline_dir: Path, scratch: Path) -> None:
    """The first step walks a whole chain, which most steps do not."""
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=2).save_pretrained(tmp_path / "reward")
    config = PRFLTrainingConfig(
        output_dir=str(tmp_path / "out"),
        pretrained_model_name_or_path=str(pipeline_dir),
        train_dataset=str(tmp_path / "none"),
        reward_model=str(tmp_path / "reward"),
        rollout_interval=8,
        update_schedule="reward",
        dry_run=True,
        dry_run_size=[9, 32, 48],
    )
    report = dry_run(PRFLTrainer.from_config, config)
    # 39 forwards and a step with gradient against the latter alone.
    assert report.reusing_seconds is not None
    assert 0 < report.reusing_seconds < 0.5 * report.step_seconds
    assert f"reusing step {report.reusing_seconds:10.1f} s, 7 of 8 are such" in str(report)


@pytest.mark.parametrize("size", [[8, 32, 48], [9, 30, 48], [9, 32, 52]])
def test_a_size_that_the_vae_cannot_encode(tmp_path: Path, pipeline_dir: Path, size: list[int]) -> None:
    with pytest.raises(ValueError, match="`dry_run_size` must be 4k . 1 frames, height and width multiples of 8, got"):
        dry_run(RewardTrainer.from_config, reward_config(tmp_path, pipeline_dir, dry_run_size=size))


def test_a_size_that_makes_no_patches(tmp_path: Path, pipeline_dir: Path) -> None:
    with pytest.raises(ValueError, match="cannot be divided into patches"):
        dry_run(RewardTrainer.from_config, reward_config(tmp_path, pipeline_dir, dry_run_size=[9, 40, 48]))


def test_a_dataset_of_first_frames_is_run_with_first_frames(tmp_path: Path, scratch: Path) -> None:
    """Wan2.2 TI2V 5B: the dataset tells whether its clips start with an image."""
    pipeline = tmp_path / "pipeline"
    build_pipeline(image_to_video=True, expand_timesteps=True).save_pretrained(pipeline)
    vae = AutoencoderKLWan.from_pretrained(pipeline, subfolder="vae")
    dataset = synthetic_dataset(
        latents_shape=(48, 3, 4, 4), condition_shape=(48, 1, 4, 4), text_dim=32, text_tokens=8,
        vae_fingerprint=vae_fingerprint(vae),
    )  # fmt: skip
    dataset.save_to_disk(tmp_path / "data")
    config = reward_config(tmp_path, pipeline, train_dataset=str(tmp_path / "data"), dry_run_size=None)
    assert write_inputs(config, tmp_path / "rows") == (48, 3, 4, 4)
    rows = load_latent_dataset(str(tmp_path / "rows"))
    assert [row["condition_shape"] for row in read_columns(rows, ["condition_shape"])] == [[48, 1, 4, 4]] * len(rows)
    assert dry_run(RewardTrainer.from_config, config).metrics["grad_norm"] > 0
