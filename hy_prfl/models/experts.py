"""Pipelines of two experts (Wan2.2 A14B): which transformer is called at which timestep. The only place that knows."""

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
    The experts of a pipeline, and those of them that train.

    The high-noise expert is called at timesteps that are not below the boundary, as diffusers' pipelines do it, the
    low-noise expert at all others. A pipeline with one transformer is one whose boundary is 0.

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
        """Timesteps of an expert: from the first number on, and below the second."""
        return (self.boundary, math.inf) if expert == "high_noise" else (-math.inf, self.boundary)

    def draw(self, uniform: float, high_noise_probability: float) -> ExpertName:
        """
        One of the experts in training.

        Args:
            uniform (`float`):
                A draw from U[0, 1).
            high_noise_probability (`float`):
                How often it is the high-noise expert if both train.
        """
        if len(self.trained) == 1:
            return self.trained[0]
        return "high_noise" if uniform < high_noise_probability else "low_noise"

    def join(self, transformers: Mapping[ExpertName, nn.Module]) -> nn.Module:
        """What is called as one transformer: the only one of these, or both of them."""
        if len(transformers) == 1:
            return next(iter(transformers.values()))
        return ExpertPair(transformers["high_noise"], transformers["low_noise"], self)

    def parts(self, model: nn.Module) -> dict[ExpertName, Any]:
        """The transformers in training, by their names, of what [`join`] made of them."""
        if len(self.trained) == 1:
            return {self.trained[0]: model}
        return {name: model.get_submodule(name) for name in self.trained}

    def frozen(self, *, rolls_out: bool, samples: bool) -> ExpertName | None:
        """
        The expert that has to be there beside the one in training, if any.

        Args:
            rolls_out (`bool`):
                Whether chains are walked as far as a step of the expert in training.
            samples (`bool`):
                Whether chains are walked to their end.
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
        First and last step of the sampler's chain that may take gradient: steps of an expert in training, within the
        range that was asked for, and not the very last, which would leave no noise.

        Args:
            timesteps (`Sequence[float]`):
                The sampler's grid, one timestep a step, descending.
            step_range (`Sequence[int]`, *optional*):
                First and last step that were asked for.
            num_gradient_steps (`int`, defaults to 1):
                How many of them a chain needs.
            num_chained_steps (`int`, defaults to 1):
                How many consecutive steps a gradient passes through; the range is that of the last of them.

        Raises:
            ValueError: If the range goes beyond these steps, or there are too few of them.
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


def read_experts(pretrained_model_name_or_path: str, expert: str | None, *, revision: str | None = None) -> Experts:
    """Experts of a pipeline on disk or on the Hub, and the choice among them, see [`choose_experts`]."""
    return choose_experts(PipelineInfo.read(pretrained_model_name_or_path, revision), expert)


def choose_experts(info: PipelineInfo, expert: str | None) -> Experts:
    """
    Experts of a pipeline, and the choice among them.

    Args:
        info (`PipelineInfo`):
            The pipeline.
        expert (`str`, *optional*):
            `"high_noise"`, `"low_noise"` or `"both"`; to be left out if the pipeline has one transformer.

    Raises:
        ValueError: If the choice does not fit the pipeline, or its index contradicts itself.
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
    # As the pipelines compute it.
    return Experts(ratio * NUM_TRAIN_TIMESTEPS, choices[expert])


class ExpertPair(nn.Module):
    """
    Two experts that are called as one transformer: the timestep says which of them.

    All samples of a batch must be on one side of the boundary. To see on which, each forward waits for the device once.
    Under an engine all ranks must be on the same side.

    Args:
        high_noise, low_noise (`nn.Module`):
            The experts, each as it is called: bare, or in its engine's wrapping.
        experts (`Experts`):
            Says where the boundary is.
    """

    def __init__(self, high_noise: nn.Module, low_noise: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.high_noise = high_noise
        self.low_noise = low_noise
        self.experts = experts

    def forward(self, *, timestep: torch.Tensor, **inputs: Any) -> Any:
        """
        Call the expert of these timesteps.

        Args:
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                Noise levels, `1000 * sigma`.
            inputs:
                Whatever else a transformer is given.

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
    """Weights of an [`ExpertPair`] by name, made of those of the experts; each is read when it is asked for."""

    def __init__(self, weights: Mapping[ExpertName, Mapping[str, torch.Tensor]]) -> None:
        self.weights: dict[str, Mapping[str, torch.Tensor]] = {str(name): each for name, each in weights.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        expert, _, rest = name.partition(".")
        return self.weights[expert][rest]

    def __iter__(self) -> Iterator[str]:
        return (f"{expert}.{name}" for expert, weights in self.weights.items() for name in weights)

    def __len__(self) -> int:
        return sum(map(len, self.weights.values()))
