"""Pipelines with two experts (Wan2.2 A14B): which transformer is called at which timestep, and which are trained."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..configs.base import check
from ..flow_matching import NUM_TRAIN_TIMESTEPS
from ..formats.layout import EXPERT_FOLDERS, ExpertName
from ..formats.pipeline_info import PipelineInfo


@dataclass(frozen=True)
class Experts:
    """
    The experts of a pipeline, and which of them are trained.

    As in diffusers' pipelines, the high-noise expert is called at timesteps >= `boundary`, and the low-noise expert at
    timesteps below it. A pipeline with one transformer has the boundary 0.

    Args:
        boundary (`float`):
            Timestep in [0, 1000).
        trained (`tuple[str, ...]`):
            `"high_noise"`, `"low_noise"`, or both.
    """

    boundary: float = 0.0
    trained: tuple[ExpertName, ...] = ("high_noise",)

    @property
    def are_two(self) -> bool:
        """Whether the pipeline has two transformers."""
        return self.boundary > 0

    def name_at(self, timestep: float) -> ExpertName:
        """The expert that is called at a timestep."""
        return "high_noise" if timestep >= self.boundary else "low_noise"

    def timesteps_of(self, expert: ExpertName) -> tuple[float, float]:
        """Range `[low, high)` of the timesteps of an expert."""
        return (self.boundary, math.inf) if expert == "high_noise" else (-math.inf, self.boundary)

    def draw(self, uniform: float, high_noise_probability: float) -> ExpertName:
        """
        Choose one of the trained experts for an update.

        Args:
            uniform (`float`):
                Random number from U[0, 1).
            high_noise_probability (`float`):
                Probability of the high-noise expert if both are trained.
        """
        if len(self.trained) == 1:
            return self.trained[0]
        return "high_noise" if uniform < high_noise_probability else "low_noise"

    def join(self, transformers: Mapping[ExpertName, nn.Module]) -> nn.Module:
        """One module from the experts: the only transformer, or an [`ExpertPair`]."""
        if len(transformers) == 1:
            return next(iter(transformers.values()))
        return ExpertPair(transformers["high_noise"], transformers["low_noise"], self)

    def parts(self, model: nn.Module) -> dict[ExpertName, Any]:
        """The trained transformers by name, from a module that [`join`] returned."""
        if len(self.trained) == 1:
            return {self.trained[0]: model}
        return {name: model.get_submodule(name) for name in self.trained}

    def frozen(self, *, rolls_out: bool, samples: bool) -> ExpertName | None:
        """
        The expert that is not trained but has to be loaded, if any.

        Args:
            rolls_out (`bool`):
                Whether the run denoises up to a step of the trained expert.
            samples (`bool`):
                Whether the run denoises to the end of the chain, to make videos.
        """
        others = [expert for expert in EXPERT_FOLDERS if expert not in self.trained]
        if not self.are_two or not others:
            return None
        return others[0] if samples or (rolls_out and others[0] == "high_noise") else None

    def gradient_steps(
        self,
        timesteps: Sequence[float],
        step_range: Sequence[int] | None,
        num_gradient_steps: int = 1,
        num_chained_steps: int = 1,
    ) -> tuple[int, int]:
        """
        First and last step of the sampler's chain that may take gradient.

        Both are steps of a trained expert and within `step_range`. The last step of the chain is excluded, because it
        leaves no noise.

        Args:
            timesteps (`Sequence[float]`):
                Timesteps of the sampler, one per step, descending.
            step_range (`Sequence[int]`, *optional*):
                First and last step that the run's options allow; all steps of the trained experts if left out.
            num_gradient_steps (`int`, defaults to 1):
                Steps that take gradient in each chain.
            num_chained_steps (`int`, defaults to 1):
                Consecutive steps that one gradient passes through. The returned range is that of the last of them.

        Raises:
            ValueError: If `step_range` has other steps, or if there are too few steps.
        """
        own = [index for index, each in enumerate(timesteps[:-1]) if self.name_at(each) in self.trained]
        trained, boundary = " and ".join(self.trained), f"the boundary is timestep {self.boundary:g}"
        count = len(timesteps)
        check(len(own) > 0, "num_inference_steps", count, f"such that some step is one of {trained}; {boundary}")
        first, last = step_range or (own[0], own[-1])
        inside = own[0] <= first <= last <= own[-1]
        check(inside, "step_range", step_range, f"within [{own[0]}, {own[-1]}], the steps of {trained}; {boundary}")
        most = last - own[0] + 1
        requirement = f"in [1, {most}], the steps of {trained} up to the last of the range"
        check(num_chained_steps <= most, "num_chained_steps", num_chained_steps, requirement)
        first = max(first, own[0] + num_chained_steps - 1)
        requirement = f"in [1, {last - first + 1}], the steps of {trained} that may take gradient"
        check(num_gradient_steps <= last - first + 1, "num_gradient_steps", num_gradient_steps, requirement)
        return first, last


def choose_experts(info: PipelineInfo, expert: str | None) -> Experts:
    """
    The experts of a pipeline, and which of them an option selects for training.

    Args:
        info (`PipelineInfo`):
            The pipeline.
        expert (`str`, *optional*):
            `"high_noise"`, `"low_noise"` or `"both"`. Must be left out if the pipeline has one transformer.

    Raises:
        ValueError: If `expert` does not fit the pipeline, or its model_index.json contradicts itself.
    """
    file, ratio = f"{info.source}: model_index.json", info.boundary_ratio
    if not info.has_two_experts:
        if ratio is not None:
            raise ValueError(f"{file}: `boundary_ratio` is {ratio}, but there is no `transformer_2`.")
        check(expert is None, "expert", expert, f"left out, {file} has one transformer")
        return Experts()
    if ratio is None or not 0 < ratio < 1:
        raise ValueError(f"{file}: there is a `transformer_2`, but `boundary_ratio` is {ratio}, not in (0, 1).")
    choices: dict[str | None, tuple[ExpertName, ...]] = {
        "high_noise": ("high_noise",),
        "low_noise": ("low_noise",),
        "both": ("high_noise", "low_noise"),
    }
    check(expert in choices, "expert", expert, f"high_noise, low_noise or both, {file} has a `transformer_2`")
    # The same product as in diffusers' pipelines.
    return Experts(ratio * NUM_TRAIN_TIMESTEPS, choices[expert])


class ExpertPair(nn.Module):
    """
    Two experts that are called as one transformer. The timestep selects the expert.

    All samples of a batch must be on one side of the boundary. Each forward reads the timesteps on the host, so it
    waits for the device once. Under DDP or DeepSpeed all ranks must be on the same side.

    Args:
        high_noise, low_noise (`nn.Module`):
            The experts as they are called: plain modules, or wrapped by the engine.
        experts (`Experts`):
            Holds the boundary.
    """

    def __init__(self, high_noise: nn.Module, low_noise: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.high_noise = high_noise
        self.low_noise = low_noise
        self.experts = experts

    def forward(self, *, timestep: torch.Tensor, **inputs: Any) -> Any:
        """
        Call the expert that these timesteps belong to.

        Args:
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                Noise levels, `1000 * sigma`.
            inputs:
                The other arguments of a transformer.

        Raises:
            ValueError: If the timesteps are on both sides of the boundary.
        """
        names = {self.experts.name_at(each) for each in timestep.tolist()}
        if len(names) != 1:
            raise ValueError(
                f"`timestep` must be on one side of the boundary {self.experts.boundary:g}, got {timestep.tolist()}."
            )
        return self.get_submodule(names.pop())(timestep=timestep, **inputs)


class PairWeights(Mapping[str, torch.Tensor]):
    """Weights of an [`ExpertPair`] by name, from those of the experts. Each is read on access."""

    def __init__(self, weights: Mapping[ExpertName, Mapping[str, torch.Tensor]]) -> None:
        self.weights: dict[str, Mapping[str, torch.Tensor]] = {str(name): each for name, each in weights.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        expert, _, rest = name.partition(".")
        return self.weights[expert][rest]

    def __iter__(self) -> Iterator[str]:
        return (f"{expert}.{name}" for expert, weights in self.weights.items() for name in weights)

    def __len__(self) -> int:
        return sum(map(len, self.weights.values()))
