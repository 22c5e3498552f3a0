import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from hy_prfl.compatibility import check_dataset_fits
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.data.encoding import LatentEncoder
from hy_prfl.data.manifest import ManifestRow
from hy_prfl.data.preprocessing import ClipSettings
from hy_prfl.data.schema import latent_features, pack_tensor, rows_to_table
from hy_prfl.data.video import VideoError, read_video, to_float
from hy_prfl.evaluation.scoring import (
    score_dataset,
    score_latents,
    score_manifest,
    score_rows,
    score_videos,
)
from hy_prfl.flow_matching import row_noise
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_reward_model
from hy_prfl.models.reward_model import WanRewardModel


TIMESTEPS = [201, 600, 1000]
TEXT_LEN = 16
CLIP_SETTINGS = ClipSettings(fps=16, num_frames=9, min_num_frames=9, buckets=((32, 48),), tensor_dtype="float32")


def make_reward_model(image_to_video: bool = False, **options: Any) -> WanRewardModel:
    transformer = build_pipeline(image_to_video=image_to_video, num_layers=3).transformer
    torch.manual_seed(3)
    reward_model = WanRewardModel.from_transformer(transformer, num_layers=2, **options)
    for layer in (reward_model.head.linear_1, reward_model.head.linear_2, reward_model.head.linear_3):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return reward_model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def reward_model() -> WanRewardModel:
    return make_reward_model()


@pytest.fixture(scope="module")
def i2v_reward_model() -> WanRewardModel:
    return make_reward_model(image_to_video=True)


def make_row(index: int, shape: tuple[int, ...] = (16, 2, 4, 6), **arrays: np.ndarray | None) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    tensors: dict[str, np.ndarray | None] = {
        "latents": rng.normal(size=shape),
        "prompt_embeds": rng.normal(size=(3 + index, 32)),
        "null_prompt_embeds": rng.normal(size=(1, 32)),
        "long_prompt_embeds": None,
        "condition": rng.normal(size=(20, *shape[1:])),
        "image_embeds": rng.normal(size=(5, 32)),
    }
    row: dict[str, Any] = {"id": f"row{index}", "prompt": f"prompt {index}", "max_sequence_length": TEXT_LEN}
    row |= {"physics_quality": index % 2, "human_quality": 1, "vae_fingerprint": "vae", "num_frames": 5}
    for name, array in (tensors | arrays).items():
        row |= pack_tensor(name, array, "float32", source=row["id"])
    return row


def make_dataset(rows: list[dict[str, Any]]) -> Dataset:
    table = rows_to_table(rows, "float32")
    return Dataset.from_dict(table.to_pydict(), features=latent_features("float32")).with_format("arrow")


def expected_logits(
    reward_model: WanRewardModel, row: dict[str, Any], timestep: float, seed: int = 0, draw: int = 0
) -> float:
    """One forward of the model on inputs that are put together by hand."""
    tensors = {name: torch.from_numpy(row[name]).float().reshape(row[f"{name}_shape"]) for name in ("latents",)}
    latents, sigma = tensors["latents"], timestep / 1000
    noise = row_noise(row["id"], latents.shape, seed=seed, draw=draw)
    hidden_states = (1 - sigma) * latents + sigma * noise
    prompt_embeds = torch.zeros(TEXT_LEN, 32)
    tokens = torch.from_numpy(row["prompt_embeds"]).float().reshape(-1, 32)
    prompt_embeds[: len(tokens)] = tokens
    image_embeds = None
    if reward_model.config.image_dim is not None:
        condition = torch.from_numpy(row["condition"]).float().reshape(row["condition_shape"])
        hidden_states = torch.cat([hidden_states, condition])
        image_embeds = torch.from_numpy(row["image_embeds"]).float().reshape(1, *row["image_embeds_shape"])
    output = reward_model(
        hidden_states=hidden_states[None],
        timestep=torch.tensor([float(timestep)]),
        encoder_hidden_states=prompt_embeds[None],
        encoder_hidden_states_image=image_embeds,
    )
    return output.logits.item()


class TestScoreRows:
    def test_each_logit_is_that_of_the_model(self, reward_model: WanRewardModel) -> None:
        rows = [make_row(index) for index in range(3)]
        logits = score_rows(reward_model, rows, TIMESTEPS, seed=4)
        expected = [[expected_logits(reward_model, row, timestep, seed=4) for timestep in TIMESTEPS] for row in rows]
        assert logits.dtype == torch.float32
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        assert np.std(expected) > 1e-3

    def test_mean_over_noises(self, reward_model: WanRewardModel) -> None:
        logits = score_rows(reward_model, [make_row(1)], [600], num_noise_samples=3)
        expected = [expected_logits(reward_model, make_row(1), 600, draw=draw) for draw in range(3)]
        assert logits.item() == pytest.approx(np.mean(expected), abs=1e-5)
        assert len(set(expected)) == 3

    def test_image_to_video(self, i2v_reward_model: WanRewardModel) -> None:
        logits = score_rows(i2v_reward_model, [make_row(1)], TIMESTEPS)
        expected = [expected_logits(i2v_reward_model, make_row(1), timestep) for timestep in TIMESTEPS]
        np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-5)

    def test_text_to_video_model_ignores_images(self, reward_model: WanRewardModel) -> None:
        plain = make_row(1, condition=None, image_embeds=None)
        assert torch.equal(score_rows(reward_model, [plain]), score_rows(reward_model, [make_row(1)]))

    @pytest.mark.parametrize("kind", ["reward_model", "i2v_reward_model"])
    def test_half_precision(self, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        reward_model = request.getfixturevalue(kind)
        rows = [make_row(1), make_row(2)]
        reward_model.save_pretrained(tmp_path)
        half = load_reward_model(str(tmp_path), dtype=torch.bfloat16)
        assert half.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        logits = score_rows(half, rows, TIMESTEPS)
        np.testing.assert_allclose(logits, score_rows(reward_model, rows, TIMESTEPS), rtol=0.05, atol=0.1)

    def test_image_embeds_are_cast_to_the_type_of_the_model(self, i2v_reward_model: WanRewardModel) -> None:
        half = copy.deepcopy(i2v_reward_model).to(torch.bfloat16)
        latents, prompt_embeds = torch.randn(1, 16, 2, 4, 6), torch.randn(1, TEXT_LEN, 32)
        given = Conditioning(prompt_embeds, torch.randn(1, 5, 32), torch.randn(1, 20, 2, 4, 6))
        expected = score_latents(i2v_reward_model, latents, given, TIMESTEPS, row_ids=["a"])
        given = given.with_prompts(prompt_embeds.bfloat16())
        logits = score_latents(half, latents, given, TIMESTEPS, row_ids=["a"])
        np.testing.assert_allclose(logits, expected, rtol=0.05, atol=0.02)


PROMPT = Conditioning(torch.zeros(1, 4, 32))


class TestScoreLatents:
    @pytest.mark.parametrize("timesteps", [[0], [1000.5], [-3], [600, 600], []])
    def test_timesteps(self, reward_model: WanRewardModel, timesteps: list[float]) -> None:
        with pytest.raises(ValueError, match="timesteps"):
            score_latents(reward_model, torch.zeros(1, 16, 2, 4, 6), PROMPT, timesteps, row_ids=["a"])

    def test_ids(self, reward_model: WanRewardModel) -> None:
        with pytest.raises(ValueError, match="an id for each of 2 rows, got 1"):
            score_latents(reward_model, torch.zeros(2, 16, 2, 4, 6), PROMPT, row_ids=["a"])

    def test_channels(self, reward_model: WanRewardModel) -> None:
        with pytest.raises(ValueError, match=r"`hidden_states` must be \(batch_size, 16"):
            score_latents(reward_model, torch.zeros(1, 8, 2, 4, 6), PROMPT, row_ids=["a"])


class TestScoreDataset:
    def test_rows_of_several_shapes_keep_their_order(self, reward_model: WanRewardModel, tmp_path: Path) -> None:
        shapes = [(16, 2, 4, 6), (16, 1, 4, 4), (16, 2, 4, 6), (16, 1, 4, 4), (16, 2, 4, 6)]
        rows = [make_row(index, shape) for index, shape in enumerate(shapes)]
        table = score_dataset(
            reward_model, make_dataset(rows), tmp_path / "scores.csv", TIMESTEPS, batch_size=2, request={}
        )
        assert [row["id"] for row in table] == [row["id"] for row in rows]
        assert [row["label"] for row in table] == [0, 1, 0, 1, 0]
        for row, found in zip(rows, table, strict=True):
            for timestep in TIMESTEPS:
                expected = expected_logits(reward_model, row, timestep)
                assert found[f"logit_t{timestep}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
                assert found[f"reward_t{timestep}"] == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-5)
        with open(tmp_path / "scores.csv", newline="") as file:
            assert [row["id"] for row in csv.DictReader(file)] == [row["id"] for row in rows]
        summary = json.loads((tmp_path / "scores.csv.summary.json").read_text())
        assert {"accuracy/t600", "auc/t600", "accuracy", "auc"} <= set(summary["metrics"])

    def test_dataset_that_does_not_fit(
        self, reward_model: WanRewardModel, i2v_reward_model: WanRewardModel, tmp_path: Path
    ) -> None:
        cases = [
            (make_reward_model(vae_fingerprint="other"), make_row(0), "`vae_fingerprint` vae against other"),
            (reward_model, make_row(0, (8, 2, 4, 6)), "row 'row0', `latents_shape`: the model takes 16, got 8"),
            (reward_model, make_row(0, prompt_embeds=np.zeros((3, 8))), "`prompt_embeds_shape`: the model takes 32"),
            (reward_model, make_row(0, latents=None), "have no latents"),
            (i2v_reward_model, make_row(0, condition=None), "'row0', `condition_shape`: the model takes 20, got 0"),
            (
                i2v_reward_model,
                make_row(0, condition=np.zeros((16, 2, 4, 6))),
                "`condition_shape`: the model takes 20, got 16",
            ),
            (i2v_reward_model, make_row(0, image_embeds=None), "`image_embeds_shape`: the model takes 32, got None"),
            (
                i2v_reward_model,
                make_row(0, image_embeds=np.zeros((5, 8))),
                "`image_embeds_shape`: the model takes 32, got 8",
            ),
        ]
        for model, row, message in cases:
            with pytest.raises(ValueError, match=message):
                score_dataset(model, make_dataset([row]), tmp_path / "scores.csv", request={})
        assert not list(tmp_path.iterdir())

    def test_unknown_vae_is_accepted(self, reward_model: WanRewardModel) -> None:
        check_dataset_fits(reward_model, make_dataset([make_row(0)]))
        check_dataset_fits(make_reward_model(vae_fingerprint="vae"), make_dataset([make_row(0)]))


@pytest.fixture(scope="module")
def encoder(pipeline_dir: Path) -> LatentEncoder:
    return LatentEncoder.from_pretrained(str(pipeline_dir), max_sequence_length=TEXT_LEN)


class TestVideos:
    def test_score_videos(
        self, reward_model: WanRewardModel, encoder: LatentEncoder, write_video: Callable[..., Path], tmp_path: Path
    ) -> None:
        paths = [write_video(tmp_path / f"{name}.mp4", seed=seed) for seed, name in enumerate("ab")]
        captions = ["a red circle", "a blue square"]
        logits = score_videos(reward_model, encoder, paths, captions, TIMESTEPS, clip_settings=CLIP_SETTINGS, seed=2)
        for path, caption, found in zip(paths, captions, logits, strict=True):
            latents = encoder.encode_video(to_float(read_video(path, fps=16, num_frames=9)))
            embeds = encoder.encode_prompt(caption)
            row = {"id": path.stem, "latents": latents.numpy(), "latents_shape": latents.shape}
            row["prompt_embeds"] = embeds.numpy()
            expected = [expected_logits(reward_model, row, timestep, seed=2) for timestep in TIMESTEPS]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_encoder_that_does_not_fit(
        self, i2v_reward_model: WanRewardModel, encoder: LatentEncoder, tmp_path: Path
    ) -> None:
        for model, message in [
            (i2v_reward_model, "image-to-video, the pipeline is text-to-video"),
            (make_reward_model(vae_fingerprint="other"), "`vae_fingerprint`"),
        ]:
            with pytest.raises(ValueError, match=message):
                score_videos(model, encoder, ["a.mp4"], ["a cat"])

    def test_missing_video(self, reward_model: WanRewardModel, encoder: LatentEncoder) -> None:
        with pytest.raises(VideoError, match=r"no file 'a\.mp4'"):
            score_videos(reward_model, encoder, ["a.mp4"], ["a cat"], clip_settings=CLIP_SETTINGS)

    def test_image_to_video(
        self,
        i2v_reward_model: WanRewardModel,
        i2v_pipeline_dir: Path,
        write_video: Callable[..., Path],
        tmp_path: Path,
    ) -> None:
        encoder = LatentEncoder.from_pretrained(str(i2v_pipeline_dir), max_sequence_length=TEXT_LEN)
        path = write_video(tmp_path / "a.mp4")
        logits = score_videos(i2v_reward_model, encoder, [path], ["a circle"], TIMESTEPS, clip_settings=CLIP_SETTINGS)
        frames = to_float(read_video(path, fps=16, num_frames=9))
        image_embeds, condition = encoder.encode_condition(frames)
        row = {"id": "a"}
        for name, tensor in [
            ("latents", encoder.encode_video(frames)),
            ("prompt_embeds", encoder.encode_prompt("a circle")),
            ("image_embeds", image_embeds),
            ("condition", condition),
        ]:
            row |= {name: tensor.numpy(), f"{name}_shape": tensor.shape}
        expected = [expected_logits(i2v_reward_model, row, timestep) for timestep in TIMESTEPS]
        np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-5)

    def test_manifest_with_bad_clips(
        self, reward_model: WanRewardModel, encoder: LatentEncoder, write_video: Callable[..., Path], tmp_path: Path
    ) -> None:
        good = write_video(tmp_path / "good.mp4")
        short = write_video(tmp_path / "short.mp4", num_frames=4)
        rows = [
            ManifestRow(where="1", id="missing", prompt="x", video=tmp_path / "none.mp4"),
            ManifestRow(where="2", id="good", prompt="a circle", video=good, labels={"physics_quality": 1}),
            ManifestRow(where="3", id="short", prompt="a circle", video=short),
            ManifestRow(where="4", id="mute", prompt="", video=good),
        ]
        table = score_manifest(
            reward_model, encoder, rows, tmp_path / "s.json", TIMESTEPS, clip_settings=CLIP_SETTINGS, request={}
        )
        assert [row["id"] for row in table] == ["missing", "good", "short", "mute"]
        for row, reason in zip(table, ["no file", None, "too short", "no caption"], strict=True):
            assert (row["error"] is None) == (reason is None)
            assert reason is None or reason in row["error"]
            assert (row["reward"] is None) == (reason is not None)
        expected = score_videos(reward_model, encoder, [good], ["a circle"], TIMESTEPS, clip_settings=CLIP_SETTINGS)
        assert [table[1][f"logit_t{timestep}"] for timestep in TIMESTEPS] == expected[0].tolist()


def test_saved_dataset(reward_model: WanRewardModel, tmp_path: Path) -> None:
    dataset = make_dataset([make_row(0), make_row(1)])
    dataset.with_format(None).save_to_disk(tmp_path / "dataset")
    loaded = load_latent_dataset(str(tmp_path / "dataset"))
    expected = score_dataset(reward_model, dataset, tmp_path / "a.csv", TIMESTEPS, request={})
    assert score_dataset(reward_model, loaded, tmp_path / "b.csv", TIMESTEPS, request={}) == expected
