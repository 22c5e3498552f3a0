from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.utils._python_dispatch import TorchDispatchMode

from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_scheduler
from hy_prfl.rollout.chain import walk_with_gradient
from hy_prfl.runtime.attention import check_attention_backend, set_attention_backend, use_attention_backend


HERE: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
FUSED = "aten._scaled_dot_product_flash_attention_for_cpu.default"


class FusedCalls(TorchDispatchMode):
    """Counts calls of torch's fused attention, which `_native_math` does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) == FUSED
        return func(*args, **(kwargs or {}))


def test_kernels_that_work_here_are_let_through() -> None:
    for trains in (False, True):
        for name in ("native", "_native_math"):
            check_attention_backend(name, option="attention_backend", trains=trains, **HERE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_tried_in_the_context_that_the_model_computes_in(dtype: torch.dtype) -> None:
    """Under autocast, Wan's query norm with a float32 weight returns float32. Not all kernels cast it."""
    options: dict[str, Any] = {"option": "kernel", "trains": True, "device": torch.device("cpu"), "dtype": dtype}
    for name in ("native", "_native_math"):
        check_attention_backend(name, autocast=torch.autocast("cpu", dtype=torch.bfloat16), **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flsh", {"trains": True}, r"`kernel` must be one of .*_flash_3.*, got 'flsh'"),
        ("_flash_3", {"trains": True}, "backward pass, and '_flash_3' has none .*; these have one: native"),
        ("sage", {"trains": True}, "backward pass, and 'sage' has none"),
        ("flash", {"trains": True}, "`kernel` 'flash' does not work here, .*install `flash-attn"),
        ("sage", {"trains": False}, "`kernel` 'sage' does not work here, .*install `sageattention"),
        ("_native_cudnn", {"trains": True}, "`kernel` '_native_cudnn' does not work here, on cpu in torch.float32"),
    ],
)
def test_others_are_refused_with_the_reason(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attention_backend(name, option="kernel", **options, **HERE)


def test_checking_draws_nothing_and_leaves_the_process_as_it_was() -> None:
    inputs = torch.randn(1, 4, 2, 8).transpose(1, 2)
    state = torch.get_rng_state()
    check_attention_backend("_native_math", option="attention_backend", trains=True, **HERE)
    assert torch.equal(torch.get_rng_state(), state)
    with FusedCalls() as calls:
        torch.nn.functional.scaled_dot_product_attention(inputs, inputs, inputs)
    assert calls.count == 1


def test_the_rollout_and_the_step_with_gradient_use_different_kernels(pipeline_dir: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    set_attention_backend(transformer, "_native_math")
    chain = walk_with_gradient(
        transformer, load_scheduler(str(pipeline_dir)), noise=torch.randn(1, 16, 2, 4, 4), step_indices=[2, 4],
        num_inference_steps=7, conditioning=Conditioning(torch.randn(1, 16, 32)), rollout_attention_backend="native",
    )  # fmt: skip
    # 3 blocks with 2 attention layers each; 2 steps before the first step with gradient, 1 before the second.
    for expected in (2 * 3 * 2, 1 * 3 * 2):
        with FusedCalls() as calls:
            step = next(chain)
            assert calls.count == expected
            next(step.surrogates(torch.ones_like(step.latents))).backward()
            assert calls.count == expected


def test_the_kernel_is_put_back_even_after_an_error(pipeline_dir: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    set_attention_backend(transformer, "native")
    with pytest.raises(TypeError), use_attention_backend(transformer, "_native_math"):
        transformer()
    assert {block.attn1.processor._attention_backend for block in transformer.blocks} == {AttentionBackendName.NATIVE}
