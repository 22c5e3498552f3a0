"""Steps of a rollout that are extrapolated instead of computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import TaylorSeerCacheConfig, WanTransformer3DModel
from torch import nn

from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.experts import ExpertPair, Experts
from hy_prfl.models.loading import load_scheduler
from hy_prfl.rollout.chain import record_states, walk_with_gradient
from hy_prfl.rollout.step_cache import forward_steps


@pytest.fixture
def transformer(pipeline_dir: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")


def count_blocks(transformer: Any) -> list[tuple[int, bool]]:
    """Each call of a block: its place, and whether it takes gradient. The list grows."""
    calls: list[tuple[int, bool]] = []
    for place, block in enumerate(transformer.blocks):
        block.register_forward_hook(lambda *_, place=place: calls.append((place, torch.is_grad_enabled())))
    return calls


def walk(transformer: Any, folder: Path, noise: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Latents after each gradient step, whose gradient is taken."""
    chain = walk_with_gradient(transformer, load_scheduler(str(folder)), noise=noise, **options)
    found = []
    for step in chain:
        for surrogate in step.surrogates(2 * step.latents):
            surrogate.backward()
        found.append(step.latents)
    return found


def plain_states(
    predict: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    folder: Path,
    noise: torch.Tensor,
    num_steps: int,
) -> list[torch.Tensor]:
    """Latents before each step of a chain whose velocities `predict(index, latents, timestep)` returns."""
    scheduler = load_scheduler(str(folder))
    scheduler.set_timesteps(num_steps)
    states, latents = [], noise
    with torch.no_grad():
        for index, timestep in enumerate(scheduler.timesteps):
            states.append(latents)
            velocity = predict(index, latents, timestep.expand(len(latents)))
            latents = scheduler.step(velocity, timestep, latents).prev_sample
    return states


def test_steps_that_call_the_model() -> None:
    timesteps = [1000.0 - 100 * index for index in range(10)]
    assert forward_steps(timesteps, 1) == list(range(10))
    assert forward_steps(timesteps, 3) == [0, 1, 4, 7]
    # The experts' first steps are 0 and 4.
    assert forward_steps(timesteps, 3, boundary=650.0) == [0, 1, 4, 5, 8]
    assert forward_steps(timesteps, 20) == [0, 1]


def test_states_are_those_of_diffusers_taylorseer(pipeline_dir: Path, transformer: Any) -> None:
    """Its lite mode, which calls the blocks' hooks in each step, with two warm-up steps and every second one computed."""
    noise, prompts = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 32)
    transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, use_lite_mode=True
        )
    )

    def predict(index: int, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        with transformer.cache_context("cond"):
            return transformer(latents, timestep, prompts, return_dict=False)[0]

    expected = plain_states(predict, pipeline_dir, noise, 12)
    transformer.disable_cache()
    (latents,) = walk(
        transformer, pipeline_dir, noise, step_indices=[9], num_inference_steps=12, conditioning=Conditioning(prompts),
        cache_interval=2,
    )  # fmt: skip
    torch.testing.assert_close(latents, expected[10])


@pytest.mark.parametrize("rerun", [False, True])
def test_skipped_steps_call_no_block(pipeline_dir: Path, transformer: Any, rerun: bool) -> None:
    """Written out for an interval of 3; the steps with gradient are computed, and serve the extrapolation too."""
    noise, prompts = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 32)
    velocities: dict[int, torch.Tensor] = {}

    def predict(index: int, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if index in (0, 1, 3, 4, 7, 9):
            velocities[index] = transformer(latents, timestep, prompts).sample
            return velocities[index]
        before, last = list(velocities)[-2:]
        slope = (velocities[last] - velocities[before]) / (last - before)
        return velocities[last] + (index - last) * slope

    expected = plain_states(predict, pipeline_dir, noise, 12)
    calls = count_blocks(transformer)
    found = walk(
        transformer, pipeline_dir, noise, step_indices=[3, 9], num_inference_steps=12, rerun=rerun,
        conditioning=Conditioning(prompts), cache_interval=3,
    )  # fmt: skip
    for latents, index in zip(found, [4, 10], strict=True):
        torch.testing.assert_close(latents, expected[index])
    num_blocks = len(transformer.blocks)
    # 0, 1, 4, 7, and of ten steps without a cache eight; with `rerun` also 3 and 9.
    assert sum(not with_gradient for _, with_gradient in calls) == num_blocks * (4 + 2 * rerun)
    assert sum(with_gradient for _, with_gradient in calls) == num_blocks * 2


@pytest.mark.parametrize("num_chained_steps", [1, 3])
def test_an_interval_that_skips_nothing_changes_nothing(
    pipeline_dir: Path, transformer: Any, num_chained_steps: int
) -> None:
    """Bit for bit: an interval of 1, or a chain whose steps all are the first two or take gradient."""
    noise, conditioning = torch.randn(1, 16, 2, 4, 4), Conditioning(torch.randn(1, 16, 32))
    gradients = []
    for interval in (None, 1, 100):
        step_index = num_chained_steps + 1
        options = {} if interval is None else {"cache_interval": interval}
        (latents,) = walk(
            transformer, pipeline_dir, noise, step_indices=[step_index], num_inference_steps=7,
            conditioning=conditioning, num_chained_steps=num_chained_steps, **options,
        )  # fmt: skip
        gradients.append([latents, *(parameter.grad.clone() for parameter in transformer.parameters())])
        transformer.zero_grad()
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))


def test_chained_steps_have_the_gradient_of_one_graph(pipeline_dir: Path, transformer: Any) -> None:
    """After skipped steps, from states that a chain of given velocities has as well."""
    noise, prompts = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 32)
    (latents,) = walk(
        transformer, pipeline_dir, noise, step_indices=[7], num_inference_steps=9, num_chained_steps=2,
        conditioning=Conditioning(prompts), cache_interval=4,
    )  # fmt: skip
    actual = [parameter.grad.clone() for parameter in transformer.parameters()]
    transformer.zero_grad()
    scheduler = load_scheduler(str(pipeline_dir))
    scheduler.set_timesteps(9)
    state, velocities = noise, []
    for index in range(8):
        with torch.set_grad_enabled(index >= 6):
            timestep = scheduler.timesteps[index]
            if index in (0, 1, 5, 6, 7):
                velocity = transformer(state, timestep.expand(1), prompts).sample
            else:
                velocity = velocities[1] + (index - 1) * (velocities[1] - velocities[0])
            velocities.append(velocity.detach())
            state = scheduler.step(velocity, timestep, state).prev_sample
    torch.testing.assert_close(latents, state.detach())
    state.square().sum().backward()
    for one, parameter in zip(actual, transformer.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-3)


def test_kept_states_have_the_models_velocity(pipeline_dir: Path, transformer: Any) -> None:
    noise, prompts = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 32)
    calls = count_blocks(transformer)
    scheduler = load_scheduler(str(pipeline_dir))
    states = list(
        record_states(
            transformer, scheduler, noise=noise, step_indices=[3, 8], num_inference_steps=10,
            conditioning=Conditioning(prompts), cache_interval=5,
        )
    )  # fmt: skip
    assert len(calls) == len(transformer.blocks) * len([0, 1, 3, 6, 8])
    for index, latents, velocity in states:
        with torch.no_grad():
            expected = transformer(latents, scheduler.timesteps[index].expand(1), prompts).sample
        torch.testing.assert_close(velocity, expected)


def test_velocities_of_one_expert_say_nothing_about_the_other(pipeline_dir: Path, transformer: Any) -> None:
    """Experts that return constants: each keeps its own."""

    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))

        def forward(self, *, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            return (self.value.expand_as(hidden_states),)

    experts = Experts(boundary=700.0, trained=("high_noise", "low_noise"))
    pair = ExpertPair(Constant(1.0), Constant(-2.0), experts)
    noise = torch.randn(1, 16, 2, 4, 4)
    given: dict[str, Any] = {"num_inference_steps": 20, "conditioning": Conditioning(torch.randn(1, 16, 32))}
    plain, cached = (
        walk(pair, pipeline_dir, noise, step_indices=[18], cache_interval=interval, boundary=experts.boundary, **given)
        for interval in (1, 4)
    )
    torch.testing.assert_close(cached[0], plain[0])


def test_error_of_skipped_steps(pipeline_dir: Path, transformer: Any) -> None:
    noise, prompts = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 32)
    calls, found = count_blocks(transformer), []
    for interval in (1, 2, 4):
        *_, (_, latents, _) = record_states(
            transformer, load_scheduler(str(pipeline_dir)), noise=noise, step_indices=[38], num_inference_steps=40,
            conditioning=Conditioning(prompts), cache_interval=interval,
        )  # fmt: skip
        found.append(latents)
        calls.append((-1, False))
    ends = [index for index, (place, _) in enumerate(calls) if place == -1]
    num_forwards = [
        (end - start - 1) // len(transformer.blocks) for start, end in zip([-1, *ends], ends, strict=False)
    ]
    # Besides those of the interval that of the state which is kept.
    assert num_forwards == [39, 21, 12]
    plain, *others = found
    half, quarter = ((each - plain).norm() / plain.norm() for each in others)
    assert 0 < half < 0.02
    assert half < quarter < 0.1
