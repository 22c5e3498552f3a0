"""The losses. Each is computed in float32 for inputs of any type, and returns the mean over the batch."""

from typing import Literal

import torch
import torch.nn.functional as F


RewardLoss = Literal["logit", "sigmoid", "logsigmoid"]


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
