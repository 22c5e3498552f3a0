import math
from typing import Any

import numpy as np
import pytest
import torch

from hy_prfl.losses import (
    RewardCombination,
    anchor_loss,
    binary_reward_loss,
    bradley_terry_loss,
    flow_matching_loss,
    reward_feedback_loss,
)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_binary_loss_is_the_negative_log_likelihood() -> None:
    expected = -(math.log(sigmoid(0.7)) + math.log(1 - sigmoid(-1.3))) / 2
    assert binary_reward_loss(torch.tensor([0.7, -1.3]), torch.tensor([1, 0])).item() == pytest.approx(expected)


def test_bradley_terry_depends_on_the_margin_only() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([0.5, 1.0])
    expected = -(math.log(sigmoid(1.5)) + math.log(sigmoid(-1.0))) / 2
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected)
    assert bradley_terry_loss(chosen + 7, rejected + 7).item() == pytest.approx(expected, rel=1e-5)


def test_flow_matching_loss_is_the_mean_square_in_float32() -> None:
    model_pred = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    loss = flow_matching_loss(model_pred, torch.tensor([0.0, 4.0]))
    assert loss.item() == 2.5
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("form", "value", "slope"),
    [
        ("logit", lambda z: -z, lambda z: -1.0),
        ("sigmoid", lambda z: 2 - sigmoid(z), lambda z: -sigmoid(z) * (1 - sigmoid(z))),
        ("logsigmoid", lambda z: -math.log(sigmoid(z)), lambda z: -(1 - sigmoid(z))),
    ],
)
def test_reward_losses_and_their_slopes(form, value, slope) -> None:  # type: ignore[no-untyped-def]
    logits = torch.tensor([-2.0, 0.3, 4.0], requires_grad=True)
    loss = reward_feedback_loss(logits, form=form, scale=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * sum(value(z) for z in (-2.0, 0.3, 4.0)) / 3, rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.5 * slope(z) / 3 for z in (-2.0, 0.3, 4.0)], rel=1e-4)


def test_hinge_of_the_sigmoid_form_closes_below_its_target() -> None:
    logits = torch.tensor([5.0], requires_grad=True)
    reward_feedback_loss(logits, form="sigmoid", target=0.9).backward()
    assert logits.grad is not None
    assert logits.grad.item() == 0


def test_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form"):
        reward_feedback_loss(torch.zeros(1), form="hinge")  # type: ignore[arg-type]


LOGITS = [[0.7, -2.0], [-1.3, 0.4], [2.1, -0.1]]


def test_mean_less_the_disagreement() -> None:
    weights, k = np.array([1.0, 2.0, 3.0]), 0.5
    mean = np.average(LOGITS, axis=0, weights=weights)
    std = np.sqrt(np.average((np.array(LOGITS) - mean) ** 2, axis=0, weights=weights))
    combination = RewardCombination(weights.tolist(), "mean", k)
    np.testing.assert_allclose(combination(torch.tensor(LOGITS)), mean - k * std, rtol=1e-5)
    np.testing.assert_allclose(combination.spread(torch.tensor(LOGITS)), std, rtol=1e-5)
    doubled = RewardCombination((2 * weights).tolist(), "mean", k)
    torch.testing.assert_close(doubled(torch.tensor(LOGITS)), combination(torch.tensor(LOGITS)))
    # Of two models, less one standard deviation is the smaller one.
    two = RewardCombination([1.0, 1.0], "mean", 1.0)(torch.tensor(LOGITS[:2]))
    torch.testing.assert_close(two, torch.tensor([-1.3, -2.0]))


def test_minimum_and_product() -> None:
    assert RewardCombination([1.0] * 3, "min")(torch.tensor(LOGITS)).tolist() == pytest.approx([-1.3, -2.0])
    combined = RewardCombination([1.0, 1.0, 2.0], "product")(torch.tensor(LOGITS))
    for column, logit in enumerate(combined.tolist()):
        one, two, three = (sigmoid(row[column]) for row in LOGITS)
        assert sigmoid(logit) == pytest.approx(one * two * three**2, rel=1e-5)
    loss = reward_feedback_loss(combined, form="logsigmoid")
    expected = -(torch.nn.functional.logsigmoid(torch.tensor(LOGITS)) * torch.tensor([[1.0], [1.0], [2.0]])).sum(0)
    torch.testing.assert_close(loss, expected.mean())


def test_one_model_is_itself() -> None:
    logits = torch.randn(1, 50, 3) * 10
    assert torch.equal(RewardCombination([0.3])(logits), logits[0])
    torch.testing.assert_close(RewardCombination([1.0], "product")(logits), logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["mean", "min", "product"])
@pytest.mark.parametrize("loss", ["logit", "sigmoid", "logsigmoid"])
def test_slopes_are_finite_everywhere_and_separable_where_they_are_said_to_be(form: Any, loss: Any) -> None:
    """At agreement, where a root has no slope, and at logits beyond float32's sigmoid."""
    combination = RewardCombination([1.0, 2.0], form, 0.5 if form == "mean" else 0.0)
    logits = torch.tensor([[0.0, 3.0, 300.0, -300.0], [0.0, 3.0, 300.0, 300.0]], requires_grad=True)
    (slopes,) = torch.autograd.grad(reward_feedback_loss(combination(logits), form=loss), logits)
    assert slopes.isfinite().all()
    plain = RewardCombination([1.0, 2.0], form)
    found = []
    for others in (-2.0, 1.5):
        logits = torch.tensor([[0.3], [others]], requires_grad=True)
        (slopes,) = torch.autograd.grad(reward_feedback_loss(plain(logits), form=loss), logits)
        found.append(float(slopes[0]))
    assert plain.is_separable(loss) == (found[0] == pytest.approx(found[1], rel=1e-5))


def test_anchor_is_a_share_of_each_sample() -> None:
    base = torch.randn(2, 4, 2, 3, 3) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1, 1)
    assert anchor_loss(1.1 * base, base).item() == pytest.approx(0.01, rel=1e-4)
    velocity = base.clone().requires_grad_()
    (slope,) = torch.autograd.grad(anchor_loss(velocity, base), velocity)
    assert not slope.any()
