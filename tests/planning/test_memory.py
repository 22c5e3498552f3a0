"""Planned memory against what the allocator reports of the real trainer's step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmark.memory_check import CASES, measure_step, planned, recipe, write_inputs
from hy_prfl.planning.simulation import MemoryMeter
from hy_prfl.trainers.prfl_trainer import PRFLTrainer


MODEL = {"num_layers": 4, "num_attention_heads": 4, "ffn_dim": 1024}
CLIP = {"num_frames": 9, "size": 256}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    write_inputs(folder, **MODEL, **CLIP)
    return folder


@pytest.mark.parametrize("case", ["all weights", "all weights, two micro-batches", "LoRA, recomputed"])
def test_plan_agrees_with_the_allocator(inputs: Path, case: str) -> None:
    training = recipe(inputs, **CASES[case])
    measured = measure_step(PRFLTrainer(training)) / 1e9
    assert planned(training, **CLIP).peak == pytest.approx(measured, rel=0.1)


def test_meter_counts_what_lives(tmp_path: Path) -> None:
    """Against sizes that are known: views are free, what is dropped comes back."""
    known = torch.zeros(100)
    with MemoryMeter([known], on_gpu=False) as meter:
        with meter.phase("first"):
            kept: Any = known + 1
            assert meter.live == 400
            _ = kept[:50] + 1
            view = kept.view(10, 10)
        del _
        assert meter.live == 400
        with meter.phase("second"):
            product = view @ view
        del kept, view
        assert meter.live == 400
        del product
    assert meter.live == 0
    assert meter.phases["first"].peak == 600
    assert meter.phases["second"].flops == 2 * 10**3
