"""Whether a PRFL run still improves videos or only its own reward: rules on the metrics of its validations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


Level = Literal["healthy", "warn", "hacked"]
LEVELS: tuple[Level, ...] = ("healthy", "warn", "hacked")


@dataclass(frozen=True)
class Verdict:
    """
    What the validations of a run say.

    Args:
        level (`str`):
            `"healthy"`, `"warn"` or `"hacked"`.
        reason (`str`):
            Which rules say so, with their numbers; a part of a sentence.
    """

    level: Level
    reason: str

    @property
    def number(self) -> int:
        """0, 1 or 2, for plots."""
        return LEVELS.index(self.level)


def judge(series: Sequence[Mapping[str, float]]) -> Verdict:
    return Verdict("healthy", "this is the base" if len(series) == 1 else "no rule says otherwise")
