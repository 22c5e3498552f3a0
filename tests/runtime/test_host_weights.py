import weakref
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.runtime.host_weights import HostWeights


@pytest.fixture
def reward_model(pipeline_dir: Path) -> WanRewardModel:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    return WanRewardModel.from_transformer(transformer, 2).requires_grad_(False).eval()


def reward_and_gradient(model: WanRewardModel) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 2, 4, 4, generator=generator, requires_grad=True)
    embeds = torch.randn(2, 16, 32, generator=generator)
    logits = model(latents, torch.tensor([900.0, 300.0]), embeds).logits
    return logits.detach(), torch.autograd.grad(logits.sum(), latents)[0]


def test_rewards_and_gradients_are_those_of_the_model_on_its_device(reward_model: WanRewardModel) -> None:
    expected = reward_and_gradient(reward_model)
    weights = HostWeights(reward_model, torch.device("cpu"))
    for _ in range(2):
        with weights.on_device():
            found = reward_and_gradient(reward_model)
        for value, wanted in zip(found, expected, strict=True):
            assert torch.equal(value, wanted)


def test_copies_live_only_while_the_model_is_used(reward_model: WanRewardModel) -> None:
    tensors = {**dict(reward_model.named_parameters()), **dict(reward_model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    weights = HostWeights(reward_model, torch.device("cpu"))
    host = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for _ in range(2):
        with weights.on_device():
            assert all(tensor.data_ptr() != host[name] for name, tensor in tensors.items())
            copies = [weakref.ref(tensor.untyped_storage()) for tensor in tensors.values()]
            reward_and_gradient(reward_model)
            assert all(copy() is not None for copy in copies)
        assert not any(copy() for copy in copies)
        assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == host
    for name, value in before.items():
        assert torch.equal(tensors[name], value), name


def test_weights_come_back_after_an_error(reward_model: WanRewardModel) -> None:
    weights = HostWeights(reward_model, torch.device("cpu"))
    host = [parameter.data_ptr() for parameter in reward_model.parameters()]
    with pytest.raises(RuntimeError, match="within"), weights.on_device():
        raise RuntimeError("within")
    assert [parameter.data_ptr() for parameter in reward_model.parameters()] == host


def test_a_model_in_training_is_refused(reward_model: WanRewardModel) -> None:
    reward_model.head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Only a frozen model.*'head"):
        HostWeights(reward_model, torch.device("cpu"))
