"""Rewards of real clips against plain arithmetic, clip by clip."""

import json
import math
from collections import defaultdict
from dataclasses import asdict

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve

from hy_prfl.evaluation.real_rewards import RealRewards, calibration_error


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_all_numbers_are_those_of_plain_arithmetic() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0.5, 2.0, (40, 3)).astype(np.float32)
    labels = [None if index % 4 == 0 else int(rng.random() < 0.5) for index in range(40)]
    real = RealRewards.of(torch.from_numpy(logits), labels)
    rewards = [sum(map(sigmoid, clip)) / 3 for clip in logits.tolist()]
    assert real.reward == pytest.approx(sum(rewards) / 40)
    # Between the 38th and the 39th of 40: 0.95 * 39 = 37.05.
    ordered = sorted(sum(clip) / 3 for clip in logits.tolist())
    assert real.high_logit == pytest.approx(0.95 * ordered[37] + 0.05 * ordered[38])
    bins = defaultdict(list)
    for reward, label in zip(rewards, labels, strict=True):
        if label is not None:
            bins[int(10 * reward)].append((reward, label))
    gaps = [abs(sum(reward for reward, _ in each) - sum(label for _, label in each)) for each in bins.values()]
    assert len(bins) > 5
    assert real.calibration_error == pytest.approx(sum(gaps) / 30)
    assert RealRewards(**json.loads(json.dumps(asdict(real)))) == real

    samples = rng.normal(2.0, 2.0, (20, 3)).astype(np.float32)
    above = sum(sum(sample) / 3 > real.high_logit for sample in samples.tolist())
    assert 0 < above < 20
    assert real.compare(torch.from_numpy(samples)) == {
        "real_reward": real.reward,
        "reward_above_real": above / 20,
        "calibration_error": real.calibration_error,
    }


def test_the_real_clips_themselves_are_seldom_above_the_real_clips() -> None:
    logits = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    real = RealRewards.of(logits[:1000], [None] * 1000)
    assert real.compare(logits[:1000]) == {"real_reward": real.reward, "reward_above_real": 0.05}
    assert real.compare(logits[1000:])["reward_above_real"] == pytest.approx(0.05, abs=0.02)
    # What is not a number is not above any.
    assert real.compare(torch.full((2, 4), torch.nan))["reward_above_real"] == 0


def test_calibration_error_is_that_of_the_calibration_curve() -> None:
    rng = np.random.default_rng(1)
    rewards, labels = rng.random(500), rng.integers(0, 2, 500)
    good, mean = calibration_curve(labels, rewards, n_bins=10)
    counts, _ = np.histogram(rewards, bins=10, range=(0, 1))
    assert calibration_error(rewards, labels) == pytest.approx(float(np.average(np.abs(good - mean), weights=counts)))


def test_calibration_errors_that_are_known() -> None:
    # Of the clips with a reward of 0.75, 3 of 4 are good, and certainty is right.
    rewards = np.array([0.75, 0.75, 0.75, 0.75, 1.0, 1.0, 0.0])
    assert calibration_error(rewards, np.array([1, 1, 1, 0, 1, 1, 0])) == 0
    assert calibration_error(rewards, 1 - np.array([1, 1, 1, 0, 1, 1, 0])) == pytest.approx((4 * 0.5 + 3) / 7)
    assert calibration_error(np.full(4, 0.5), np.ones(4)) == 0.5


def test_calibration_error_of_64_clips_by_chance() -> None:
    """The figure of docs/monitor.md, of a reward that is the probability of a good clip."""
    rng = np.random.default_rng(0)
    errors = [calibration_error(rewards, (rng.random(64) < rewards).astype(int)) for rewards in rng.random((500, 64))]
    assert float(np.mean(errors)) == pytest.approx(0.12, abs=0.01)
