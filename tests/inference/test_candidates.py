from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from peft import LoraConfig
from PIL import Image

from hy_prfl.configs.keep import num_forwards, num_scores, parse_keep
from hy_prfl.inference.candidate_results import Candidates
from hy_prfl.inference.candidate_settings import CandidateSettings, RewardGuidance
from hy_prfl.inference.candidates import sample_candidates
from hy_prfl.inference.pipelines import load_pipeline
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.reward_model import WanRewardModel


NUM_STEPS = 6
INPUTS = {
    "prompt": "a red circle",
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": NUM_STEPS,
    "max_sequence_length": 16,
    "guidance_scale": 3.0,
}
KEEP = parse_keep("1:5,3:2,5:1")
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "unipc_3": lambda: UniPCMultistepScheduler(solver_order=3, **FLOW),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
    "deis": lambda: DEISMultistepScheduler(**FLOW),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
}


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    pipeline = build_pipeline(num_layers=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_reward_model(pipeline: Any, **options: Any) -> WanRewardModel:
    torch.manual_seed(3)
    return WanRewardModel.from_transformer(pipeline.transformer, num_layers=1, **options).eval()


@pytest.fixture(scope="module")
def reward_model(pipeline: WanPipeline) -> WanRewardModel:
    return make_reward_model(pipeline)


def sample(pipeline: Any, reward_model: WanRewardModel, seeds: Any = range(8), **options: Any) -> Candidates:
    inputs = options.pop("inputs", INPUTS)
    return sample_candidates(
        pipeline, reward_model, seeds, CandidateSettings(**options), output_type="latent", **inputs
    )


def plain(pipeline: Any, seed: int, inputs: Any = INPUTS, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(generator=generator, output_type="latent", **{**inputs, **options}).frames[0]


def trajectory(pipeline: Any, seed: int, inputs: Any = INPUTS) -> list[torch.Tensor]:
    """Latents after each step of a plain sample."""
    seen: list[torch.Tensor] = []

    def look(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        return {}

    plain(pipeline, seed, inputs, callback_on_step_end=look)
    return seen


@pytest.fixture(params=list(SCHEDULERS))
def scheduled(request: pytest.FixtureRequest, pipeline: WanPipeline) -> WanPipeline:
    return WanPipeline(**{**pipeline.components, "scheduler": SCHEDULERS[request.param]()})


def test_the_winner_is_the_plain_sample_of_its_seed(scheduled: WanPipeline, reward_model: WanRewardModel) -> None:
    scheduled.set_progress_bar_config(disable=True)
    keep = KEEP if not isinstance(scheduled.scheduler, FlowMatchHeunDiscreteScheduler) else parse_keep("2:5,4:2,6:1")
    result = sample(scheduled, reward_model, keep=keep)
    expected = plain(scheduled, result.chosen.seed)
    torch.testing.assert_close(result.frames, expected, atol=1e-6, rtol=1e-6)
    batched = sample(scheduled, reward_model, keep=keep, batch_size=3)
    assert batched.chosen.seed == result.chosen.seed
    torch.testing.assert_close(batched.frames, expected, atol=1e-5, rtol=1e-5)


def test_one_at_a_time_it_is_equal_bit_for_bit(pipeline: WanPipeline, reward_model: WanRewardModel) -> None:
    result = sample(pipeline, reward_model, keep=KEEP)
    assert torch.equal(result.frames, plain(pipeline, result.chosen.seed))


def test_those_with_the_best_logits_go_on(pipeline: WanPipeline, reward_model: WanRewardModel) -> None:
    """Scored and dropped by hand, on the plain samples of all seeds."""
    result = sample(pipeline, reward_model, keep=KEEP)
    chains = [trajectory(pipeline, seed) for seed in range(8)]
    text, _ = pipeline.encode_prompt(INPUTS["prompt"], do_classifier_free_guidance=False, max_sequence_length=16)
    pipeline.scheduler.set_timesteps(NUM_STEPS)
    alive = list(range(8))
    for step, num_kept in ((1, 5), (3, 2), (5, 1)):
        timestep = pipeline.scheduler.timesteps[step].reshape(1)
        with torch.no_grad():
            logits = {seed: float(reward_model(chains[seed][step - 1], timestep, text).logits) for seed in alive}
        for seed, logit in logits.items():
            assert result.candidates[seed].logits[step] == pytest.approx(logit, abs=1e-6)
        best = sorted(alive, key=lambda seed: -logits[seed])[:num_kept]
        assert {seed for seed in alive if result.candidates[seed].dropped_after == step} == {*alive} - {*best}
        alive = sorted(best)
    assert [result.chosen.seed] == alive
    assert result.num_forwards == 2 * num_forwards(KEEP, num_candidates=8, num_inference_steps=NUM_STEPS) == 2 * 23
    assert result.num_reward_forwards == num_scores(KEEP, num_candidates=8, num_final_timesteps=3) == 8 + 5 + 2


def test_best_of_n(pipeline: WanPipeline, reward_model: WanRewardModel) -> None:
    result = sample(pipeline, reward_model, seeds=[3, 5, 9], final_timesteps=(300, 700), score_every_step=True)
    logits = {each.seed: each.final_logit for each in result.candidates}
    assert result.chosen.seed == max(logits, key=lambda seed: logits[seed] or 0.0)
    assert torch.equal(result.frames, plain(pipeline, result.chosen.seed))
    assert all(sorted(each.logits) == [1, 2, 3, 4, 5] for each in result.candidates)
    assert sum(each.dropped_after == NUM_STEPS for each in result.candidates) == 2
    assert (result.num_forwards, result.num_reward_forwards) == (2 * 3 * 6, 3 * 5 + 3 * 2)


def test_frames_are_those_of_the_pipeline(pipeline: WanPipeline, reward_model: WanRewardModel) -> None:
    result = sample_candidates(pipeline, reward_model, [4, 5], CandidateSettings(keep=parse_keep("2:1")), **INPUTS)
    generator = torch.Generator().manual_seed(result.chosen.seed)
    assert (result.frames == pipeline(generator=generator, output_type="np", **INPUTS).frames[0]).all()


def test_lora(reward_model: WanRewardModel) -> None:
    pipeline = build_pipeline(num_layers=2)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    result = sample(pipeline, reward_model, keep=KEEP)
    assert torch.equal(result.frames, plain(pipeline, result.chosen.seed))


def test_two_experts() -> None:
    pipeline = build_pipeline(num_layers=2, boundary_ratio=0.875)
    pipeline.set_progress_bar_config(disable=True)
    result = sample(pipeline, make_reward_model(pipeline), keep=KEEP)
    assert torch.equal(result.frames, plain(pipeline, result.chosen.seed))
    assert result.num_forwards == 2 * 23


IMAGE = Image.effect_noise((48, 32), 60).convert("RGB")


class TestImageToVideo:
    @pytest.mark.parametrize("judge", ["own", "text_to_video"])
    @pytest.mark.parametrize("kind", ["clip", "experts", "5b"])
    def test_condition_and_image_shrink_too(self, kind: str, judge: str) -> None:
        options: dict[str, Any] = {"clip": {}, "experts": {"boundary_ratio": 0.9}, "5b": {"expand_timesteps": True}}
        pipeline = build_pipeline(image_to_video=True, num_layers=2, **options[kind])
        pipeline.set_progress_bar_config(disable=True)
        if judge == "text_to_video" and kind != "5b":
            with pytest.raises(ValueError, match="`in_channels` 16 against 36"):
                sample(pipeline, make_reward_model(build_pipeline(num_layers=2)), inputs={**INPUTS, "image": IMAGE})
            return
        inputs = {**INPUTS, "image": IMAGE} | ({"height": 64, "width": 96} if kind == "5b" else {})
        reward_model = make_reward_model(pipeline)
        result = sample(pipeline, reward_model, keep=KEEP, inputs=inputs)
        expected = plain(pipeline, result.chosen.seed, inputs)
        torch.testing.assert_close(result.frames, expected, atol=1e-6, rtol=1e-6)
        resampled = sample(pipeline, reward_model, keep=parse_keep("2:3"), resample=True, inputs=inputs, batch_size=2)
        assert len(resampled.candidates) == 8 + 3


class TestGuidance:
    def test_one_euler_step_goes_up_the_logit(self, pipeline: WanPipeline, reward_model: WanRewardModel) -> None:
        euler = WanPipeline(**{**pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)})
        euler.set_progress_bar_config(disable=True)
        guidance = RewardGuidance(scale=0.5, first_step=NUM_STEPS, last_step=NUM_STEPS)
        result = sample(euler, reward_model, seeds=[7], guidance=guidance)
        before = trajectory(euler, 7)[-2]
        sigma = euler.scheduler.sigmas[NUM_STEPS - 1]
        velocity = (before - plain(euler, 7)) / sigma
        leaf = before.clone().requires_grad_()
        text, _ = euler.encode_prompt(INPUTS["prompt"], do_classifier_free_guidance=False, max_sequence_length=16)
        timestep = euler.scheduler.timesteps[NUM_STEPS - 1].reshape(1)
        (gradient,) = torch.autograd.grad(reward_model(leaf, timestep, text).logits.sum(), leaf)
        guided = velocity - 0.5 * velocity.norm() * gradient / gradient.norm()
        torch.testing.assert_close(result.frames, (before - sigma * guided)[0], atol=1e-5, rtol=1e-4)
        assert (result.num_reward_forwards, result.num_reward_backwards) == (1, 1)

    def test_steps_outside_the_range_are_plain(self, pipeline: WanPipeline, reward_model: WanRewardModel) -> None:
        guidance = RewardGuidance(scale=0.5, first_step=3, last_step=4)
        result = sample(pipeline, reward_model, seeds=[7, 8], guidance=guidance, keep=parse_keep("2:1"))
        expected = sample(pipeline, reward_model, seeds=[7, 8], keep=parse_keep("2:1"))
        assert [each.logits for each in result.candidates] == [each.logits for each in expected.candidates]
        assert not torch.equal(result.frames, expected.frames)
        assert result.num_reward_backwards == 2
        assert all(parameter.grad is None for parameter in reward_model.parameters())


class TestResampling:
    def test_copies(self, pipeline: WanPipeline, reward_model: WanRewardModel) -> None:
        result = sample(pipeline, reward_model, seeds=range(4), keep=parse_keep("2:2,4:2"), resample=True)
        first, second = result.candidates[4:6], result.candidates[6:8]
        assert [each.copied_after for each in (*first, *second)] == [2, 2, 4, 4]
        alive = [number for number, each in enumerate(result.candidates[:4]) if each.dropped_after != 2]
        assert [each.copied_from for each in first] == alive
        assert len(result.candidates) == 8
        assert sum(each.final_logit is not None for each in result.candidates) == 4
        assert result.num_forwards == 2 * 4 * NUM_STEPS

    def test_a_copy_has_the_same_signal_and_noise_of_the_same_size(
        self, pipeline: WanPipeline, reward_model: WanRewardModel
    ) -> None:
        """With Euler, whose step gives the clean latents that it foresees exactly."""
        euler = WanPipeline(**{**pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)})
        euler.set_progress_bar_config(disable=True)
        seen: list[torch.Tensor] = []
        forward = euler.transformer.forward
        euler.transformer.forward = lambda **kwargs: (seen.append(kwargs["hidden_states"]), forward(**kwargs))[1]
        try:
            result = sample(
                euler, reward_model, seeds=[1, 2], keep=parse_keep("2:1"), resample=True, renoise=1.0, batch_size=2
            )
        finally:
            del euler.transformer.forward
        parent, copy = next(each for each in seen[4:] if len(each) == 2)
        seed = result.candidates[2].seed
        chain = trajectory(euler, seed)
        torch.testing.assert_close(parent, chain[1][0], atol=1e-5, rtol=1e-5)
        sigmas = euler.scheduler.sigmas
        velocity = (chain[0] - chain[1]) / (sigmas[1] - sigmas[2])
        clean = (chain[0] - sigmas[1] * velocity)[0]
        noise = (copy - (1 - sigmas[2]) * clean) / sigmas[2]
        old = (parent - (1 - sigmas[2]) * clean) / sigmas[2]
        assert noise.std() == pytest.approx(1.0, abs=0.1)
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), old.flatten()]))[0, 1]) < 0.1


def test_nothing_is_left_in_the_pipeline(pipeline: WanPipeline, reward_model: WanRewardModel) -> None:
    before = plain(pipeline, 1)
    sample(pipeline, reward_model, keep=KEEP)
    with pytest.raises(ValueError, match=r"`keep` must be fewer than the 2 candidates"):
        sample(pipeline, reward_model, seeds=[1, 2], keep=parse_keep("2:2"))
    for owner, name in (
        (pipeline, "prepare_latents"),
        (pipeline.scheduler, "step"),
        (pipeline.transformer, "forward"),
    ):
        assert name not in vars(owner)
    assert torch.equal(plain(pipeline, 1), before)


def test_a_reward_model_of_another_type(pipeline: WanPipeline, reward_model: WanRewardModel) -> None:
    result = sample(pipeline, reward_model, keep=KEEP)
    other = make_reward_model(pipeline).to(torch.float64)
    assert sample(pipeline, other, keep=KEEP).chosen.seed == result.chosen.seed


@pytest.mark.parametrize(
    ("seeds", "options", "inputs", "message"),
    [
        ([], {}, {}, "`seeds` must be one or more"),
        ([1, 1], {}, {}, "`seeds` must be one or more, all different"),
        ([1, 2], {}, {"prompt": ["a", "b"]}, "`prompt` must be one text"),
        ([1, 2], {}, {"num_videos_per_prompt": 2}, "`num_videos_per_prompt` must be left out"),
        ([1, 2], {"keep": parse_keep("6:1")}, {}, "`keep` must be before the last step"),
        ([1, 2], {"batch_size": 0}, {}, "`batch_size`"),
        ([1, 2], {"renoise": 1.5}, {}, "`renoise`"),
        ([1, 2], {"final_timesteps": (0,)}, {}, "`final_timesteps`"),
    ],
)
def test_bad_input(
    pipeline: WanPipeline, reward_model: WanRewardModel, seeds: Any, options: Any, inputs: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(pipeline, reward_model, seeds=seeds, inputs={**INPUTS, **inputs}, **options)


def test_a_step_cache_is_refused(reward_model: WanRewardModel, pipeline_dir: Path) -> None:
    cached = load_pipeline(str(pipeline_dir), dtype=torch.float32, step_cache="first_block")
    with pytest.raises(ValueError, match="step cache"):
        sample(cached, reward_model)


def test_a_reward_that_is_no_number(pipeline: WanPipeline) -> None:
    broken = make_reward_model(pipeline)
    broken.head.linear_1.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="seed 0 is nan"):
        sample(pipeline, broken, keep=KEEP)
