"""The reward of frames is the network on what the VAE decodes, and RGB ReFL climbs it; checked against plain torch."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from sklearn.metrics import roc_auc_score

from examples.shapes.experiments.frames_refl import FramesReFLConfig, build_trainer
from examples.shapes.experiments.frames_reward import (
    NETWORK,
    FramesReward,
    FramesRewardConfig,
    fold_frames,
    make_network,
    train,
)
from examples.shapes.experiments.pixel_rewards import ARMS, measure_cost, refl_stage, steps_at_equal_cost, write_noise
from examples.shapes.pretrain import PRETRAINED_DIR
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.data.encoding import vae_fingerprint
from hy_prfl.data.schema import table_to_rows, unpack_tensor
from hy_prfl.data.synthetic import synthetic_dataset
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_transformer
from hy_prfl.models.reward_model import WanRewardModel


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(PRETRAINED_DIR, subfolder="vae")


@pytest.fixture(scope="module")
def rows_dir(vae: AutoencoderKLWan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "rows"
    dataset = synthetic_dataset(
        latents_shape=(vae.config.z_dim, 2, 6, 6),
        text_dim=64,
        vae_fingerprint=vae_fingerprint(vae),
        text_tokens=4,
        max_sequence_length=16,
        num_rows=8,
    )
    dataset.save_to_disk(folder)
    return folder


def config(rows_dir: Path, output_dir: Path, decodes: str) -> FramesRewardConfig:
    return FramesRewardConfig(
        train_dataset=str(rows_dir),
        validation_dataset=str(rows_dir),
        output_dir=str(output_dir),
        decodes=decodes,  # type: ignore[arg-type]
        num_layers=2,
        train_batch_size=4,
        lr_warmup_steps=0,
        max_train_steps=2,
    )


def test_cubes_hold_each_pixel_once() -> None:
    frames = torch.randn(2, 3, 5, 16, 24)
    cubes = fold_frames(frames)
    assert cubes.shape == (2, 768, 2, 2, 3)
    padded = torch.cat([frames[:, :, :1]] * 3 + [frames], dim=2)
    for time, row, column in ((0, 0, 0), (1, 1, 2), (0, 1, 1)):
        cube = padded[:, :, 4 * time : 4 * time + 4, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        torch.testing.assert_close(cubes[:, :, time, row, column], cube.flatten(1))


@pytest.mark.parametrize("decodes", ["first", "all"])
def test_logits_are_those_of_the_pipelines_own_frames(vae: AutoencoderKLWan, decodes: str) -> None:
    network = make_network(str(PRETRAINED_DIR), num_layers=2, seed=0)
    reward = FramesReward(vae, network, decodes)  # type: ignore[arg-type]
    latents, prompts = torch.randn(2, vae.config.z_dim, 2, 6, 6, requires_grad=True), torch.randn(2, 16, 64)
    found = reward(latents, prompts)
    (found_grad,) = torch.autograd.grad(found.sum(), latents)

    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(vae.config[name]).view(shape) for name in ("latents_mean", "latents_std"))
    decoded = vae.decode((latents * std + mean)[:, :, : 1 if decodes == "first" else None]).sample
    expected = network(fold_frames(decoded), torch.zeros(2), prompts).logits
    (expected_grad,) = torch.autograd.grad(expected.sum(), latents)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-3, atol=1e-3 * float(expected_grad.abs().max()))
    assert (found_grad[:, :, 1].abs().max() > 0) == (decodes == "all")


def test_the_network_is_the_generators_but_for_what_takes_pixels() -> None:
    transformer = load_transformer(str(PRETRAINED_DIR))
    network = make_network(str(PRETRAINED_DIR), num_layers=2, seed=0)
    latent = WanRewardModel.from_transformer(transformer, num_layers=2).state_dict()
    for name, value in network.state_dict().items():
        if name.startswith(("blocks", "condition_embedder")):
            torch.testing.assert_close(value, latent[name])
    assert {name for name, value in network.state_dict().items() if value.shape != latent[name].shape} == {
        "patch_embedding.weight"
    }


def test_training_moves_the_network_alone(rows_dir: Path, vae: AutoencoderKLWan, tmp_path: Path) -> None:
    metrics = train(config(rows_dir, tmp_path, "all"))
    before = make_network(str(PRETRAINED_DIR), num_layers=2, seed=0).state_dict()
    trained = WanRewardModel.from_pretrained(tmp_path / NETWORK)
    # The last update of a cosine schedule of two is not of zero.
    moved = {name for name, value in trained.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in dict(trained.named_parameters()) if not name.startswith("condition_embedder")}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics

    reward = FramesReward(vae, trained, "all")
    dataset = load_latent_dataset(str(rows_dir))
    logits, labels = [], []
    for index in range(len(dataset)):
        (row,) = table_to_rows(dataset[index])
        tensors = [torch.from_numpy(unpack_tensor(row, name)).float() for name in ("latents", "prompt_embeds")]
        prompt = torch.nn.functional.pad(tensors[1], (0, 0, 0, 12))
        logits.append(reward(tensors[0][None], prompt[None]).item())
        labels.append(row["physics_quality"])
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits))


@pytest.fixture(scope="module")
def root(rows_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the experiments with untrained rewards of seed 0."""
    folder = tmp_path_factory.mktemp("experiments")
    pipeline = WanPipeline.from_pretrained(PRETRAINED_DIR)
    fingerprint = vae_fingerprint(pipeline.vae)
    latent = WanRewardModel.from_transformer(pipeline.transformer, num_layers=2, vae_fingerprint=fingerprint)
    latent.save_pretrained(folder / "reward_models" / "own_and_real_0" / "best")
    network = make_network(str(PRETRAINED_DIR), num_layers=2, seed=0)
    for arm in ("first_frame", "all_frames"):
        network.save_pretrained(folder / "frames_rewards" / f"{arm}_0" / NETWORK)
    (folder / "logs").mkdir()
    return folder


def test_refl_climbs_the_reward_of_the_clean_latents_it_foresees(root: Path, rows_dir: Path, tmp_path: Path) -> None:
    (tune, *_) = refl_stage(root, "all_frames", 0, num_steps=1).commands
    options = [*tune[tune.index("--config") :], "--output_dir", str(tmp_path), "--train_dataset", str(rows_dir)]
    trainer = build_trainer(parse_config(FramesReFLConfig, options))
    assert trainer.config.step_range == [13, 18]
    trainer.start_streams()
    batch = next(trainer.reward_batches).to(torch.device("cpu"))
    step = next(trainer.roll_out(batch.latents_shape, Conditioning.of(batch), 0))
    feedback = trainer.reward.differentiate(step, Conditioning.of(batch))
    latents_grad, logits = feedback.latents_grad, feedback.logits
    (surrogate,) = step.surrogates(latents_grad)
    torch.testing.assert_close(logits, trainer.reward.models[0](step.latents, batch.prompt_embeds))
    surrogate.backward()
    assert all(parameter.grad is None for parameter in trainer.reward.models[0].parameters())
    trainer.unwrapped.zero_grad()
    before = {name: value.clone() for name, value in trainer.unwrapped.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.unwrapped.named_parameters() if not torch.equal(value, before[name])}
    # The first factor of an adapter has no gradient while the second is zero; a pair of updates moves both.
    assert moved == {name for name, value in trainer.unwrapped.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("arm", ARMS)
def test_an_update_of_each_kind_is_measured(root: Path, arm: str) -> None:
    write_noise(root, 2)
    measure_cost(root, arm, 2)
    cost = json.loads((root / "costs" / f"{arm}_2.json").read_text())
    assert (cost["arm"], cost["num_frames"]) == (arm, 5)
    assert min(cost[name] for name in ("seconds", "peak_bytes", "flops")) > 0


def test_equal_cost_is_equal_time() -> None:
    seconds = {17: {"latents": 2.0, "all_frames": 3.2}, 33: {"latents": 9.0, "all_frames": 9.0}}
    costs = [
        {"arm": arm, "num_frames": num_frames, "seconds": value}
        for num_frames, arms in seconds.items()
        for arm, value in arms.items()
    ]
    latents, frames = (steps_at_equal_cost(costs, arm) for arm in ("latents", "all_frames"))
    assert abs(latents * 2.0 - frames * 3.2) <= 1.6 + 1e-9
