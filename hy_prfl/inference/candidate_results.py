"""The record of a video's candidates."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Candidate:
    """
    The record of one candidate.

    Args:
        seed (`int`):
            Seed of its noise.
        copied_from (`int`, *optional*), copied_after (`int`, *optional*):
            For a re-noised copy: number of the original, and the step after which it was copied.
        logits (`dict[int, float]`):
            Number of steps -> logit of the noisy latents after them, at the noise level of the next step.
        final_logit (`float`, *optional*):
            Mean logit of the finished video at `final_timesteps`, if it was needed.
        dropped_after (`int`, *optional*):
            Step after which it was dropped; the last step for those that lost at the end, None for the winner.
    """

    seed: int
    copied_from: int | None = None
    copied_after: int | None = None
    logits: dict[int, float] = field(default_factory=dict)
    final_logit: float | None = None
    dropped_after: int | None = None

    @property
    def is_chosen(self) -> bool:
        return self.dropped_after is None


@dataclass(frozen=True)
class Candidates:
    """
    The chosen video, and the record of all candidates.

    Args:
        frames (`Any`):
            The video as the pipeline returns it for its `output_type`.
        candidates (`list[Candidate]`):
            In the order of their seeds, copies after them.
        num_forwards, num_reward_forwards, num_reward_backwards (`int`):
            Forwards of the generator, two a step under classifier-free guidance, and passes of the reward model. A batch
            counts once for each candidate.
    """

    frames: Any
    candidates: list[Candidate]
    num_forwards: int
    num_reward_forwards: int
    num_reward_backwards: int

    @property
    def chosen(self) -> Candidate:
        """The winner."""
        return next(candidate for candidate in self.candidates if candidate.is_chosen)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, for JSON."""
        counts = ("num_forwards", "num_reward_forwards", "num_reward_backwards")
        return {
            "chosen_seed": self.chosen.seed,
            **{name: getattr(self, name) for name in counts},
            "candidates": [dataclasses.asdict(candidate) for candidate in self.candidates],
        }
