"""Schedulers of diffusers for flow matching."""

from typing import Literal

import diffusers
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from ..formats.pipeline_info import PipelineInfo
from ..formats.sources import reading


SampleSolver = Literal["unipc", "dpm++", "euler"]

# Options that make diffusers' schedulers solve the ODE of flow matching with Wan's sigmas.
FLOW_MATCHING = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def build_scheduler(
    scheduler: SchedulerMixin, sample_solver: SampleSolver | None = None, flow_shift: float | None = None
) -> SchedulerMixin:
    """
    A scheduler of diffusers like the given one, with another solver or another shift of the noise levels.

    Args:
        scheduler (`SchedulerMixin`):
            A pipeline's scheduler. Its other settings are kept where the new one has them.
        sample_solver (`str`, *optional*):
            `"unipc"` (`UniPCMultistepScheduler`), `"dpm++"` (`DPMSolverMultistepScheduler` with `dpmsolver++`) or `"euler"`
            (`FlowMatchEulerDiscreteScheduler`); that of `scheduler` if left out.
        flow_shift (`float`, *optional*):
            Shift `s` in `sigma -> s * sigma / (1 + (s - 1) * sigma)`; that of `scheduler` if left out.

    Raises:
        ValueError: If the scheduler has no shift, and so is not one of flow matching.
    """
    name = next((name for name in ("flow_shift", "shift") if name in scheduler.config), None)
    if name is None and (flow_shift is not None or sample_solver is not None):
        option = "sample_solver" if flow_shift is None else "flow_shift"
        raise ValueError(f"`{option}`: the pipeline's {type(scheduler).__name__} has no shift of flow matching.")
    shift = scheduler.config[name] if flow_shift is None and name is not None else flow_shift
    if sample_solver == "unipc":
        return UniPCMultistepScheduler.from_config(scheduler.config, flow_shift=shift, **FLOW_MATCHING)
    if sample_solver == "dpm++":
        return DPMSolverMultistepScheduler.from_config(
            scheduler.config, flow_shift=shift, algorithm_type="dpmsolver++", **FLOW_MATCHING
        )
    if sample_solver == "euler":
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)
    if sample_solver is not None:
        raise ValueError(f"`sample_solver` must be unipc, dpm++ or euler, got {sample_solver!r}.")
    return scheduler if flow_shift is None else type(scheduler).from_config(scheduler.config, **{str(name): shift})


def load_own_scheduler(info: PipelineInfo) -> SchedulerMixin:
    """The scheduler of a pipeline, without its models. Raises a `FileNotFoundError` if there is none."""
    _, name = info.index["scheduler"]
    with reading("pretrained_model_name_or_path", info.source):
        return getattr(diffusers, name).from_pretrained(info.source, subfolder="scheduler", revision=info.revision)
