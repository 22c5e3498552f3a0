"""
The losses, and how the logits of several reward models are combined into one.

Each loss is computed in float32 for inputs of any type, and returns the mean over the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F


RewardLoss = Literal["logit", "sigmoid", "logsigmoid"]
CombinationForm = Literal["mean", "min", "product"]


def binary_reward_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Binary cross-entropy for the reward model's logits (paper, equation 6).

    Args:
        logits (`torch.Tensor` of shape `(batch_size,)`):
            Scores of noisy latents.
        labels (`torch.Tensor` of shape `(batch_size,)`):
            1 for a good clean clip, 0 for a poor one.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def bradley_terry_loss(chosen_logits: torch.Tensor, rejected_logits: torch.Tensor) -> torch.Tensor:
    """
    `-log sigmoid(chosen_logit - rejected_logit)`, the negative log-likelihood of the preference.

    Args:
        chosen_logits, rejected_logits (`torch.Tensor` of shape `(batch_size,)`):
            Scores of the two clips of each pair, at the same noise level.
    """
    return -F.logsigmoid(chosen_logits.float() - rejected_logits.float()).mean()


def flow_matching_loss(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error between predicted and target velocity (paper, equation 2)."""
    return F.mse_loss(model_pred.float(), target.float())


def reward_feedback_loss(
    logits: torch.Tensor, form: RewardLoss = "logsigmoid", scale: float = 1.0, target: float = 2.0
) -> torch.Tensor:
    """
    Loss of the generator's reward updates. It decreases when the reward increases.

    Args:
        logits (`torch.Tensor` of shape `(batch_size,)`):
            Scores of latents from the generator.
        form (`str`, defaults to `"logsigmoid"`):
            `"logit"`: the paper's `-logit` (equation 9), with a constant slope. `"sigmoid"`: upstream's `relu(target -
            sigmoid(logit))`, whose slope vanishes at very low and very high rewards. `"logsigmoid"`: `-log
            sigmoid(logit)`, whose slope is largest at low rewards and vanishes at high ones.
        scale (`float`, defaults to 1.0):
            Weight of the loss: the paper's lambda. Upstream uses 0.1 with its sigmoid form.
        target (`float`, defaults to 2.0):
            Target of the hinge in the sigmoid form. With 1 or more the relu never clips.
    """
    logits = logits.float()
    if form == "logit":
        loss = -logits
    elif form == "sigmoid":
        loss = F.relu(target - logits.sigmoid())
    elif form == "logsigmoid":
        loss = -F.logsigmoid(logits)
    else:
        raise ValueError(f"`form` must be 'logit', 'sigmoid' or 'logsigmoid', got {form!r}.")
    return scale * loss.mean()


@dataclass(frozen=True)
class RewardCombination:
    """
    Makes one logit of those of several reward models, in float32.

    With logits `z_i` and weights `w_i`:

    - `"mean"`: `m - k * s`, where `m = sum(w_i z_i) / sum(w_i)` and `s = sqrt(sum(w_i (z_i - m)^2) / sum(w_i))`, their
      weighted mean and standard deviation, and `k` is `disagreement`. A generator that climbs it gains nothing where
      only one of the models is pleased. The scale of the weights does not matter.
    - `"min"`: the smallest logit. The gradient is that of one model alone.
    - `"product"`: the logit of `p = prod(sigmoid(z_i)^w_i)`, for models of different tasks: the probability that a clip
      is good in all respects, if they are independent. `-log sigmoid` of it is `-sum(w_i log sigmoid(z_i))`.

    Of one model with the defaults it is that model's logit, bit for bit.

    Args:
        weights (`Sequence[float]`):
            One for each model, all above 0. Not used by `"min"`.
        form (`str`, defaults to `"mean"`):
            `"mean"`, `"min"` or `"product"`.
        disagreement (`float`, defaults to 0.0):
            The `k` of `"mean"`, at least 0.
    """

    weights: Sequence[float]
    form: CombinationForm = "mean"
    disagreement: float = 0.0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Combine logits.

        Args:
            logits (`torch.Tensor` of shape `(num_models, ...)`):
                Logits of the same latents by each model.

        Returns:
            `torch.Tensor` of shape `(...)`, float32.
        """
        logits = logits.float()
        if self.form == "min":
            return logits.amin(dim=0)
        if self.form == "product":
            log_p = _scaled(F.logsigmoid(logits), self.weights).sum(dim=0)
            # Above this, 1 - p rounds to 0, and neither the value nor the gradient matters.
            log_p = log_p.clamp(max=-1e-30)
            return log_p - torch.log(-torch.expm1(log_p))
        mean = _scaled(logits, self._shares()).sum(dim=0)
        return mean if self.disagreement == 0 else mean - self.disagreement * self.spread(logits)

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """Weighted standard deviation of logits over the models; its gradient is 0 where all agree."""
        logits, shares = logits.float(), self._shares()
        mean = _scaled(logits, shares).sum(dim=0)
        return torch.linalg.vector_norm(_scaled(logits - mean, [math.sqrt(share) for share in shares]), dim=0)

    def is_separable(self, loss: RewardLoss) -> bool:
        """Whether the loss is a sum over the models, so that the slope in a logit does not depend on the others."""
        if len(self.weights) == 1:
            return True
        forms = {("mean", "logit"), ("product", "logsigmoid")}
        return (self.form, loss) in forms and self.disagreement == 0

    def _shares(self) -> list[float]:
        return [weight / sum(self.weights) for weight in self.weights]


def _scaled(logits: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    """Logits `(num_models, ...)`, those of each model times its factor. A tensor of factors would be copied to the GPU."""
    return torch.stack([factor * each for factor, each in zip(factors, logits, strict=True)])


def anchor_loss(velocity: torch.Tensor, base_velocity: torch.Tensor) -> torch.Tensor:
    """
    Squared distance between the velocities of a generator and its base, divided by the squared norm of the base's.

    The ratio is taken sample by sample, `|v - v_base|^2 / |v_base|^2`, so it means the same at every noise level and for
    clips of every size: .01 is a change of the velocity by a tenth.

    Args:
        velocity, base_velocity (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            At the same noisy latents.
    """
    velocity, base_velocity = velocity.float().flatten(1), base_velocity.float().flatten(1)
    return ((velocity - base_velocity).square().mean(dim=1) / base_velocity.square().mean(dim=1)).mean()
