import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from hy_prfl.formats.pipeline_info import PipelineInfo
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.experts import ExpertPair, Experts, PairWeights, choose_experts
from hy_prfl.models.loading import load_scheduler
from hy_prfl.rollout.chain import walk_with_gradient
from hy_prfl.rollout.sampling import sample_latents


EXPERTS = Experts(875.0, ("high_noise", "low_noise"))


def edit_index(folder: Path, target: Path, **values: Any) -> PipelineInfo:
    """Copy a pipeline's model_index.json, with some entries changed."""
    target.mkdir()
    index = json.loads((folder / "model_index.json").read_text()) | values
    (target / "model_index.json").write_text(json.dumps(index))
    return PipelineInfo.read(str(target))


def test_the_option_must_fit_the_pipeline(pipeline_dir: Path, expert_pipeline_dir: Path, tmp_path: Path) -> None:
    assert choose_experts(PipelineInfo.read(str(pipeline_dir)), None) == Experts(0.0, ("high_noise",))
    assert choose_experts(PipelineInfo.read(str(expert_pipeline_dir)), "low_noise") == Experts(875.0, ("low_noise",))
    assert choose_experts(PipelineInfo.read(str(expert_pipeline_dir)), "both") == EXPERTS
    with pytest.raises(ValueError, match=r"`expert` must be left out, .*model_index.json has one transformer"):
        choose_experts(PipelineInfo.read(str(pipeline_dir)), "high_noise")
    with pytest.raises(ValueError, match=r"`expert` must be high_noise, low_noise or both, .*got None"):
        choose_experts(PipelineInfo.read(str(expert_pipeline_dir)), None)
    with pytest.raises(ValueError, match=r"model_index.json: .*`boundary_ratio` is None, not in \(0, 1\)"):
        choose_experts(edit_index(expert_pipeline_dir, tmp_path / "a", boundary_ratio=None), "both")
    with pytest.raises(ValueError, match=r"`boundary_ratio` is 0.9, but there is no `transformer_2`"):
        choose_experts(edit_index(pipeline_dir, tmp_path / "b", boundary_ratio=0.9), None)


@pytest.mark.parametrize("image_to_video", [False, True])
@pytest.mark.parametrize("boundary_ratio", [0.5, 0.875])
def test_whole_chain_equals_the_stock_pipeline(tmp_path: Path, image_to_video: bool, boundary_ratio: float) -> None:
    folder = tmp_path / "p"
    build_pipeline(image_to_video=image_to_video, boundary_ratio=boundary_ratio).save_pretrained(folder)
    pipeline_class: Any = WanImageToVideoPipeline if image_to_video else WanPipeline
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    calls = {"transformer": 0, "transformer_2": 0}
    for name in calls:

        def count(module: torch.nn.Module, args: Any, kwargs: dict[str, torch.Tensor], name: str = name) -> None:
            calls[name] += 1
            seen.append(kwargs["hidden_states"])

        getattr(pipeline, name).register_forward_pre_hook(count, with_kwargs=True)
    noise = torch.randn(2, 16, 2, 4, 6)
    prompt_embeds, negative = pipeline.encode_prompt(["a red circle", "a wall"], max_sequence_length=16)
    image = {"image": Image.new("RGB", (48, 32), (200, 30, 30))} if image_to_video else {}
    expected = pipeline(
        **image, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative, latents=noise, height=32, width=48,
        num_frames=5, num_inference_steps=6, guidance_scale=3.0, output_type="latent",
    ).frames  # fmt: skip
    assert min(calls.values()) > 0
    before = dict(calls)
    experts = Experts(boundary_ratio * 1000, ("high_noise", "low_noise"))
    actual = sample_latents(
        ExpertPair(pipeline.transformer, pipeline.transformer_2, experts), load_scheduler(str(folder)), noise=noise,
        num_inference_steps=6, negative_prompt_embeds=negative, guidance_scale=3.0,
        conditioning=Conditioning(prompt_embeds, condition=seen[0][:, 16:] if image_to_video else None),
    )  # fmt: skip
    torch.testing.assert_close(actual, expected)
    assert calls == {name: 2 * count for name, count in before.items()}


def test_a_chain_with_gradient_steps_of_both_experts_is_the_stock_chain(expert_pipeline_dir: Path) -> None:
    pipeline = WanPipeline.from_pretrained(expert_pipeline_dir)
    scheduler = load_scheduler(str(expert_pipeline_dir))
    pair = ExpertPair(pipeline.transformer, pipeline.transformer_2, EXPERTS)
    noise, prompt = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 32)
    path = []
    with torch.no_grad():
        scheduler.set_timesteps(7)
        latents = noise
        for timestep in scheduler.timesteps:
            model = pipeline.transformer if timestep >= 875 else pipeline.transformer_2
            latents = scheduler.step(model(latents, timestep.expand(2), prompt).sample, timestep, latents).prev_sample
            path.append(latents)
    for step_index in (0, 4):
        pair.zero_grad()
        chain = walk_with_gradient(
            pair, scheduler, noise=noise, step_indices=[step_index], num_inference_steps=7,
            conditioning=Conditioning(prompt),
        )  # fmt: skip
        step = next(chain)
        assert torch.equal(step.latents, path[step_index])
        next(step.surrogates(2 * step.latents / step.latents.numel())).backward()
        at_work, at_rest = (pair.high_noise, pair.low_noise) if step_index == 0 else (pair.low_noise, pair.high_noise)
        assert all(parameter.grad is not None for parameter in at_work.parameters())
        assert all(parameter.grad is None for parameter in at_rest.parameters())


def test_the_boundary_belongs_to_the_high_noise_expert() -> None:
    pair = ExpertPair(torch.nn.Identity(), torch.nn.Identity(), EXPERTS)
    pair.high_noise.forward = lambda **inputs: "high"  # type: ignore[method-assign]
    pair.low_noise.forward = lambda **inputs: "low"  # type: ignore[method-assign]
    assert pair(timestep=torch.tensor([875.0, 1000.0])) == "high"
    assert pair(timestep=torch.tensor([874])) == "low"
    with pytest.raises(ValueError, match="must be on one side of the boundary 875"):
        pair(timestep=torch.tensor([874.9, 875.0]))


def test_steps_that_may_take_gradient() -> None:
    timesteps = [1000, 950, 875, 874, 500, 100]
    high, low, both = (Experts(875.0, trained) for trained in (("high_noise",), ("low_noise",), EXPERTS.trained))
    assert high.gradient_steps(timesteps, None) == (0, 2)
    assert low.gradient_steps(timesteps, None) == (3, 4)
    assert both.gradient_steps(timesteps, None) == Experts().gradient_steps(timesteps, None) == (0, 4)
    assert low.gradient_steps(timesteps, [4, 4]) == (4, 4)
    with pytest.raises(
        ValueError, match=r"`step_range` must be within \[0, 2\], the steps of high_noise.*got \[1, 3\]"
    ):
        high.gradient_steps(timesteps, [1, 3])
    with pytest.raises(ValueError, match=r"`num_gradient_steps` must be in \[1, 2\], the steps of low_noise.*got 3"):
        low.gradient_steps(timesteps, None, 3)
    with pytest.raises(ValueError, match="`num_inference_steps` must be such that some step is one of low_noise"):
        low.gradient_steps([1000, 900, 500], None)


def test_which_expert_has_to_be_there_frozen() -> None:
    high, low, both = (Experts(875.0, trained) for trained in (("high_noise",), ("low_noise",), EXPERTS.trained))
    for rolls_out, samples, expected in (
        (True, False, (None, "high_noise", None)),
        (True, True, ("low_noise", "high_noise", None)),
        (False, True, ("low_noise", "high_noise", None)),
        (False, False, (None, None, None)),
    ):
        found = tuple(each.frozen(rolls_out=rolls_out, samples=samples) for each in (high, low, both))
        assert found == expected
    assert Experts().frozen(rolls_out=True, samples=True) is None


def test_weights_of_a_pair_go_by_the_names_of_its_parameters(expert_pipeline_dir: Path) -> None:
    pipeline = WanPipeline.from_pretrained(expert_pipeline_dir)
    pair = ExpertPair(pipeline.transformer, pipeline.transformer_2, EXPERTS)
    parts = {"high_noise": pipeline.transformer.state_dict(), "low_noise": pipeline.transformer_2.state_dict()}
    weights = PairWeights(parts)  # type: ignore[arg-type]
    state_dict = pair.state_dict()
    assert set(weights) == set(state_dict)
    assert len(weights) == len(state_dict)
    assert all(torch.equal(weights[name], value) for name, value in state_dict.items())
