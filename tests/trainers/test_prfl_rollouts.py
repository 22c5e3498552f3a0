"""Gradients through several steps, of what a step foresees, and rollouts that serve several updates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hy_prfl.models.loading import load_scheduler
from hy_prfl.trainers.prfl_trainer import FORESIGHT, REWARD_NOISE, PRFLTrainer


@pytest.fixture
def build(prfl_builder: Callable[..., Callable[..., PRFLTrainer]], pipeline_dir: Path) -> Callable[..., PRFLTrainer]:
    """Function that builds a trainer of a text-to-video pipeline."""
    return prfl_builder(pipeline_dir)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return grads


def reward_loss(trainer: PRFLTrainer, latents: torch.Tensor, timesteps: torch.Tensor, prompts: torch.Tensor) -> Any:
    logits = trainer.reward.models[0](latents, timesteps, prompts).logits
    return (1 + (-logits).exp()).log().mean()


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("reward_at", ["next", "foreseen"])
@pytest.mark.parametrize("num_chained", [1, 3])
def test_gradients_are_those_of_one_graph(
    build: Callable[..., PRFLTrainer], num_chained: int, reward_at: str, divide: bool
) -> None:
    """Scheduler, noise levels and normalisation written out in plain torch."""
    levels_option = {"foreseen_levels": [0.3, 0.5]} if reward_at == "foreseen" else {}
    trainer = build(
        prompt_dropout=0.0, num_inference_steps=6, num_chained_steps=num_chained, reward_at=reward_at,
        divide_by_step_width=divide, **levels_option,
    )  # fmt: skip
    trainer.start_streams()
    batch = next(trainer.reward_batches).to(torch.device("cpu"))
    trainer.start_streams()
    (step_index,) = trainer.draw_step_indices(0)
    assert num_chained - 1 <= step_index <= 4
    for surrogate, term in trainer.reward_surrogates(0):
        surrogate.backward()
        assert term.ids == batch.ids
    actual = gradients(trainer.unwrapped)

    scheduler = load_scheduler(trainer.config.pretrained_model_name_or_path)
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas.tolist()
    generators = trainer.generators(REWARD_NOISE, 0, len(batch))
    latents = torch.stack([torch.randn(batch.latents_shape, generator=each) for each in generators])
    clean = latents
    for index in range(step_index + 1):
        with torch.set_grad_enabled(index > step_index - num_chained):
            timestep = scheduler.timesteps[index]
            velocity = trainer.unwrapped(latents, timestep.expand(2), batch.prompt_embeds, return_dict=False)[0]
            clean = latents - sigmas[index] * velocity
            latents = scheduler.step(velocity, timestep, latents).prev_sample
    if reward_at == "next":
        loss = reward_loss(trainer, latents, scheduler.timesteps[step_index + 1].expand(2), batch.prompt_embeds)
        factor = 1 / (6 * (sigmas[step_index] - sigmas[step_index + 1])) if divide else 1.0
        (factor * loss / num_chained).backward()
    else:
        generators = trainer.generators(FORESIGHT, 0, len(batch))
        draws = torch.cat([torch.rand(1, generator=each) for each in generators])
        noise = torch.stack([torch.randn(batch.latents_shape, generator=each) for each in generators])
        low, high = min(0.3, sigmas[step_index + 1]), min(0.5, sigmas[step_index + 1])
        levels = low + (high - low) * draws
        # A sample at a time: each has a factor of its own.
        every = []
        for end in range(num_chained - 1, 5):
            bounds = [min(level, sigmas[end + 1]) for level in (0.3, 0.5)]
            every.append(sigmas[end] * (1 - sum(bounds) / 2))
        for row, level in enumerate(levels.tolist()):
            seen = (1 - level) * clean[row : row + 1] + level * noise[row : row + 1]
            loss = reward_loss(trainer, seen, torch.tensor([1000 * level]), batch.prompt_embeds[row : row + 1]) / 2
            gain = sigmas[step_index] * (1 - level) if divide else sum(every) / len(every)
            (loss / (6 * gain) / num_chained).backward(retain_graph=True)
    for name, grad in gradients(trainer.unwrapped).items():
        difference = (actual[name] - grad).norm() / grad.norm().clamp(min=1e-12)
        assert difference < 1e-3, name


def test_rollouts_serve_several_updates(build: Callable[..., PRFLTrainer]) -> None:
    trainer = build(
        update_schedule="reward", num_inference_steps=5, rollout_interval=3, rollout_buffer_size=2, max_train_steps=7,
        logging_steps=1,
    )  # fmt: skip
    forwards: list[int] = []
    ages: list[float] = []
    trainer.unwrapped.register_forward_hook(lambda *_: forwards.__setitem__(-1, forwards[-1] + 1))
    step = trainer.train_step

    def counted() -> dict[str, torch.Tensor]:
        forwards.append(0)
        metrics = step()
        ages.append(metrics["rollout_staleness"].item())
        return metrics

    trainer.train_step = counted  # type: ignore[method-assign]
    trainer.train()
    # A chain of 5 steps has 4 that leave noise; each update runs one step with gradient besides.
    assert forwards == [5, 1, 1, 5, 1, 1, 5]
    assert trainer.rollouts is not None
    assert trainer.rollouts.num_batches == 3
    assert len(trainer.rollouts.buffer) == 2
    # The state of the first update is of weights that have not moved: float16 is all that differs.
    assert ages[0] < 1e-3
    assert min(ages[1:3]) > 1e-3


@pytest.mark.parametrize("has_prompts", [True, False])
def test_rollouts_of_other_prompts_are_dropped(
    build: Callable[..., PRFLTrainer], tmp_path: Path, has_prompts: bool
) -> None:
    """After a resume with other clips, whose prompts are those of the rollouts unless there is a `prompt_dataset`."""
    options = {"prompt_dataset": str(tmp_path / "train")} if has_prompts else {}
    trainer = build(update_schedule="reward", rollout_interval=8, rollout_buffer_size=8, max_train_steps=1, **options)
    trainer.train()
    assert trainer.rollouts is not None
    assert len(trainer.rollouts.buffer) == 1
    trainer.forget_outdated({"learning_rate"})
    assert len(trainer.rollouts.buffer) == 1
    trainer.forget_outdated({"train_dataset"})
    assert len(trainer.rollouts.buffer) == (1 if has_prompts else 0)


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        # Of the chain up to its step 7: 0, 1, 4, and 7 with gradient.
        ({"rollout_cache_interval": 3}, 4),
        # All of 0 .. 7, of which two are stored, and the step with gradient.
        ({"rollout_interval": 2, "rollout_states": 2, "step_range": [6, 7]}, 9),
        # 0, 1, 4, the stored 6 and 7, and the step with gradient.
        ({"rollout_interval": 2, "rollout_states": 2, "rollout_cache_interval": 3, "step_range": [6, 7]}, 6),
        # 0, 1, 4, the two steps without and with gradient, and the base's velocity.
        ({"rollout_cache_interval": 3, "num_chained_steps": 2, "anchor_scale": 1.0, "lora_rank": 2}, 8),
    ],
)
def test_steps_of_a_rollout_are_skipped(
    build: Callable[..., PRFLTrainer], options: dict[str, Any], forwards: int
) -> None:
    """The trainer's forwards of a reward update; with activation checkpointing, which has no say in them."""
    defaults = {"num_inference_steps": 10, "step_range": [7, 7], "gradient_checkpointing": True}
    trainer = build(**(defaults | options), update_schedule="reward")
    calls: list[int] = []
    trainer.unwrapped.register_forward_hook(lambda *_: calls.append(1))
    trainer.start_streams()
    metrics = trainer.train_step()
    assert len(calls) == forwards
    assert all(value.isfinite() for value in metrics.values())


def test_rollouts_that_are_too_old_are_replaced(build: Callable[..., PRFLTrainer]) -> None:
    options: dict[str, Any] = {"update_schedule": "reward", "rollout_interval": 10, "max_train_steps": 4}
    trainer = build(**options, max_rollout_staleness=2e-3)
    trainer.train()
    # The second update moves no more than the learning rate allows, and that is more than the bound.
    assert trainer.rollouts is not None
    assert trainer.rollouts.num_batches > 1


def test_stored_states_are_those_that_steps_may_start_from(build: Callable[..., PRFLTrainer]) -> None:
    trainer = build(num_inference_steps=10, step_range=[3, 6], rollout_interval=2, num_chained_steps=3)
    assert trainer.draw_states(0) == [1, 2, 3, 4]
    trainer = build(num_inference_steps=10, step_range=[3, 6], rollout_interval=2, rollout_states=2)
    drawn = set()
    for trainer.global_step in range(60):
        states = trainer.draw_states(0)
        assert len(states) == 2
        assert states == sorted(states)
        drawn |= set(states)
    assert drawn == {3, 4, 5, 6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chained_steps": 5}, r"`num_chained_steps` must be in \[1, 3\]"),
        ({"step_range": [0, 1], "num_chained_steps": 3}, r"`num_chained_steps` must be in \[1, 2\]"),
        ({"num_chained_steps": 3, "num_gradient_steps": 2}, r"`num_gradient_steps` must be in \[1, 1\]"),
        ({"stop_input_gradient": True}, "`stop_input_gradient` must be false unless"),
        ({"num_chained_steps": 2, "lora_rank": 2, "lora_dropout": 0.1}, "`num_chained_steps` must be 1 with"),
        ({"foreseen_levels": [0.5, 0.2]}, "`foreseen_levels` must be two sigmas"),
        ({"foreseen_levels": [0.1, 0.5]}, "`foreseen_levels` must be left out unless `reward_at` is foreseen"),
        ({"rollout_buffer_size": 4}, "`rollout_buffer_size` must be left out unless"),
        ({"rollout_interval": 0}, "`rollout_interval` must be at least 1"),
        ({"rollout_interval": 2, "max_rollout_staleness": 0.0}, "`max_rollout_staleness` must be greater than 0"),
        ({"update_schedule": "flow_matching", "rollout_interval": 2}, "`rollout_interval` must be left out with"),
        # A chain of 4 steps: rollouts store the start of steps 0 .. 2, or of as many as may begin a chain of steps.
        ({"rollout_interval": 2, "rollout_states": 4}, r"`rollout_states` must be in \[1, 3\]"),
        (
            {"rollout_interval": 2, "rollout_states": 3, "num_chained_steps": 2},
            r"`rollout_states` must be in \[1, 2\]",
        ),
        ({"rollout_interval": 2, "rollout_states": 2, "step_range": [1, 1]}, r"`rollout_states` must be in \[1, 1\]"),
        (
            {"rollout_interval": 2, "rollout_states": 4, "rollout_cache_interval": 2},
            r"`rollout_states` must be in \[1, 3\]",
        ),
        ({"rollout_cache_interval": 5}, r"`rollout_cache_interval` must be in \[1, 4\]"),
        ({"rollout_cache_interval": 0}, r"`rollout_cache_interval` must be in \[1, 4\]"),
        (
            {"rollout_cache_interval": 2, "rollout_interval": 2},
            "`rollout_cache_interval` must be 1 without `rollout_states`",
        ),
        (
            {"update_schedule": "flow_matching", "rollout_cache_interval": 2},
            "`rollout_cache_interval` must be left out with",
        ),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    build: Callable[..., PRFLTrainer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
