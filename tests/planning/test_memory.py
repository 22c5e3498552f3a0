"""Planned memory against the allocator's records in updates of the real trainer."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmark.benchmark import planned, prepare_inputs
from examples.benchmark.cases import FLOW, FOUR_STEPS, LORA, NO_RECOMPUTATION, PRFL, PRFL_REWARD, Case
from examples.benchmark.measuring import Measured, measure
from examples.benchmark.sizes import Clip, small_size
from hy_prfl.planning.simulation import MemoryMeter


CLIP = Clip(9, 192, 192)
SIZE = small_size(num_heads=4, num_layers=5, vae_width=2, base=CLIP, longer=(), larger=())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "models"
    prepare_inputs(Case("test", SIZE, CLIP, PRFL), folder)
    return folder


@pytest.mark.parametrize(
    ("method", "switch", "options"),
    [
        (PRFL, "", {}),
        (PRFL, "", {"gradient_accumulation_steps": 2}),
        (PRFL, NO_RECOMPUTATION, {}),
        (PRFL, LORA, {}),
        (PRFL_REWARD, FOUR_STEPS, {}),
        (FLOW, "", {}),
    ],
)
def test_plan_agrees_with_the_allocator(
    inputs: Path, tmp_path: Path, method: str, switch: str, options: dict[str, Any]
) -> None:
    size = dataclasses.replace(SIZE, options=options)
    case = Case("test", size, CLIP, method, switch, num_inference_steps=8)
    trainer = case.trainer(inputs, tmp_path, Measured)
    measured = measure(trainer, num_updates=1)
    foreseen = planned(case, trainer.config)
    assert foreseen["planned_bytes"] == pytest.approx(measured.peak_bytes, rel=0.03)
    assert foreseen["planned_flops"] == pytest.approx(measured.flops, rel=1e-3)


def test_meter_counts_what_lives(tmp_path: Path) -> None:
    """Known sizes: views take no memory, and freed tensors are subtracted."""
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
