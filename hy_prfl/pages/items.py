"""The items of a study, clips or pairs, and the possible answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal


Kind = Literal["clips", "pairs"]

CLIP_CHOICES, PAIR_CHOICES = ("good", "poor", "unsure"), ("left", "right", "tie")
# Answers to a pair in the journal. Sides are random, so they name the first or the second clip of the item.
PAIR_ANSWERS = ("first", "second", "tie")


class StudyError(ValueError):
    """A request that does not fit the study: an unknown item, a missing answer."""


class ConflictError(StudyError):
    """A request that is out of date, such as a second label for the same clip by the same person."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video to show. `caption` may be empty."""

    id: str
    video: Path
    caption: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """
    One thing to judge: a clip, or two of them.

    Args:
        id (`str`): Unique in the study.
        clips (`tuple[Clip, ...]`): One, or two for a pair.
        gold (`Mapping[str, str]`): Answers that are known to be right, by question. Empty if none are.
        prompt (`str`, *optional*): What its clips were made from. Items of one prompt are not independent.
    """

    id: str
    clips: tuple[Clip, ...]
    gold: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8. JSON may contain halves of surrogate pairs, which cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def parse_time(text: str) -> datetime:
    """
    Parse a time in ISO 8601. A time without a zone is UTC.

    Raises:
        ValueError: If it is not a time.
    """
    # Python 3.10 does not parse Z.
    time = datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith("Z") else text)
    return time.replace(tzinfo=timezone.utc) if time.tzinfo is None else time
