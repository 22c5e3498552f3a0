import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.runtime.activation_checkpointing import HostBuffers, checkpoint_activations


INPUTS = torch.randn(2, 16, 2, 4, 4), torch.tensor([900.0, 300.0]), torch.randn(2, 16, 32)


@pytest.fixture(params=["generator", "reward model"])
def load(request: pytest.FixtureRequest, pipeline_dir: Path) -> Callable[[], Any]:
    """Function that makes a model with 3 blocks and the same weights in every call."""

    def make() -> Any:
        torch.manual_seed(0)
        transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
        return transformer if request.param == "generator" else WanRewardModel.from_transformer(transformer, 3)

    return make


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients of a scalar with respect to latents and weights."""
    latents = INPUTS[0].clone().requires_grad_()
    model(latents, *INPUTS[1:], return_dict=False)[0].square().sum().backward()
    assert latents.grad is not None
    return latents.grad, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("num_blocks", [None, 1, 2])
def test_gradients_are_those_without(load: Callable[[], Any], num_blocks: int | None, offload: bool) -> None:
    model = load()
    checkpoint_activations(model, num_blocks=num_blocks, offload=offload)
    for _ in range(2):
        latents_grad, grads = gradients(model)
        expected_latents_grad, expected = gradients(load())
        assert torch.equal(latents_grad, expected_latents_grad)
        assert set(grads) == set(expected)
        for name, grad in grads.items():
            assert torch.equal(grad, expected[name]), name
        model.zero_grad()


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_of_an_adapter_are_those_without(pipeline_dir: Path, offload: bool) -> None:
    """Not even the input of the first block requires a gradient here."""
    from peft import LoraConfig

    model = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer").requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model(*INPUTS).sample.square().sum().backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    checkpoint_activations(model, offload=offload)
    model(*INPUTS).sample.square().sum().backward()
    assert set(expected) == {name for name, value in model.named_parameters() if value.requires_grad}
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in expected.items())


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_exactly_the_first_blocks_run_twice(pipeline_dir: Path, num_blocks: int) -> None:
    """Each checkpointed block adds the FLOPs of one forward of a block, by torch's own counter."""
    model = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    flops = []
    block_inputs: list[tuple[Any, ...]] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda module, args: block_inputs.append(args))
    model(*INPUTS)
    hook.remove()
    with FlopCounterMode(display=False) as one_block, torch.no_grad():
        model.blocks[0](*block_inputs[0])
    for count in (None, num_blocks):
        if count is not None:
            checkpoint_activations(model, num_blocks=count)
        with FlopCounterMode(display=False) as counter:
            model(*INPUTS).sample.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == num_blocks * one_block.get_total_flops()


def test_offloaded_inputs_are_not_on_the_device_between_forward_and_backward(pipeline_dir: Path) -> None:
    """Host and device are the same here, so the test checks that the kept tensors are copies."""
    alive = {}
    for offload in (False, True):
        model = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
        checkpoint_activations(model, offload=offload)
        seen: list[weakref.ref[torch.Tensor]] = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, output, seen=seen: seen.append(weakref.ref(output)))
        output = model(*INPUTS).sample
        # The output of the last block is not the input of one.
        alive[offload] = sum(tensor() is not None for tensor in seen[:-1])
        output.sum().backward()
        del output
        assert all(tensor() is None for tensor in seen)
    assert alive == {False: 2, True: 0}


def test_the_buffers_of_one_update_serve_the_next(pipeline_dir: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    buffers = HostBuffers()
    checkpoint_activations(model, offload=True, buffers=buffers)
    for _ in range(3):
        model(*INPUTS).sample.sum().backward()
        # One buffer for each of three blocks, and all of them are free again.
        assert [len(free) for free in buffers.free.values()] == [3]
    with torch.no_grad():
        model(*INPUTS)
    assert buffers.nbytes == 3 * 2 * 8 * 24 * 4


def test_more_blocks_than_there_are_is_refused(load: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 3\]"):
        checkpoint_activations(load(), num_blocks=4)
