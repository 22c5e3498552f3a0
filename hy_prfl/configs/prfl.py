"""Options of `train_prfl`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import TrainingConfig, check


@dataclass(kw_only=True)
class PRFLTrainingConfig(TrainingConfig):
    """
    Options of process reward feedback learning. A step is one update of each kind that the schedule has.

    > Parameters of the average
    > Parameters of the reward update
    > Parameters of the prompts
    > Parameters of the validation
    """

    # Parameters of the average
    use_ema: bool = field(default=False, metadata={"help": "Keep, validate and save an average of the weights."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of that average."})

    # Parameters of the reward update
    reward_model: str = field(metadata={"help": "Reward model: a folder written by train_reward, or a Hub id."})
    allow_other_base: bool = field(
        default=False, metadata={"help": "Accept a reward model made from a transformer of another size."}
    )
    shard_reward_model: bool = field(
        default=False,
        metadata={"help": "Split the reward model's weights over all processes instead of a copy on each."},
    )
    prompt_dataset: str | None = field(
        default=None,
        metadata={"help": "Dataset of the reward updates, latents not needed; train_dataset if left out."},
    )
    update_schedule: Literal["alternate", "joint", "reward", "flow_matching"] = field(
        default="alternate",
        metadata={
            "help": "alternate: a flow-matching update, then a reward update (the paper). joint: one update on both "
            "gradients. reward, flow_matching: only that one."
        },
    )
    reward_loss: Literal["logit", "sigmoid", "logsigmoid"] = field(
        default="logsigmoid", metadata={"help": "logit: the paper's. sigmoid: upstream's. logsigmoid: see losses.py."}
    )
    reward_scale: float = field(default=1.0, metadata={"help": "Weight of the reward loss."})
    reward_target: float = field(default=2.0, metadata={"help": "Target of the sigmoid form's hinge."})
    num_inference_steps: int = field(default=40, metadata={"help": "Steps of the sampler's whole chain."})
    step_range: list[int] | None = field(
        default=None,
        metadata={"help": "First and last step that may take gradient; 0 and num_inference_steps - 2 if left out."},
    )
    sampler_flow_shift: float | None = field(
        default=None, metadata={"help": "Shift of the sampler's grid, the pipeline's own if left out."}
    )

    # Parameters of the prompts
    prompt_dropout: float = field(default=0.1, metadata={"help": "Share of prompts replaced by the empty one."})
    long_prompt_probability: float = field(
        default=0.7, metadata={"help": "How often the long caption is taken where a row has one."}
    )

    # Parameters of the validation
    num_validation_samples: int = field(default=8, metadata={"help": "Rows of validation_dataset to sample."})
    validation_timesteps: list[int] = field(
        default_factory=lambda: [201, 400, 600, 800, 1000],
        metadata={"help": "Noise levels, 1000 * sigma, at which the samples are scored."},
    )
    validation_guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the samples; 1 is none."})
    validation_videos: bool = field(default=False, metadata={"help": "Decode the samples to mp4 files."})
    validation_fps: int = field(default=16, metadata={"help": "Frame rate of those files."})
    validation_seed: int = field(default=0, metadata={"help": "Seed of the samples."})

    def __post_init__(self) -> None:
        super().__post_init__()
        shift = self.sampler_flow_shift
        check(shift is None or shift > 0, "sampler_flow_shift", shift, "greater than 0, or left out")
        check(self.reward_scale > 0, "reward_scale", self.reward_scale, "greater than 0")
        for name in ("ema_decay", "prompt_dropout", "long_prompt_probability"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("num_validation_samples", "validation_fps"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.num_inference_steps >= 2, "num_inference_steps", self.num_inference_steps, "at least 2")
        for timestep in self.validation_timesteps:
            check(0 < timestep <= 1000, "validation_timesteps", timestep, "in (0, 1000]")
        last = self.num_inference_steps - 2
        bounds = self.step_range
        if bounds is not None:
            ordered = len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= last
            check(ordered, "step_range", bounds, f"two step indices, first <= last, within [0, {last}]")
