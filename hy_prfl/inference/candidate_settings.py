"""How candidates of a video are sampled and chosen."""

from dataclasses import dataclass

from ..configs.base import check
from ..configs.keep import Decision
from ..flow_matching import NUM_TRAIN_TIMESTEPS


# Noise levels at which finished candidates are scored if several are left: where reward models judge best.
FINAL_TIMESTEPS = (400, 600, 800)


@dataclass(frozen=True, kw_only=True)
class RewardGuidance:
    """
    The gradient of the reward model's logit, added to the velocity after classifier-free guidance.

    The chain moves against the velocity, so the gradient is subtracted from it:
    `velocity - scale * |velocity| * gradient / |gradient|`. Norms are those of a whole clip, so `scale` means the same
    at every step and for every reward model. A guided step also costs a forward and a backward of the reward model.

    Args:
        scale (`float`):
            Length of the added vector, as a share of the velocity's; greater than 0.
        first_step, last_step (`int`):
            First and last guided step, counted from 1. In the first steps of a chain a reward model sees only noise.
    """

    scale: float
    first_step: int
    last_step: int

    def __post_init__(self) -> None:
        check(self.scale > 0, "scale", self.scale, "greater than 0")
        check(self.first_step >= 1, "first_step", self.first_step, "at least 1")
        check(self.last_step >= self.first_step, "last_step", self.last_step, f"at least {self.first_step}")


@dataclass(frozen=True, kw_only=True)
class CandidateSettings:
    """
    How candidates are sampled and chosen.

    Args:
        keep (`tuple[Decision, ...]`):
            After `step` steps the best `num_kept` candidates continue, by the reward of their noisy latents. Without
            decisions all run to the end: plain best-of-N.
        final_timesteps (`tuple[float, ...]`):
            If several reach the end, the best mean logit at these noise levels wins, in (0, 1000].
        batch_size (`int`):
            Candidates that a model takes at once. With 1 a candidate is, bit for bit, the plain sample of its seed.
        resample (`bool`):
            Particle resampling: each kept candidate continues twice, unchanged and as a copy with part of its noise
            redrawn.
        renoise (`float`):
            Standard deviation of the redrawn part, as a share of that of the whole noise, in (0, 1].
        guidance (`RewardGuidance`, *optional*):
            Also follow the reward's gradient.
        score_every_step (`bool`):
            Score after every step, for a calibration. Changes no video.
    """

    keep: tuple[Decision, ...] = ()
    final_timesteps: tuple[float, ...] = FINAL_TIMESTEPS
    batch_size: int = 1
    resample: bool = False
    renoise: float = 0.5
    guidance: RewardGuidance | None = None
    score_every_step: bool = False

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        check(0 < self.renoise <= 1, "renoise", self.renoise, "in (0, 1]")
        check(len(self.final_timesteps) > 0, "final_timesteps", self.final_timesteps, "not empty")
        for timestep in self.final_timesteps:
            check(0 < timestep <= NUM_TRAIN_TIMESTEPS, "final_timesteps", timestep, f"in (0, {NUM_TRAIN_TIMESTEPS}]")
