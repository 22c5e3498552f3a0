"""What the training reward says of real clips, and how samples compare with that."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


# Share of the real clips that are rated lower than what counts as above the real ones.
PERCENTILE = 95
# Bins of rewards, of equal width, in which rewards are compared with labels.
NUM_BINS = 10


@dataclass(frozen=True)
class RealRewards:
    """
    Rewards of real clips, as the samples of a validation are compared with them. JSON values.

    Args:
        reward (`float`):
            Mean of `sigmoid(logit)` over clips and noise levels.
        high_logit (`float`):
            95th percentile of the clips' logits, each averaged over the noise levels.
        calibration_error (`float`, *optional*):
            Expected calibration error on the clips with a label, see [`calibration_error`]; None if there are none.
    """

    reward: float
    high_logit: float
    calibration_error: float | None

    @classmethod
    def of(cls, logits: torch.Tensor, labels: Sequence[int | None]) -> "RealRewards":
        """
        Rewards of clips.

        Args:
            logits (`torch.Tensor` of shape `(num_clips, num_timesteps)`):
                Logits of the training reward.
            labels (`Sequence[int]`):
                For each clip 1 (good), 0 (poor), or None if it is unknown.

        Raises:
            ValueError: If there are not as many labels as clips.
        """
        rewards = logits.double().sigmoid().mean(dim=1).numpy()
        labelled = [pair for pair in zip(rewards, labels, strict=True) if pair[1] is not None]
        error = calibration_error(*np.array(labelled, dtype=np.float64).T) if labelled else None
        return cls(float(rewards.mean()), float(np.percentile(_mean_logits(logits), PERCENTILE)), error)

    def compare(self, logits: torch.Tensor) -> dict[str, float]:
        """
        Metrics of samples.

        | name | value |
        |---|---|
        | `real_reward`, `calibration_error` | those of the real clips, the same at every validation |
        | `reward_above_real` | share of samples whose logit, averaged over the noise levels, is above `high_logit` |

        Args:
            logits (`torch.Tensor` of shape `(num_samples, num_timesteps)`):
                Logits of the training reward.
        """
        metrics = {
            "real_reward": self.reward,
            "reward_above_real": float(np.mean(_mean_logits(logits) > self.high_logit)),
        }
        if self.calibration_error is not None:
            metrics["calibration_error"] = self.calibration_error
        return metrics


def calibration_error(rewards: np.ndarray, labels: np.ndarray) -> float:
    """
    Expected calibration error: the difference between mean reward and share of good clips in bins of rewards, averaged
    over 10 bins of equal width, each weighted by its clips. 0 if of clips with a reward of 0.8, 8 of 10 are good.

    Args:
        rewards, labels (`np.ndarray` of shape `(num_clips,)`):
            Rewards in [0, 1], and labels in {0, 1}.
    """
    # A bin counts with its number of clips times the difference of its means. That is the sum of `reward - label` over its
    # clips.
    sums, _ = np.histogram(rewards, bins=NUM_BINS, range=(0, 1), weights=rewards - labels)
    return float(np.abs(sums).sum() / len(rewards))


def _mean_logits(logits: torch.Tensor) -> np.ndarray:
    return logits.double().mean(dim=1).numpy()
