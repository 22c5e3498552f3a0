import pytest
import torch
from torch import nn

from hy_prfl.runtime.sharding import Masters
from hy_prfl.trainers.averaging import WeightAverage


def build_average(decay: float = 0.5) -> tuple[nn.Linear, WeightAverage]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    weights = {"weight": model.weight}
    return model, WeightAverage(Masters(weights, torch.optim.SGD(weights.values())), decay=decay)


def test_the_average_is_in_the_model_only_within_the_context() -> None:
    model, average = build_average()
    expected = model.weight.detach().clone()
    for _ in range(4):
        with torch.no_grad():
            model.weight.normal_()
        average.step()
        # diffusers warms the decay up: (1 + n) / (10 + n), n the updates before the last.
        decay = min(0.5, average.num_averaged / (9 + average.num_averaged)) if average.num_averaged > 1 else 0.0
        expected = decay * expected + (1 - decay) * model.weight.detach()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    with average.in_model():
        torch.testing.assert_close(model.weight.detach(), expected)
        assert torch.equal(model.bias, bias)
    assert torch.equal(model.weight, weight)


def test_the_weights_come_back_after_an_error() -> None:
    model, average = build_average()
    with torch.no_grad():
        model.weight.normal_()
    weight = model.weight.detach().clone()

    def fail() -> None:
        with average.in_model():
            assert not torch.equal(model.weight, weight)
            raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        fail()
    assert torch.equal(model.weight, weight)


def test_loaded_weights_become_the_average() -> None:
    model, average = build_average()
    average.load({"weight": torch.full((2, 3), 7.0)})
    average.num_averaged = 1000
    with average.in_model():
        assert torch.equal(model.weight, torch.full((2, 3), 7.0))
    with torch.no_grad():
        model.weight.zero_()
    average.step()
    assert average.num_averaged == 1001
    with average.in_model():
        assert torch.equal(model.weight, torch.full((2, 3), 3.5))
    with pytest.raises(ValueError, match="'weight' must have the shape"):
        average.load({"weight": torch.zeros(3, 2)})


def test_an_average_that_begins_anew() -> None:
    model, average = build_average()
    average.num_averaged = 5
    with torch.no_grad():
        model.weight.fill_(2.0)
    average.restart()
    with torch.no_grad():
        model.weight.zero_()
    assert average.num_averaged == 0
    with average.in_model():
        assert torch.equal(model.weight, torch.full((2, 3), 2.0))
