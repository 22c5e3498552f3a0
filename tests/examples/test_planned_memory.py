"""Planned memory against what the allocator reports of the real trainer's updates."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from examples.benchmark.benchmark import planned, prepare_inputs
from examples.benchmark.cases import FLOW, FOUR_STEPS, LORA, NO_CHECKPOINTING, PRFL, PRFL_REWARD, Case
from examples.benchmark.measuring import Measured, measure, most_bytes_alive
from examples.benchmark.sizes import Clip, small_size


CLIP = Clip(9, 192, 192)
SIZE = small_size(num_heads=4, num_layers=5, vae_width=2, base=CLIP, longer=(), larger=())
SMALL_CLIP = Clip(9, 128, 128)
SMALL_SIZE = small_size(num_heads=4, num_layers=5, vae_width=2, base=SMALL_CLIP, longer=(), larger=())


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
        (PRFL, NO_CHECKPOINTING, {}),
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


@pytest.fixture(scope="module")
def small_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "models"
    prepare_inputs(Case("test", SMALL_SIZE, SMALL_CLIP, PRFL), folder)
    return folder


class _AsItIs:
    """No change to the trainer."""


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (FLOW, {"base_quantization": "int8", "gradient_checkpointing": False}),
        (FLOW, {"base_quantization": "float8"}),
    ],
)
def test_plan_of_a_quantised_base_agrees_with_the_allocator(
    small_inputs: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """Without activation checkpointing torchao's casts of all weights live until the backward pass."""
    case = Case(
        "test", dataclasses.replace(SMALL_SIZE, options={"lora_rank": 4, **options}), SMALL_CLIP, method, "", 8
    )
    trainer = case.trainer(small_inputs, tmp_path, _AsItIs)
    trainer.start_streams()
    # The optimizer's states come with the first step.
    trainer.train_step()
    measured = most_bytes_alive(trainer, trainer.train_step)
    assert planned(case, trainer.config)["planned_bytes"] == pytest.approx(measured, rel=0.03)
