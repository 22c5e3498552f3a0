"""PRFL on a pipeline of two experts, of which one or both train."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.data.collators import collate_latents
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.data.schema import table_to_rows
from hy_prfl.flow_matching import make_generator, row_noise
from hy_prfl.formats.lora_metadata import read_lora_metadata
from hy_prfl.trainers import prfl_inputs
from hy_prfl.trainers.prfl_trainer import FLOW_EXPERT, FLOW_NOISE, PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer


Build = Callable[..., PRFLTrainer]
EXPERTS = ("high_noise", "low_noise")
FOLDERS = {"high_noise": "transformer", "low_noise": "transformer_2"}


@pytest.fixture
def build(prfl_builder: Callable[..., Build], expert_pipeline_dir: Path) -> Build:
    """Function that builds a trainer of a pipeline of two experts; chains have six steps, some of each."""
    return partial(prfl_builder(expert_pipeline_dir, "transformer_2"), num_inference_steps=6)


def base(folder: Path, expert: str) -> dict[str, torch.Tensor]:
    return WanTransformer3DModel.from_pretrained(folder, subfolder=FOLDERS[expert]).state_dict()


@pytest.mark.parametrize("schedule", ["alternate", "joint"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_one_expert_trains_and_the_other_stays(
    build: Build, expert_pipeline_dir: Path, tmp_path: Path, expert: str, schedule: str
) -> None:
    trainer = build(expert=expert, update_schedule=schedule)
    assert set(trainer.frozen) == ({"high_noise"} if expert == "low_noise" else set())
    trainer.train()
    before = base(expert_pipeline_dir, expert)
    for name, value in trainer.unwrapped.state_dict().items():
        assert not torch.equal(value, before[name]), name
    for name, transformer in trainer.frozen.items():
        weights = base(expert_pipeline_dir, name)
        assert all(torch.equal(value, weights[key]) for key, value in transformer.state_dict().items())
        assert all(parameter.grad is None for parameter in transformer.parameters())
    other = FOLDERS[EXPERTS[1 - EXPERTS.index(expert)]]
    assert (tmp_path / "out" / FOLDERS[expert]).is_dir()
    assert not (tmp_path / "out" / other).exists()
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "out" / FOLDERS[expert]).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.unwrapped.state_dict().items())


def test_both_train_and_one_step_is_the_same_arithmetic_written_out(build: Build, expert_pipeline_dir: Path) -> None:
    """Flow matching over five micro-batches, each of one expert; then AdamW on both, with zero for who is not drawn."""
    trainer = build(
        expert="both", update_schedule="flow_matching", gradient_accumulation_steps=5, max_train_steps=3,
        prompt_dropout=0.0, flow_shift=5.0,
    )  # fmt: skip
    experts = {
        name: WanTransformer3DModel.from_pretrained(expert_pipeline_dir, subfolder=FOLDERS[name]) for name in EXPERTS
    }
    parameters = [parameter for model in experts.values() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    rows = table_to_rows(load_latent_dataset(trainer.config.train_dataset)[:])
    sampler = trainer.datasets.clip_sampler()
    batches = (collate_latents([rows[index] for index in indices]).to(torch.device("cpu")) for indices in sampler)
    share = sum(5 * u / (1000 + 4 * u) >= 0.875 for u in range(1, 1001)) / 1000
    drawn = []
    for global_step in range(3):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for micro_step in range(5):
            uniform = torch.rand((), generator=make_generator(0, FLOW_EXPERT, global_step, micro_step))
            name = "high_noise" if uniform < share else "low_noise"
            drawn.append(name)
            batch = next(batches)
            sigmas, noise = [], []
            for index in range(2):
                generator = make_generator(0, FLOW_NOISE, global_step, micro_step, index)
                while True:
                    u = 1 - torch.randint(1000, (1,), generator=generator) / 1000
                    sigma = 5 * u / (1 + 4 * u)
                    if (1000 * sigma >= 875) == (name == "high_noise"):
                        break
                sigmas.append(sigma)
                noise.append(torch.randn(batch.latents_shape, generator=generator))
            sigma, eps = torch.cat(sigmas), torch.stack(noise)
            assert batch.latents is not None
            weight = sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - weight) * batch.latents + weight * eps
            velocity = experts[name](noisy, 1000 * sigma, batch.prompt_embeds, return_dict=False)[0]
            (((velocity - (eps - batch.latents)) ** 2).mean() / 5).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert set(drawn) == set(EXPERTS)
    trainer.train()
    for name, model in experts.items():
        for key, value in trainer.experts.parts(trainer.unwrapped)[name].named_parameters():
            expected = model.get_parameter(key)
            assert (value - expected).norm() / expected.norm() < 1e-4, key


def test_an_expert_without_a_gradient_is_moved_by_the_averages_of_adamw(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates, of the high-noise and of the low-noise expert: in the second one AdamW's averages go on for both."""
    trainer = build(expert="both", update_schedule="flow_matching")
    order = iter(EXPERTS)
    monkeypatch.setattr(trainer, "draw_expert", lambda micro_step: next(order))
    trainer.start_streams()
    trainer.train_step()
    weights = {
        name: value.detach().clone()
        for name, value in trainer.experts.parts(trainer.unwrapped)["high_noise"].named_parameters()
    }
    states = trainer.updates.optimizer.state
    averages = {
        name: {key: states[value][key].clone() for key in ("exp_avg", "exp_avg_sq")}
        for name, value in trainer.experts.parts(trainer.unwrapped)["high_noise"].named_parameters()
    }
    trainer.train_step()
    for name, value in trainer.experts.parts(trainer.unwrapped)["high_noise"].named_parameters():
        mean, square = 0.9 * averages[name]["exp_avg"], 0.999 * averages[name]["exp_avg_sq"]
        step = (mean / (1 - 0.9**2)) / ((square / (1 - 0.999**2)).sqrt() + 1e-8)
        torch.testing.assert_close(value, weights[name] * (1 - 1e-3 * 0.01) - 1e-3 * step, msg=name)


def test_noise_levels_and_steps_are_those_of_the_experts_in_training(build: Build, tmp_path: Path) -> None:
    trainers = {name: build(expert=name, output_dir=str(tmp_path / name)) for name in (*EXPERTS, "both")}
    trainers["both"].scheduler.set_timesteps(6)
    is_high = [timestep >= 875 for timestep in trainers["both"].scheduler.timesteps.tolist()]
    first_low = is_high.index(False)
    assert 0 < first_low < 4
    steps: dict[str, set[int]] = {name: set() for name in trainers}
    sides: dict[str, list[bool]] = {name: [] for name in trainers}
    for name, trainer in trainers.items():
        trainer.start_streams()
        batch = next(trainer.flow_batches).to(torch.device("cpu"))
        for trainer.global_step in range(60):
            steps[name].update(trainer.draw_step_indices(0))
            timestep_range = trainer.experts.timesteps_of(trainer.draw_expert(0))
            _, sigmas = trainer.draw_noise(FLOW_NOISE, 0, batch, timestep_range)
            side = (1000 * sigmas >= 875).tolist()
            assert len(set(side)) == 1
            sides[name].append(side[0])
    assert steps == {
        "high_noise": set(range(first_low)),
        "low_noise": set(range(first_low, 5)),
        "both": set(range(5)),
    }
    assert all(sides["high_noise"])
    assert not any(sides["low_noise"])
    assert sum(sides["both"]) / 60 == pytest.approx(trainers["both"].high_noise_probability, abs=0.2)


def test_options_that_do_not_fit_are_refused_before_anything_large_is_loaded(
    build: Build, monkeypatch: pytest.MonkeyPatch, pipeline_dir: Path
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this loads weights")

    monkeypatch.setattr(prfl_inputs, "load_transformer", refuse)
    monkeypatch.setattr(prfl_inputs, "load_reward_model", refuse)
    with pytest.raises(ValueError, match=r"`expert` must be high_noise, low_noise or both, .*model_index.json"):
        build()
    with pytest.raises(ValueError, match=r"`expert` must be left out, .*model_index.json has one transformer"):
        build(expert="both", pretrained_model_name_or_path=str(pipeline_dir))
    with pytest.raises(ValueError, match=r"`step_range` must be within \[0, 1\], the steps of high_noise"):
        build(expert="high_noise", step_range=[0, 4])
    with pytest.raises(ValueError, match=r"`num_gradient_steps` must be in \[1, 2\], the steps of high_noise"):
        build(expert="high_noise", num_gradient_steps=3)
    with pytest.raises(
        ValueError,
        match=r"`weighting_scheme` must be one that draws more than 1 in 10,000 noise levels for `expert` high",
    ):
        build(expert="high_noise", weighting_scheme="logit_normal", logit_mean=-20.0)
    with pytest.raises(ValueError, match="`shard_frozen_expert` must be false unless `expert` is high_noise or low"):
        build(expert="both", shard_frozen_expert=True)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "learning_rate": 1e-2}])
def test_saved_experts_and_average_resume_as_if_never_stopped(
    build: Build, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = options | {"expert": "both", "use_ema": True, "ema_decay": 0.5, "num_gradient_steps": 2}
    whole = build(output_dir=str(tmp_path / "whole"), max_train_steps=4, checkpointing_steps=2, **options)
    whole.train()
    parts = tmp_path / "parts"
    build(output_dir=str(parts), max_train_steps=2, checkpointing_steps=2, **options).train()
    second = build(
        output_dir=str(parts), max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest", **options
    )
    second.train()
    for (name, value), other in zip(
        whole.unwrapped.state_dict().items(), second.unwrapped.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert whole.average is not None
    assert second.average is not None
    assert all(map(torch.equal, whole.average.ema.shadow_params, second.average.ema.shadow_params))


@pytest.mark.parametrize("expert", ["low_noise", "both"])
def test_adapters_load_in_the_stock_pipeline_each_into_its_expert(
    build: Build, expert_pipeline_dir: Path, tmp_path: Path, expert: str
) -> None:
    trainer = build(expert=expert, lora_rank=2, lora_alpha=8.0, learning_rate=1e-2)
    trainer.train()
    files = {"high_noise": "pytorch_lora_weights.safetensors", "low_noise": "pytorch_lora_weights_2.safetensors"}
    pipeline = WanPipeline.from_pretrained(expert_pipeline_dir)
    inputs = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 16, 32)

    def outputs() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {name: getattr(pipeline, FOLDERS[name])(*inputs).sample for name in EXPERTS}

    before = outputs()
    for name in EXPERTS:
        file = tmp_path / "out" / files[name]
        assert file.is_file() == (name in trainer.experts.trained)
        if name in trainer.experts.trained:
            assert read_lora_metadata(file)["expert"] == name
            options = {"load_into_transformer_2": True} if name == "low_noise" else {}
            pipeline.load_lora_weights(tmp_path / "out", weight_name=files[name], **options)
    after = outputs()
    for name in EXPERTS:
        if name in trainer.experts.trained:
            with torch.no_grad():
                torch.testing.assert_close(
                    after[name], trainer.experts.parts(trainer.unwrapped)[name].eval()(*inputs).sample
                )
            assert not torch.allclose(after[name], before[name], atol=1e-4)
        else:
            assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("expert", [*EXPERTS, "both"])
def test_validation_walks_the_whole_chain_of_both_experts(
    build: Build, tmp_path: Path, expert_pipeline_dir: Path, write_latents: Callable[..., Path], expert: str
) -> None:
    prompts = write_latents(tmp_path / "prompts", 2, prompts_only=True)
    trainer = build(expert=expert, validation_dataset=str(prompts), validation_timesteps=[500])
    seen = []
    sample = trainer.evaluator._sample  # type: ignore[union-attr]

    def keep(*args: Any) -> torch.Tensor:
        seen.append((args[1], sample(*args)))
        return seen[-1][1]

    trainer.evaluator._sample = keep  # type: ignore[union-attr,method-assign]
    trainer.validate()
    pipeline = WanPipeline.from_pretrained(expert_pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    ((batch, latents),) = seen
    noise = torch.stack([row_noise(row_id, batch.latents_shape, seed=0) for row_id in batch.ids])
    expected = pipeline(
        prompt_embeds=batch.prompt_embeds, latents=noise, height=32, width=32, num_frames=5, num_inference_steps=6,
        guidance_scale=1.0, output_type="latent",
    ).frames  # fmt: skip
    torch.testing.assert_close(latents, expected)
    trainer.train()


def test_a_reward_model_of_either_expert_fits_the_pipeline(
    build: Build, tmp_path: Path, expert_pipeline_dir: Path
) -> None:
    for expert in EXPERTS:
        options: dict[str, Any] = {
            "output_dir": str(tmp_path / expert),
            "pretrained_model_name_or_path": str(expert_pipeline_dir),
            "train_dataset": str(tmp_path / "train"),
            "num_layers": 2,
            "max_train_steps": 1,
            "report_to": ["none"],
            "write_report": False,
        }
        with pytest.raises(ValueError, match="`expert` must be high_noise, low_noise or both"):
            RewardTrainer.from_config(RewardTrainingConfig(**options))
        trainer = RewardTrainer.from_config(RewardTrainingConfig(**options, expert=expert))
        weights = base(expert_pipeline_dir, expert)
        assert all(torch.equal(value, weights[f"blocks.{name}"]) for name, value in trainer.unwrapped.blocks.state_dict().items())  # fmt: skip
        trainer.train()
        assert build(expert="both", reward_model=str(tmp_path / expert / "reward_model")).experts.are_two
    with pytest.raises(ValueError, match="`expert` must be left out with `reward_model`"):
        RewardTrainingConfig(**options, expert="low_noise", reward_model="somewhere")
