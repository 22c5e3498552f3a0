"""The gradient of the reward, without a trainer. `tests/trainers/test_prfl_reward_models.py` has several reward models."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.rollout.gradient_steps import GradientStep
from hy_prfl.rollout.reward_feedback import RewardFeedback
from tests.planning.recipes import prfl_recipe


@pytest.mark.parametrize("in_half", [False, True])
def test_gradient_is_that_of_plain_autograd_in_the_given_context(pipeline_dir: Path, in_half: bool) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    model = WanRewardModel.from_transformer(transformer, num_layers=2).requires_grad_(False)
    # Makes gradients that are not close to zero.
    torch.nn.init.normal_(model.head.linear_3.weight, std=1.0)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=in_half)
    training = prfl_recipe(num_inference_steps=5, reward_scale=0.5)
    latents, timesteps, prompts = torch.randn(2, 16, 2, 4, 4), torch.tensor([700.0, 300.0]), torch.randn(2, 16, 32)
    step = GradientStep(latents, timesteps, torch.tensor(0.25), latents, lambda *_: iter(()))
    found = RewardFeedback(training, [model], names=["reward"], autocast=autocast).differentiate(
        step, Conditioning(prompts)
    )

    leaf = latents.clone().requires_grad_()
    with autocast():
        logits = model(leaf, timesteps, prompts).logits
    loss = -0.5 * logits.sigmoid().log().mean()
    loss.backward()
    torch.testing.assert_close(found.logits, logits.detach(), rtol=0, atol=0)
    torch.testing.assert_close(found.loss, loss.detach())
    # Divided by the step's width over the mean width of a chain of five.
    torch.testing.assert_close(found.latents_grad, leaf.grad / (5 * 0.25))
    assert found.anchor is None
    with torch.no_grad():
        assert torch.equal(found.logits, model(latents, timesteps, prompts).logits) is not in_half
