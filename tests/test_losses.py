import math

import pytest
import torch

from hy_prfl.losses import binary_reward_loss, bradley_terry_loss, flow_matching_loss, reward_feedback_loss


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
