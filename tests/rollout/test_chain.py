import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline

from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_scheduler
from hy_prfl.rollout.chain import _State, _tensors, record_states, step_from_state, walk_with_gradient
from hy_prfl.rollout.gradient_steps import Foresight


NUM_STEPS = 5


@pytest.mark.parametrize("step_index", [0, 1, NUM_STEPS - 2])
def test_rollout_stops_on_the_pipelines_path(pipeline_dir: Path, step_index: int) -> None:
    pipeline = WanPipeline.from_pretrained(pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 16, 2, 4, 4)
    prompt_embeds = torch.randn(2, 16, 32)
    path: list[torch.Tensor] = []

    def keep(
        pipe: WanPipeline, index: int, timestep: int, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        path.append(tensors["latents"].clone())
        return tensors

    pipeline(
        prompt_embeds=prompt_embeds, latents=noise, height=32, width=32, num_frames=5, num_inference_steps=NUM_STEPS,
        guidance_scale=1.0, output_type="latent", callback_on_step_end=keep,
    )  # fmt: skip
    scheduler = load_scheduler(str(pipeline_dir))
    (step,) = walk_with_gradient(
        pipeline.transformer,
        scheduler,
        noise=noise,
        step_indices=[step_index],
        num_inference_steps=NUM_STEPS,
        conditioning=Conditioning(prompt_embeds),
    )
    torch.testing.assert_close(step.latents, path[step_index])
    assert step.timesteps.tolist() == [scheduler.timesteps[step_index + 1].item()] * 2


def test_gradient_comes_through_the_last_step_only(pipeline_dir: Path) -> None:
    transformer = WanPipeline.from_pretrained(pipeline_dir).transformer
    with_grad: list[bool] = []
    transformer.register_forward_hook(lambda module, args, output: with_grad.append(output[0].requires_grad))
    scheduler = load_scheduler(str(pipeline_dir))
    inputs = {"num_inference_steps": NUM_STEPS, "conditioning": Conditioning(torch.randn(1, 16, 32))}
    (step,) = walk_with_gradient(transformer, scheduler, noise=torch.randn(1, 16, 2, 4, 4), step_indices=[3], **inputs)
    assert with_grad == [False, False, False, True]
    (surrogate,) = step.surrogates(2 * step.latents)
    surrogate.backward()
    assert all(parameter.grad is not None for parameter in transformer.blocks.parameters())


@pytest.mark.parametrize("rerun", [False, True])
@pytest.mark.parametrize("pipeline_class", [WanPipeline, WanImageToVideoPipeline])
def test_a_chain_with_gradient_steps_is_the_chain_without(
    pipeline_dir: Path, i2v_pipeline_dir: Path, pipeline_class: Any, rerun: bool
) -> None:
    folder = pipeline_dir if pipeline_class is WanPipeline else i2v_pipeline_dir
    transformer = pipeline_class.from_pretrained(folder).transformer
    scheduler = load_scheduler(str(folder))
    noise, given = torch.randn(2, 16, 2, 4, 4), Conditioning(torch.randn(2, 16, 32))
    if pipeline_class is WanImageToVideoPipeline:
        given = Conditioning(given.prompt_embeds, torch.randn(2, 5, 32), torch.randn(2, 20, 2, 4, 4))
    path: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        scheduler.set_timesteps(7)
        latents = noise
        for index, timestep in enumerate(scheduler.timesteps):
            hidden_states = latents if given.condition is None else torch.cat([latents, given.condition], dim=1)
            velocity = transformer(
                hidden_states, timestep.expand(2), given.prompt_embeds, given.image_embeds
            ).sample  # fmt: skip
            path[index] = latents = scheduler.step(velocity, timestep, latents).prev_sample
    chain = walk_with_gradient(
        transformer, scheduler, noise=noise, step_indices=[0, 3, 4], num_inference_steps=7, rerun=rerun,
        conditioning=given,
    )  # fmt: skip
    for step_index, step in zip([0, 3, 4], chain, strict=True):
        assert torch.equal(step.latents, path[step_index])
        assert step.timesteps.tolist() == [scheduler.timesteps[step_index + 1].item()] * 2
        levels = scheduler.timesteps[step_index : step_index + 2].tolist()
        assert step.gain.item() == pytest.approx((levels[0] - levels[1]) / 1000, abs=1e-3)
        (surrogate,) = step.surrogates(2 * step.latents / step.latents.numel())
        surrogate.backward()
        assert not step.latents.requires_grad


@pytest.mark.parametrize(
    ("rerun", "expected"),
    [(False, [True, False, True]), (True, [False, True, False, False, True])],
)
def test_forwards_of_a_chain_and_what_is_left_of_them(pipeline_dir: Path, rerun: bool, expected: list[bool]) -> None:
    """Only the forwards that are asked for, and no graph of a step outlives it."""
    transformer = WanPipeline.from_pretrained(pipeline_dir).transformer
    with_grad: list[bool] = []
    outputs: list[weakref.ref[torch.Tensor]] = []

    def watch(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor]) -> None:
        with_grad.append(output[0].requires_grad)
        outputs.append(weakref.ref(output[0]))

    transformer.register_forward_hook(watch)
    scheduler = load_scheduler(str(pipeline_dir))
    chain = walk_with_gradient(
        transformer, scheduler, noise=torch.randn(1, 16, 2, 4, 4), step_indices=[0, 2], num_inference_steps=NUM_STEPS,
        conditioning=Conditioning(torch.randn(1, 16, 32)), rerun=rerun,
    )  # fmt: skip
    for step in chain:
        for surrogate in step.surrogates(2 * step.latents):
            surrogate.backward()
    assert with_grad == expected
    del step
    assert all(output() is None for output in outputs)
    kept = [*scheduler.model_outputs, scheduler.last_sample]
    assert not any(tensor.requires_grad for tensor in kept)


@pytest.mark.parametrize("step_indices", [[], [1, 1], [2, 1], [0, NUM_STEPS - 1], [-1, 2]])
def test_step_indices_must_ascend_and_leave_noisy_latents(pipeline_dir: Path, step_indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"`step_indices` must be ascending and in \[0, 3\]"):
        walk_with_gradient(
            torch.nn.Identity(), load_scheduler(str(pipeline_dir)), noise=torch.randn(1, 16, 2, 4, 4),
            step_indices=step_indices, num_inference_steps=NUM_STEPS, conditioning=Conditioning(torch.randn(1, 16, 32)),
        )  # fmt: skip


def plain_chain(
    transformer: Any,
    scheduler: Any,
    latents: torch.Tensor,
    prompts: torch.Tensor,
    *,
    steps: range,
    with_gradient: range,
    stop_input_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents after `steps` on one graph, and the clean latents that the last one predicts."""
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(steps[0])
    clean = latents
    for index in steps:
        with torch.set_grad_enabled(index in with_gradient):
            timestep = scheduler.timesteps[index]
            given = latents.detach() if stop_input_gradient else latents
            velocity = transformer(given, timestep.expand(len(given)), prompts).sample
            clean = latents - scheduler.sigmas[index] * velocity
            latents = scheduler.step(velocity, timestep, latents).prev_sample
    return latents, clean


def gradients(transformer: torch.nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in transformer.parameters() if parameter.grad is not None]
    transformer.zero_grad()
    return found


@pytest.mark.parametrize("stop_input_gradient", [False, True])
@pytest.mark.parametrize(("num_chained", "step_index"), [(2, 1), (3, 4), (6, 5)])
def test_chained_steps_have_the_gradient_of_one_graph(
    pipeline_dir: Path, num_chained: int, step_index: int, stop_input_gradient: bool
) -> None:
    """Through the solver's memory and its corrector too, whatever factor each backward pass has."""
    transformer = WanPipeline.from_pretrained(pipeline_dir).transformer
    noise, prompts = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 32)
    chained = range(step_index - num_chained + 1, step_index + 1)
    expected, _ = plain_chain(
        transformer, load_scheduler(str(pipeline_dir)), noise, prompts, steps=range(step_index + 1),
        with_gradient=chained, stop_input_gradient=stop_input_gradient,
    )  # fmt: skip
    expected.square().mean().backward()
    expected_gradients = gradients(transformer)
    (step,) = walk_with_gradient(
        transformer, load_scheduler(str(pipeline_dir)), noise=noise, step_indices=[step_index], num_inference_steps=7,
        conditioning=Conditioning(prompts), num_chained_steps=num_chained, stop_input_gradient=stop_input_gradient,
        offload=num_chained == 3,
    )  # fmt: skip
    torch.testing.assert_close(step.latents, expected.detach())
    count = 0
    for surrogate in step.surrogates(2 * step.latents / step.latents.numel()):
        (0.25 * surrogate).backward()
        count += 1
    assert count == num_chained
    for actual, wanted in zip(gradients(transformer), expected_gradients, strict=True):
        torch.testing.assert_close(4 * actual, wanted, rtol=1e-4, atol=1e-6)


def test_start_of_a_step_moves_to_another_device(pipeline_dir: Path) -> None:
    """The meta device stands for a GPU: nothing but the place of tensors is looked at."""
    scheduler = load_scheduler(str(pipeline_dir))
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 16, 2, 4, 4)
    for timestep in scheduler.timesteps[:2]:
        latents = scheduler.step(torch.randn_like(latents), timestep, latents, return_dict=False)[0]
    start = _State(2, latents, scheduler)
    moved = start.to("meta")
    assert {
        name: each.device.type for name, each in _tensors(moved.latents, moved.scheduler).items()
    } == dict.fromkeys(("model_outputs.0", "model_outputs.1", "latents", "last_sample"), "meta")
    assert all(each.device.type == "cpu" for each in _tensors(start.latents, start.scheduler).values())


def test_windows_of_chained_steps_may_overlap(pipeline_dir: Path) -> None:
    transformer = WanPipeline.from_pretrained(pipeline_dir).transformer
    noise, prompts = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 32)
    chain = walk_with_gradient(
        transformer, load_scheduler(str(pipeline_dir)), noise=noise, step_indices=[2, 3], num_inference_steps=7,
        conditioning=Conditioning(prompts), num_chained_steps=3,
    )  # fmt: skip
    for step_index, step in zip([2, 3], chain, strict=True):
        for surrogate in step.surrogates(torch.ones_like(step.latents)):
            surrogate.backward()
        actual = gradients(transformer)
        expected, _ = plain_chain(
            transformer, load_scheduler(str(pipeline_dir)), noise, prompts, steps=range(step_index + 1),
            with_gradient=range(step_index - 2, step_index + 1),
        )  # fmt: skip
        expected.sum().backward()
        for one, other in zip(actual, gradients(transformer), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_chained", [1, 3])
@pytest.mark.parametrize("rerun", [False, True])
def test_what_a_step_foresees(pipeline_dir: Path, num_chained: int, rerun: bool) -> None:
    transformer = WanPipeline.from_pretrained(pipeline_dir).transformer
    noise, prompts = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 32)
    foresight = Foresight(torch.randn_like(noise), torch.tensor([0.0, 0.5]), (0.2, 0.6))
    scheduler = load_scheduler(str(pipeline_dir))
    (step,) = walk_with_gradient(
        transformer, scheduler, noise=noise, step_indices=[3], num_inference_steps=7, rerun=rerun,
        conditioning=Conditioning(prompts), num_chained_steps=num_chained, foresight=foresight,
    )  # fmt: skip
    assert step.timesteps.tolist() == pytest.approx([200, 400])
    sigma = scheduler.sigmas[3].item()
    assert step.gain.tolist() == pytest.approx([sigma * 0.8, sigma * 0.6])
    _, clean = plain_chain(
        transformer, load_scheduler(str(pipeline_dir)), noise, prompts, steps=range(4),
        with_gradient=range(4 - num_chained, 4),
    )  # fmt: skip
    levels = torch.tensor([0.2, 0.4]).view(2, 1, 1, 1, 1)
    expected = (1 - levels) * clean + levels * foresight.noise
    torch.testing.assert_close(step.latents, expected.detach())
    for surrogate in step.surrogates(2 * step.latents):
        surrogate.backward()
    actual = gradients(transformer)
    expected.square().sum().backward()
    for one, other in zip(actual, gradients(transformer), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step_indices", [[], [2, 0], [1, 1], [-1, 2], [6]])
def test_states_of_no_step_of_the_chain_are_refused(step_indices: list[int]) -> None:
    """The model is never reached."""
    states = record_states(
        torch.nn.Identity(), UniPCMultistepScheduler(), noise=torch.zeros(1), step_indices=step_indices,
        num_inference_steps=7, conditioning=Conditioning(torch.zeros(1)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"`step_indices` must be ascending and in \[0, 5\]"):
        next(states)


def test_recorded_states_are_those_of_the_chain_and_a_step_from_one_is_eulers(pipeline_dir: Path) -> None:
    transformer = WanPipeline.from_pretrained(pipeline_dir).transformer
    scheduler = load_scheduler(str(pipeline_dir))
    noise, prompts = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 32)
    states = list(
        record_states(
            transformer, scheduler, noise=noise, step_indices=[0, 2, 5], num_inference_steps=7,
            conditioning=Conditioning(prompts),
        )
    )  # fmt: skip
    assert [index for index, _, _ in states] == [0, 2, 5]
    for index, latents, velocity in states:
        if index > 0:
            with torch.no_grad():
                expected, _ = plain_chain(
                    transformer, load_scheduler(str(pipeline_dir)), noise, prompts, steps=range(index),
                    with_gradient=range(0),
                )  # fmt: skip
            torch.testing.assert_close(latents, expected)
        step = step_from_state(
            transformer, scheduler, latents=latents, start_index=index, num_inference_steps=7,
            conditioning=Conditioning(prompts),
        )  # fmt: skip
        torch.testing.assert_close(step.velocity, velocity)
        sigmas = scheduler.sigmas
        torch.testing.assert_close(step.latents, latents + (sigmas[index + 1] - sigmas[index]) * velocity)
        assert step.timesteps.tolist() == [scheduler.timesteps[index + 1].item()] * 2


def test_chained_steps_from_a_state_have_the_gradient_of_one_graph(pipeline_dir: Path) -> None:
    transformer = WanPipeline.from_pretrained(pipeline_dir).transformer
    latents, prompts = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 32)
    step = step_from_state(
        transformer, load_scheduler(str(pipeline_dir)), latents=latents, start_index=2, num_inference_steps=7,
        conditioning=Conditioning(prompts), num_chained_steps=3,
    )  # fmt: skip
    for surrogate in step.surrogates(torch.ones_like(latents)):
        surrogate.backward()
    actual = gradients(transformer)
    expected, _ = plain_chain(
        transformer, load_scheduler(str(pipeline_dir)), latents, prompts, steps=range(2, 5), with_gradient=range(2, 5)
    )
    torch.testing.assert_close(step.latents, expected.detach())
    expected.sum().backward()
    for one, other in zip(actual, gradients(transformer), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start_index", [-1, 4])
def test_states_must_leave_noisy_latents(pipeline_dir: Path, start_index: int) -> None:
    with pytest.raises(ValueError, match=r"`start_index` must be in \[0, 3\]"):
        step_from_state(
            torch.nn.Identity(), load_scheduler(str(pipeline_dir)), latents=torch.randn(1, 16, 2, 4, 4),
            start_index=start_index, num_inference_steps=7, conditioning=Conditioning(torch.randn(1, 16, 32)),
            num_chained_steps=3,
        )  # fmt: skip
