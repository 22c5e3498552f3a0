"""Plans of quantised weights, against torchao's own tensors."""

from typing import Any

import pytest
import torch

from hy_prfl.formats.pipeline_info import PipelineInfo
from hy_prfl.planning.models import build_transformer, count_parameters, set_dtypes
from hy_prfl.planning.plan import plan
from tests.planning.recipes import prfl_recipe, reward_recipe


SMALL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
LARGE = "Wan-AI/Wan2.1-T2V-14B-Diffusers"


@pytest.mark.parametrize(("kind", "per_weight"), [("int8", 1.0), ("float8", 1.0), ("nf4", 4.127 / 8)])
def test_bytes_of_14b(kind: Any, per_weight: float) -> None:
    """By hand: 8 attention and 2 feed-forward matrices per block are quantised, nothing else."""
    transformer = build_transformer(PipelineInfo.known(LARGE).transformer, prfl_recipe(LARGE, lora_rank=32))
    set_dtypes(transformer, frozen=torch.bfloat16, trained=torch.float32, keep_in_fp32=True)
    in_matrices = 40 * (8 * 5120**2 + 2 * 5120 * 13824)
    whole, held = count_parameters(transformer), count_parameters(transformer, quantization=kind)
    assert whole.num_bytes - held.num_bytes == pytest.approx((2 - per_weight) * in_matrices, rel=1e-3)
    assert (held.total, held.trained, held.trained_bytes) == (whole.total, whole.trained, whole.trained_bytes)


def test_zero_is_refused_and_fewer_bits_are_advised() -> None:
    clip = {"height": 480, "width": 832, "num_frames": 17}
    options = {"lora_rank": 8, "gradient_checkpointing": True, "offload_activations": True}
    options |= {"offload_reward_model": True, "rerun_gradient_step": True}
    with pytest.raises(ValueError, match=r"`base_quantization` must be left out under ZeRO, got 'int8'"):
        plan(prfl_recipe(SMALL, **options, base_quantization="int8"), **clip, num_gpus=2, zero_stage=3)
    peaks = {
        kind: plan(prfl_recipe(SMALL, **options, base_quantization=kind), **clip, gpu_memory=1e6).peak
        for kind in (None, "int8", "nf4")
    }
    assert peaks["nf4"] < peaks["int8"] < peaks[None]
    made = plan(prfl_recipe(SMALL, **options), **clip, gpu_memory=peaks["int8"] * 1.001)
    assert (made.fits, made.changes) == (False, ["--base_quantization int8"])
    made = plan(prfl_recipe(SMALL, **options), **clip, gpu_memory=peaks["nf4"] * 1.001)
    assert (made.fits, made.changes) == (False, ["--base_quantization nf4"])


def test_reward_training_beside_a_quantised_base() -> None:
    options = {"lora_rank": 8, "gradient_checkpointing": True}
    clip = {"height": 480, "width": 832, "num_frames": 17}
    whole, held = (
        plan(reward_recipe(SMALL, **options, base_quantization=kind), **clip, gpu_memory=1e6)
        for kind in (None, "int8")
    )
    # Eight blocks of 1.3B, whose frozen weights are in float32 for the reward trainer.
    assert whole.memory["weights"] - held.memory["weights"] == pytest.approx(
        3 * 8 * (8 * 1536**2 + 2 * 1536 * 8960) / 1e9, rel=0.01
    )


def test_block_inputs_in_host_memory_beside_nf4() -> None:
    """
    The first block's input is in bfloat16, the others in float32.

    CUDA's autocast normalises queries in float32, diffusers gives attention's output their type, and a layer of
    bitsandbytes returns the type that it gets, so the hidden states become float32 in the first block.
    """
    options = {"lora_rank": 8, "gradient_checkpointing": True, "offload_activations": True}
    clip = {"height": 480, "width": 832, "num_frames": 17}
    made = {kind: plan(reward_recipe(SMALL, **options, base_quantization=kind), **clip) for kind in (None, "nf4")}
    tensor = 5 * 30 * 52 * 1536
    assert made["nf4"].host_memory["block inputs"] == pytest.approx((2 + 7 * 4) * tensor / 1e9)
    assert made[None].host_memory["block inputs"] == pytest.approx(8 * 2 * tensor / 1e9)
