"""
Numbers that upstream's own code computed, on tiny random checkpoints in upstream's own format.

`tests/golden/t2v` is in the repository. The image-to-video set is larger; `HY_PRFL_GOLDEN` may name a folder that holds
it as `i2v`, and then it is tested as well.
"""

import os
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file

from hy_prfl.flow_matching import add_noise, shift_sigmas, velocity_target
from hy_prfl.losses import flow_matching_loss, reward_feedback_loss
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.conversion import convert_reward_model, convert_transformer
from hy_prfl.models.reward_model import WanRewardModel, score_noised
from hy_prfl.rollout.chain import walk_with_gradient
from hy_prfl.rollout.sampling import predict_velocity


TEXT_LEN = 16
NUM_INFERENCE_STEPS = 12
FOLDERS = {"t2v": Path(__file__).parents[1] / "golden" / "t2v"}
if "HY_PRFL_GOLDEN" in os.environ:
    FOLDERS["i2v"] = Path(os.environ["HY_PRFL_GOLDEN"]) / "i2v"


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that the relative error is below 1e-4 of the expected tensor's norm."""
    error = torch.linalg.vector_norm(actual.detach().double() - expected.double())
    assert error < 1e-4 * torch.linalg.vector_norm(expected.double()), f"relative error {error / expected.norm():.2e}"


class Golden:
    """One folder of recorded numbers, and the converted models."""

    def __init__(self, folder: Path) -> None:
        self.expected = load_file(folder / "expected.safetensors")
        self.transformer = convert_transformer(folder).requires_grad_(True)
        reward = folder / "reward"
        self.reward_model: WanRewardModel = convert_reward_model(
            reward / "checkpoint-100", reward / "mlp_step_100.ckpt", reward / "query_attention_step_100.ckpt"
        ).requires_grad_(False)
        embeds = self.expected["prompt_embeds"]
        self.conditioning = Conditioning(
            torch.nn.functional.pad(embeds, (0, 0, 0, TEXT_LEN - embeds.shape[1])),
            image_embeds=self.expected.get("image_embeds"),
            condition=self.expected.get("condition"),
        )

    def scheduler_on_recorded_grid(self) -> "RecordedGrid":
        return RecordedGrid(self.expected["rollout.sigmas"], self.expected["rollout.timesteps"])


class RecordedGrid(UniPCMultistepScheduler):
    """diffusers' solver with upstream's sigmas, which differ from its own in the last digits."""

    def __init__(self, sigmas: torch.Tensor, recorded_timesteps: torch.Tensor) -> None:
        super().__init__(prediction_type="flow_prediction", use_flow_sigmas=True)
        self.recorded = sigmas, recorded_timesteps.long()

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device=device)
        self.sigmas, self.timesteps = self.recorded


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(FOLDERS[request.param])


def test_training_schedule(golden: Golden) -> None:
    uniform = 1 - torch.arange(1001) / 1000
    assert_close(shift_sigmas(uniform, flow_shift=5.0), golden.expected["train_sigmas"])
    recorded = golden.expected["train_timesteps"]
    assert torch.equal((1000 * shift_sigmas(uniform[:-1], flow_shift=5.0)).floor(), recorded)


@pytest.mark.parametrize("timestep", [201, 400, 600, 800, 1000])
def test_reward_features_and_logits(golden: Golden, timestep: int) -> None:
    expected = golden.expected
    noisy = add_noise(expected["latents"], expected["noise"], expected[f"sigma.{timestep}"])
    condition = golden.conditioning.condition
    hidden_states = noisy if condition is None else torch.cat([noisy, condition], dim=1)
    output = golden.reward_model(
        hidden_states=hidden_states,
        timestep=torch.tensor([float(timestep)]),
        encoder_hidden_states=golden.conditioning.prompt_embeds,
        encoder_hidden_states_image=golden.conditioning.image_embeds,
        output_features=True,
    )
    assert_close(output.features, expected[f"features.{timestep}"])
    assert_close(output.logits, expected[f"logit.{timestep}"])
    assert_close(output.logits.sigmoid(), expected[f"score.{timestep}"])


def test_score_noised_is_what_was_recorded_but_for_the_rounded_timestep(golden: Golden) -> None:
    expected = golden.expected
    logits = score_noised(
        golden.reward_model,
        latents=expected["latents"],
        noise=expected["noise"],
        sigmas=torch.ones(1),
        conditioning=golden.conditioning,
    )
    assert_close(logits, expected["logit.1000"])


def test_velocity(golden: Golden) -> None:
    # Recorded on clean latents with timestep 600. This checks the network only.
    model_pred = predict_velocity(
        golden.transformer, golden.expected["latents"], torch.tensor([600.0]), golden.conditioning
    )
    assert_close(model_pred, golden.expected["velocity.600"])


def test_flow_matching_step(golden: Golden) -> None:
    expected = golden.expected
    noisy = add_noise(expected["latents"], expected["noise"], expected["sigma.600"])
    golden.transformer.zero_grad()
    model_pred = predict_velocity(golden.transformer, noisy, torch.tensor([600.0]), golden.conditioning)
    loss = flow_matching_loss(model_pred, velocity_target(expected["latents"], expected["noise"]))
    assert_close(loss[None], expected["sft.600.loss"])
    loss.backward()
    assert_close(grad_norm(golden.transformer)[None], expected["sft.600.gradnorm"])


@pytest.mark.parametrize("step_index", [0, 5, 10])
def test_reward_step(golden: Golden, step_index: int) -> None:
    expected = golden.expected
    golden.transformer.zero_grad()
    (step,) = walk_with_gradient(
        golden.transformer,
        golden.scheduler_on_recorded_grid(),
        noise=expected["noise"],
        step_indices=[step_index],
        num_inference_steps=NUM_INFERENCE_STEPS,
        conditioning=golden.conditioning,
    )
    assert_close(step.latents, expected[f"prfl.{step_index}.latents"])
    assert step.timesteps.tolist() == [int(expected["rollout.timesteps"][step_index + 1])]

    condition = golden.conditioning.condition
    leaf = step.latents.requires_grad_()
    logits = golden.reward_model(
        hidden_states=leaf if condition is None else torch.cat([leaf, condition], dim=1),
        timestep=step.timesteps,
        encoder_hidden_states=golden.conditioning.prompt_embeds,
        encoder_hidden_states_image=golden.conditioning.image_embeds,
    ).logits
    loss = reward_feedback_loss(logits, form="sigmoid", scale=0.1, target=2.0)
    assert_close(logits, expected[f"prfl.{step_index}.logit"])
    assert_close(loss[None], expected[f"prfl.{step_index}.loss"])

    (surrogate,) = step.surrogates(torch.autograd.grad(loss, leaf)[0])
    surrogate.backward()
    assert_close(
        golden.transformer.blocks[1].attn1.to_q.weight.grad, expected[f"prfl.{step_index}.grad.blocks.1.self_attn.q"]
    )
    assert_close(golden.transformer.proj_out.weight.grad, expected[f"prfl.{step_index}.grad.head"])
    assert_close(grad_norm(golden.transformer)[None], expected[f"prfl.{step_index}.gradnorm"])


def grad_norm(model: torch.nn.Module) -> torch.Tensor:
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
