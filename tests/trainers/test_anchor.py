"""The anchor to the base: its gradient, and that the adapter is as before when it has been turned off for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.models.loading import load_scheduler
from hy_prfl.models.trainable import adapters_off
from hy_prfl.trainers.prfl_trainer import REWARD_NOISE, PRFLTrainer


Build = Callable[..., PRFLTrainer]
NUM_STEPS = 6


@pytest.fixture
def build(prfl_builder: Callable[..., Build], pipeline_dir: Path) -> Build:
    """Function that builds a trainer of a LoRA."""
    build_full = prfl_builder(pipeline_dir)
    return lambda **options: build_full(
        **({"lora_rank": 2, "prompt_dropout": 0.0, "num_inference_steps": NUM_STEPS} | options)
    )


def move_adapter(model: torch.nn.Module) -> None:
    """Give the adapter, which at first does nothing, random weights."""
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)


def lora_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rerun_gradient_step": True},
        {"gradient_checkpointing": True},
        {"num_chained_steps": 3},
        {"num_chained_steps": 3, "gradient_checkpointing": True},
    ],
)
def test_gradient_is_that_of_one_graph(build: Build, pipeline_dir: Path, options: dict[str, Any]) -> None:
    trainer = build(anchor_scale=0.7, **options)
    move_adapter(trainer.unwrapped)
    trainer.start_streams()
    batch = next(trainer.reward_batches).to(torch.device("cpu"))
    trainer.start_streams()
    (end,) = trainer.draw_step_indices(0)
    terms = []
    for surrogate, term in trainer.reward_surrogates(0):
        surrogate.backward()
        terms.append(term)
    found = lora_gradients(trainer.unwrapped)
    assert len(found) == sum(value.requires_grad for value in trainer.unwrapped.parameters()) > 0

    base = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    scheduler = load_scheduler(str(pipeline_dir))
    scheduler.set_timesteps(NUM_STEPS)
    sigmas = scheduler.sigmas.tolist()
    generators = trainer.generators(REWARD_NOISE, 0, len(batch))
    latents = torch.stack([torch.randn(batch.latents_shape, generator=each) for each in generators])
    num_chained = options.get("num_chained_steps", 1)
    start = end - num_chained + 1
    anchor: Any = None
    for index in range(end + 1):
        with torch.set_grad_enabled(index >= start):
            inputs = latents, scheduler.timesteps[index].expand(2), batch.prompt_embeds
            velocity = trainer.unwrapped(*inputs, return_dict=False)[0]
            if index == start:
                with torch.no_grad():
                    base_velocity = base(*inputs, return_dict=False)[0]
                ratios = [
                    (mine - bases).square().sum() / bases.square().sum()
                    for mine, bases in zip(velocity, base_velocity, strict=True)
                ]
                anchor = sum(ratios) / 2
            latents = scheduler.step(velocity, scheduler.timesteps[index], latents).prev_sample
    logits = trainer.reward.models[0](latents, scheduler.timesteps[end + 1].expand(2), batch.prompt_embeds).logits
    width = NUM_STEPS * (sigmas[end] - sigmas[end + 1])
    reward_loss = (1 + (-logits).exp()).log().mean()
    assert anchor.item() > 1e-3
    assert float(terms[0].feedback.anchor) == pytest.approx(anchor.item(), rel=1e-4)
    (reward_loss / width / num_chained + 0.7 * anchor).backward()
    for name, grad in lora_gradients(trainer.unwrapped).items():
        torch.testing.assert_close(found[name], grad, rtol=2e-3, atol=1e-7, msg=name)


def test_it_holds_the_generator(build: Build, tmp_path: Path) -> None:
    """Also with rollouts that are used again; before the first update there is nothing to hold."""
    moved = {}
    for scale in (1e-6, 10.0):
        trainer = build(
            anchor_scale=scale, update_schedule="reward", reward_loss="logit", learning_rate=1e-2, max_train_steps=12,
            rollout_interval=6, lora_rank=8, output_dir=str(tmp_path / str(scale)),
        )  # fmt: skip
        trains = [value.requires_grad for value in trainer.unwrapped.parameters()]
        trainer.train()
        assert trains == [value.requires_grad for value in trainer.unwrapped.parameters()]
        lines = map(json.loads, (tmp_path / str(scale) / "metrics.jsonl").read_text().splitlines())
        anchors = [line["train/anchor"] for line in lines]
        assert anchors[0] == 0
        moved[scale] = anchors[-1]
    assert 0 < moved[10.0] < 0.5 * moved[1e-6]


def test_turned_off_it_is_the_base(build: Build, pipeline_dir: Path) -> None:
    model = build().unwrapped
    move_adapter(model)
    base = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    inputs = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 16, 32)
    with torch.no_grad():
        before = model(*inputs).sample
        with adapters_off(model):
            torch.testing.assert_close(model(*inputs).sample, base(*inputs).sample)
        assert torch.equal(model(*inputs).sample, before)
    assert not torch.allclose(before, base(*inputs).sample)
    with pytest.raises(ValueError, match="has no adapter that could be turned off"), adapters_off(base):
        pass


def test_without_an_adapter_it_is_refused() -> None:
    paths = {"output_dir": "-", "pretrained_model_name_or_path": "-", "train_dataset": "-", "reward_model": "-"}
    with pytest.raises(ValueError, match="`anchor_scale` must be 0 without `lora_rank`: only an adapter"):
        PRFLTrainingConfig(**paths, anchor_scale=0.1)
    with pytest.raises(ValueError, match="`anchor_scale` must be at least 0"):
        PRFLTrainingConfig(**paths, anchor_scale=-0.1, lora_rank=2)
    with pytest.raises(ValueError, match="`anchor_scale` must be left out with the schedule 'flow_matching'"):
        PRFLTrainingConfig(**paths, anchor_scale=0.1, lora_rank=2, update_schedule="flow_matching")
