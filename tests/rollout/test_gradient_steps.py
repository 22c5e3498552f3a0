import pytest
import torch

from hy_prfl.rollout.gradient_steps import Foresight, mean_foreseen_gain


def test_foreseen_levels_stay_below_the_next_step() -> None:
    foresight = Foresight(torch.zeros(1), torch.tensor([0.0, 0.5, 1.0]), (0.2, 0.6))
    assert foresight.sigmas(0.4).tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert foresight.sigmas(0.1).tolist() == pytest.approx([0.1, 0.1, 0.1])
    # Levels 0.2 .. 0.5 and 0.2 .. 0.3, of mean 0.35 and 0.25.
    expected = (0.8 * 0.65 + 0.5 * 0.75) / 2
    assert mean_foreseen_gain(torch.tensor([0.8, 0.5, 0.3]), (0.2, 0.6)) == pytest.approx(expected)
