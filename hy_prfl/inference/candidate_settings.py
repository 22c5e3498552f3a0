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

    The chain moves against the velocity, so what is added points down the logit:
    `velocity - scale * |velocity| * gradient / |gradient|`. Norms are those of a whole clip, so `scale` means the same
    at every step and for every reward model. A step costs a forward and a backward of the reward model more.

    Args:
        scale (`float`):
            Length of what is added, as a share of the velocity's; greater than 0.
        first_step, last_step (`int`):
            Steps that are guided, counted from 1. At the first ones a reward model sees nothing.
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
            After `step` steps the best `num_kept` go on, judged on their noisy latents. Without any all of them go to
            the end: plain best-of-N.
        final_timesteps (`tuple[float, ...]`):
            If several reach the end, the best mean logit at these noise levels wins, in (0, 1000].
        batch_size (`int`):
            Candidates that a model takes at once. With 1 a candidate is, bit for bit, the plain sample of its seed.
        resample (`bool`):
            Particles: those that are kept go on twice, as they are and with a share of their noise drawn new.
        renoise (`float`):
            That share, as standard deviation of the new noise in units of the whole, in (0, 1].
        guidance (`RewardGuidance`, *optional*):
            Also follow the reward's gradient.
        score_every_step (`bool`):
            Score after every step, to see how early the reward knows. Changes no video.
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
