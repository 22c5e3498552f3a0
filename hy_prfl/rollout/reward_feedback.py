"""Scores the latents of a step with gradient, and differentiates the reward. Does not depend on the generator."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from ..configs.prfl import PRFLTrainingConfig
from ..losses import RewardCombination, anchor_loss, reward_feedback_loss
from ..models.conditioning import Conditioning, num_clean_frames
from ..models.shared_backbone import OneBackbone, group_by_backbone
from ..runtime.context_parallel import ContextParallelGroup
from .gradient_steps import GradientStep


InUse = Callable[[nn.Module], AbstractContextManager[None]]


def always_in_use(model: nn.Module) -> AbstractContextManager[None]:
    """The `in_use` of models that are always on the device where they compute."""
    return nullcontext()


class RewardGradient(NamedTuple):
    """
    The reward of a step, and its gradients; all tensors are detached.

    Args:
        latents_grad (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Gradient of the loss with respect to the latents that are scored.
        loss (`torch.Tensor`, scalar), logits (`torch.Tensor` of shape `(batch_size,)`):
            Loss and logits of the reward; several reward models are combined.
        model_logits (`torch.Tensor` of shape `(num_models, batch_size)`):
            Logits of each reward model.
        velocity_grad (`torch.Tensor` of the shape of `latents_grad`, *optional*), anchor (`torch.Tensor`, scalar, *optional*):
            Gradient of the scaled anchor in the velocity, and its value without the scale, see
            [`~hy_prfl.losses.anchor_loss`].
    """

    latents_grad: torch.Tensor
    loss: torch.Tensor
    logits: torch.Tensor
    model_logits: torch.Tensor
    velocity_grad: torch.Tensor | None = None
    anchor: torch.Tensor | None = None


class Pass(NamedTuple):
    """
    One forward pass, of a single reward model or of all that share a backbone.

    Args:
        scorer (`nn.Module`):
            The reward model, or a [`~hy_prfl.models.shared_backbone.OneBackbone`] of several; its logits are `(batch_size,)` or `(len(places), batch_size)`.
        places (`list[int]`):
            Indices of these reward models in the list of all.
    """

    scorer: nn.Module
    places: list[int]


class RewardFeedback:
    """
    Scores noisy latents, and differentiates the reward loss with respect to them (paper, equation 9).

    Several reward models are combined to one logit, see [`~hy_prfl.losses.RewardCombination`]. Those that share a
    backbone are called as one, see [`~hy_prfl.models.shared_backbone.OneBackbone`]. Only one call has activations in memory
    at a time.

    Args:
        config (`PRFLTrainingConfig`):
            Options of the run.
        models (`Sequence[nn.Module]`):
            The frozen reward models, one or more.
        names (`Sequence[str]`):
            Name of each reward model in the metrics.
        autocast (`Callable`):
            Returns the context in which models are called.
        context_parallel (`ContextParallelGroup`, *optional*):
            The ranks that share a clip.
        mean_foreseen_gain (`float`, defaults to 1.0):
            See [`~hy_prfl.rollout.gradient_steps.mean_foreseen_gain`], for `reward_at` foreseen.
        in_use (`Callable`, *optional*):
            Returns a context in which a model is on the device where it computes; if left out, it always is.
    """

    def __init__(
        self,
        config: PRFLTrainingConfig,
        models: Sequence[Any],
        *,
        names: Sequence[str],
        autocast: Callable[[], AbstractContextManager[Any]],
        context_parallel: ContextParallelGroup | None = None,
        mean_foreseen_gain: float = 1.0,
        in_use: InUse = always_in_use,
    ) -> None:
        self.config = config
        self.models = list(models)
        self.passes = [
            Pass(models[places[0]] if len(places) == 1 else OneBackbone([models[place] for place in places]), places)
            for places in group_by_backbone(models)
        ]
        self.names = list(names)
        self.autocast = autocast
        self.context_parallel = context_parallel
        self.mean_foreseen_gain = mean_foreseen_gain
        self.in_use = in_use
        weights = config.reward_weights or [1.0] * len(self.models)
        self.combination = RewardCombination(weights, config.reward_combination, config.reward_disagreement)

    def differentiate(self, step: GradientStep, conditioning: Conditioning) -> RewardGradient:
        """
        Score what a step with gradient leads to.

        The reward is differentiated with respect to these latents alone, on a leaf of their own: the reward models'
        activations are gone before the generator's backward pass begins, and they never meet the hooks of the engine
        that shards the generator.

        Each backbone has a backward pass of its own, which starts from the derivatives of the loss in its logits. Where
        these derivatives depend on the logits of all reward models, all passes but the last are first run once more
        without gradient, so that all logits are known before the first backward pass.
        """
        leaf = step.latents.detach().requires_grad_()
        logits = leaf.new_zeros(len(self.models), len(leaf))
        if not self.combination.is_separable(self.config.reward_loss):
            for scorer, places in self.passes[:-1]:
                with torch.no_grad(), self.in_use(self.models[places[0]]):
                    _put(logits, places, self.score(scorer, leaf, step.timesteps, conditioning))
        gradients: list[torch.Tensor] = []
        for scorer, places in reversed(self.passes):
            with self.in_use(self.models[places[0]]):
                own_logits = self.score(scorer, leaf, step.timesteps, conditioning)
                _put(logits, places, own_logits.detach())
                slopes = self.slopes(logits)
                slopes = torch.stack([slopes[place] for place in places]).view_as(own_logits)
                gradients += torch.autograd.grad(own_logits, leaf, slopes.to(own_logits))
        latents_grad = gradients[0] if len(gradients) == 1 else torch.stack(gradients).sum(dim=0)
        if self.context_parallel is not None:
            latents_grad = self.context_parallel.mean(latents_grad)
        return RewardGradient(
            latents_grad / self.divisor(step.gain),
            self.loss(logits),
            self.combination(logits),
            logits,
            *self.anchor_gradient(step, conditioning),
        )

    def anchor_gradient(
        self, step: GradientStep, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """
        Gradient of the anchor, times its scale, in the velocity of a step, and the anchor; None without `base_velocity`.

        It is not divided by the width of the step, because a relative change of the velocity means the same at every
        step. Given frames are left out, because they are not predicted.
        """
        if step.base_velocity is None:
            return None, None
        velocity = step.velocity.detach().requires_grad_()
        first = num_clean_frames(velocity, conditioning.condition)
        anchor = anchor_loss(velocity[:, :, first:], step.base_velocity[:, :, first:])
        (velocity_grad,) = torch.autograd.grad(self.config.anchor_scale * anchor, velocity)
        return velocity_grad, anchor.detach()

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """The reward loss of logits `(num_models, batch_size)`."""
        config = self.config
        return reward_feedback_loss(
            self.combination(logits), form=config.reward_loss, scale=config.reward_scale, target=config.reward_target
        )

    def slopes(self, logits: torch.Tensor) -> torch.Tensor:
        """Derivative of the loss in each logit, of the shape of `logits`."""
        logits = logits.detach().clone().requires_grad_()
        (slopes,) = torch.autograd.grad(self.loss(logits), logits)
        return slopes

    def score(
        self, model: Any, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Logits of noisy latents at their timesteps, by the scorer of a [`Pass`]."""
        inputs = conditioning.model_inputs(latents, timesteps)
        with self.autocast():
            return model(**inputs).logits

    def divisor(self, gain: torch.Tensor) -> torch.Tensor:
        """
        Divisor of the gradient in the latents of a step, one number or one for each sample.

        The gradient in a velocity is scaled by gain / divisor. The mean of this factor over the steps is the same for both
        values of `reward_at`, with `divide_by_step_width` or without: the mean width of the chain's steps,
        `1 / num_inference_steps`, divided by the number of chained steps. So `reward_scale` means the same for all.
        """
        config = self.config
        total = config.num_inference_steps * config.num_chained_steps
        if config.divide_by_step_width:
            divisor = total * gain
        elif config.reward_at == "foreseen":
            divisor = torch.full_like(gain, total * self.mean_foreseen_gain)
        else:
            divisor = torch.full_like(gain, config.num_chained_steps)
        # The width of a step is on the CPU. Only a tensor without dimensions may be combined with tensors on a GPU.
        return divisor if divisor.ndim == 0 else divisor.view(-1, 1, 1, 1, 1)

    def metrics(self, gradients: Sequence[RewardGradient]) -> dict[str, torch.Tensor]:
        """Metrics of the rewards of an update."""
        logits = torch.cat([each.logits for each in gradients])
        metrics = {
            "reward_loss": torch.stack([each.loss for each in gradients]).mean(),
            "reward": logits.sigmoid().mean(),
            "reward_logit": logits.mean(),
        }
        anchors = [each.anchor for each in gradients if each.anchor is not None]
        if anchors:
            metrics["anchor"] = torch.stack(anchors).mean()
        if len(self.models) > 1:
            each_logits = torch.cat([each.model_logits for each in gradients], dim=1)
            rewards = each_logits.sigmoid().mean(dim=1)
            metrics |= {f"reward/{name}": reward for name, reward in zip(self.names, rewards, strict=True)}
            metrics["reward_disagreement"] = self.combination.spread(each_logits).mean()
        return metrics


def _put(logits: torch.Tensor, places: Sequence[int], found: torch.Tensor) -> None:
    """Write the logits of one pass to their rows. A list as an index would be copied to the GPU."""
    for place, row in zip(places, found.view(len(places), -1), strict=True):
        logits[place] = row
