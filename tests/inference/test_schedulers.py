"""Against diffusers' schedulers, built by hand as its documentation builds them for Wan."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from hy_prfl.inference.schedulers import build_scheduler


def by_hand(solver: str, shift: float) -> Any:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
    if solver == "unipc":
        return UniPCMultistepScheduler(**flow, flow_shift=shift)
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(**flow, flow_shift=shift, algorithm_type="dpmsolver++", solver_order=2)
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def solve(scheduler: Any) -> torch.Tensor:
    """Six steps with a model whose velocity depends on sample and time."""
    scheduler.set_timesteps(6)
    sample = torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.sin(2 * sample) - timestep / 1000, timestep, sample, return_dict=False)[0]
    return sample


@pytest.mark.parametrize("flow_shift", [None, 7.0])
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_is_that_of_diffusers(pipeline_dir: Path, solver: Any, flow_shift: float | None) -> None:
    # The pipeline has UniPC with a shift of 3.
    own = UniPCMultistepScheduler.from_pretrained(pipeline_dir, subfolder="scheduler")
    found, expected = build_scheduler(own, solver, flow_shift), by_hand(solver, flow_shift or 3.0)
    assert type(found) is type(expected)
    assert torch.equal(solve(found), solve(expected))
    assert torch.equal(found.timesteps, expected.timesteps)
    others = [solve(by_hand(other, flow_shift or 3.0)) for other in ("unipc", "dpm++", "euler")]
    assert sum(torch.allclose(solve(found), other, atol=1e-4) for other in others) == 1
    assert not torch.allclose(solve(found), solve(by_hand(solver, 1.0)), atol=1e-3)


@pytest.mark.parametrize("flow_shift", [None, 7.0])
def test_from_a_pipeline_of_euler(flow_shift: float | None) -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=5.0)
    for solver in ("unipc", "dpm++"):
        expected = by_hand(solver, flow_shift or 5.0)
        assert torch.equal(solve(build_scheduler(own, solver, flow_shift)), solve(expected))
    assert build_scheduler(own, None, flow_shift).config.shift == (flow_shift or 5.0)


def test_without_options_it_is_the_pipelines_own() -> None:
    own = UniPCMultistepScheduler(solver_order=3, flow_shift=2.0, use_flow_sigmas=True)
    assert build_scheduler(own) is own
    assert build_scheduler(own, "unipc").config.solver_order == 3


@pytest.mark.parametrize("options", [{"flow_shift": 3.0}, {"sample_solver": "euler"}])
def test_no_flow_matching(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"`{next(iter(options))}`: the pipeline's DDIMScheduler has no shift"):
        build_scheduler(DDIMScheduler(), **options)
