"""The reward of what a step with gradient leads to, and its gradient in these latents. Nothing here knows the generator."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from ..configs.prfl import PRFLTrainingConfig
from ..losses import reward_feedback_loss
from ..models.conditioning import Conditioning
from ..models.loading import Deferred, loaded
from ..models.reward_model import WanRewardModel
from ..rollout import GradientStep
from ..runtime.context_parallel import ContextParallelGroup
from ..runtime.host_weights import HostWeights
from .run import Run


InUse = Callable[[], AbstractContextManager[None]]


class RewardGradient(NamedTuple):
    """
    The reward of a step, all of it without gradient.

    Args:
        latents_grad (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Gradient of the loss in the latents that the step leads to.
        loss (`torch.Tensor`, scalar), logits (`torch.Tensor` of shape `(batch_size,)`):
            Of the reward.
    """

    latents_grad: torch.Tensor
    loss: torch.Tensor
    logits: torch.Tensor


class RewardTerm(NamedTuple):
    """
    What the scalars of a gradient step stand for.

    Args:
        ids (`list[str]`):
            Rows of the prompts.
        feedback (`RewardGradient`):
            Loss and logits.
        staleness (`torch.Tensor`, scalar, *optional*):
            Relative change of the velocity since the state was stored, if the step starts from one.
    """

    ids: list[str]
    feedback: RewardGradient
    staleness: torch.Tensor | None


class RewardFeedback:
    """
    Scores noisy latents, and differentiates the reward loss with respect to them (paper, equation 9).

    Args:
        config (`PRFLTrainingConfig`):
            Options of the run.
        model (`nn.Module`):
            The frozen reward model.
        accelerator (`Accelerator`):
            Its autocast.
        context_parallel (`ContextParallelGroup`, *optional*):
            The ranks that share a clip.
        mean_foreseen_gain (`float`, defaults to 1.0):
            See [`~hy_prfl.rollout.mean_foreseen_gain`], for `reward_at` foreseen.
        in_use (`Callable`, *optional*):
            Makes a context in which the model is where it computes; it always is if left out.
    """

    def __init__(
        self,
        config: PRFLTrainingConfig,
        model: Any,
        *,
        accelerator: Accelerator,
        context_parallel: ContextParallelGroup | None = None,
        mean_foreseen_gain: float = 1.0,
        in_use: InUse = nullcontext,
    ) -> None:
        self.config = config
        self.model = model
        self.accelerator = accelerator
        self.context_parallel = context_parallel
        self.mean_foreseen_gain = mean_foreseen_gain
        self.in_use = in_use

    def differentiate(self, step: GradientStep, conditioning: Conditioning) -> RewardGradient:
        """
        Score what a step with gradient leads to.

        The reward is differentiated with respect to these latents alone, on a leaf of their own: the reward model's
        activations are gone before the generator's backward pass begins, and the reward model never meets the hooks of
        the engine that shards the generator.
        """
        config = self.config
        leaf = step.latents.detach().requires_grad_()
        with self.in_use():
            logits = self.score(leaf, step.timesteps, conditioning)
            loss = reward_feedback_loss(
                logits, form=config.reward_loss, scale=config.reward_scale, target=config.reward_target
            )
            (latents_grad,) = torch.autograd.grad(loss, leaf)
        if self.context_parallel is not None:
            latents_grad = self.context_parallel.mean(latents_grad)
        return RewardGradient(latents_grad / self.divisor(step.gain), loss.detach(), logits.detach())

    def score(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Logits `(batch_size,)` of noisy latents at their timesteps."""
        inputs = conditioning.model_inputs(latents, timesteps)
        with self.accelerator.autocast():
            return self.model(**inputs).logits

    def divisor(self, gain: torch.Tensor) -> torch.Tensor:
        """
        What a gradient in the latents of a step is divided by, one number or one for each sample.

        The mean over the steps of gain / divisor, which is what the gradient in a velocity is scaled by, is the same for
        all forms of the reward: the mean width of the chain's steps, `1 / num_inference_steps`, shared by chained steps.
        So `reward_scale` means the same for all of them.
        """
        config = self.config
        total = config.num_inference_steps * config.num_chained_steps
        if config.divide_by_step_width:
            divisor = total * gain
        elif config.reward_at == "foreseen":
            divisor = torch.full_like(gain, total * self.mean_foreseen_gain)
        else:
            divisor = torch.full_like(gain, config.num_chained_steps)
        # The width of a step is a scalar on the CPU, which goes with tensors of any device as long as it has no axes.
        return divisor if divisor.ndim == 0 else divisor.view(-1, 1, 1, 1, 1)

    def metrics(self, gradients: Sequence[RewardGradient]) -> dict[str, torch.Tensor]:
        """What is logged of the rewards of an update."""
        logits = torch.cat([each.logits for each in gradients])
        return {
            "reward_loss": torch.stack([each.loss for each in gradients]).mean(),
            "reward": logits.sigmoid().mean(),
            "reward_logit": logits.mean(),
        }


def place_reward_model(
    model: WanRewardModel | Deferred[WanRewardModel], config: PRFLTrainingConfig, run: Run
) -> tuple[nn.Module, InUse]:
    """A reward model as the options hold it: on the device, or in host memory; and the context that it computes in."""
    reward_model = loaded(model).requires_grad_(False).eval()
    in_use: InUse = nullcontext
    if config.offload_reward_model:
        in_use = HostWeights(reward_model, run.accelerator.device).on_device
    else:
        reward_model.to(run.accelerator.device)
    run.set_up_blocks(reward_model, num_checkpointed=config.reward_gradient_checkpointing_blocks)
    return reward_model, in_use
