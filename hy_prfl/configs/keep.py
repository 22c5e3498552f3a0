"""Parses the option `keep`: how many candidates continue after which step, such as `6:4,12:2,20:1`."""

import re
from dataclasses import dataclass

from .base import check


@dataclass(frozen=True)
class Decision:
    """After `step` steps of the denoising chain, the best `num_kept` candidates continue. Both are at least 1."""

    step: int
    num_kept: int


def parse_keep(text: str | None) -> tuple[Decision, ...]:
    """
    Decisions in the order of their steps; an empty tuple for None.

    Raises:
        ValueError: If it is not a list of `step:number`, both at least 1, with ascending steps.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    valid = all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", part) for part in parts)
    check(valid, "keep", text, "a list of step:number, both at least 1, such as 6:4,12:2,20:1")
    decisions = tuple(Decision(*map(int, part.split(":"))) for part in parts)
    steps = [decision.step for decision in decisions]
    check(steps == sorted(set(steps)), "keep", text, "a list with ascending steps")
    return decisions


def check_keep(
    decisions: tuple[Decision, ...], *, num_candidates: int, num_inference_steps: int, resample: bool = False
) -> None:
    """Raise a `ValueError` unless every decision is before the last step and drops at least one candidate."""
    num_left = num_candidates
    for decision in decisions:
        shown = f"{decision.step}:{decision.num_kept}"
        # After the last step a decision saves nothing: the best candidate is selected there anyway.
        in_chain = decision.step < num_inference_steps
        check(in_chain, "keep", shown, f"before the last step of `num_inference_steps` {num_inference_steps}")
        check(decision.num_kept < num_left, "keep", shown, f"fewer than the {num_left} candidates before this step")
        num_left = decision.num_kept * (2 if resample else 1)


def format_keep(decisions: tuple[Decision, ...]) -> str:
    """The text for decisions, as `parse_keep` reads it."""
    return ",".join(f"{decision.step}:{decision.num_kept}" for decision in decisions)


def num_forwards(
    decisions: tuple[Decision, ...], *, num_candidates: int, num_inference_steps: int, resample: bool = False
) -> int:
    """Sum of the steps of all candidates of a prompt. With classifier-free guidance, a step takes two forwards."""
    total, num_left, before = 0, num_candidates, 0
    for decision in decisions:
        total += num_left * (decision.step - before)
        num_left, before = decision.num_kept * (2 if resample else 1), decision.step
    return total + num_left * (num_inference_steps - before)


def num_scores(
    decisions: tuple[Decision, ...], *, num_candidates: int, num_final_timesteps: int, resample: bool = False
) -> int:
    """
    Forwards of the reward model for all candidates of a prompt.

    That is one for each candidate at each decision. If more than one is left at the end, it is also one for each of them
    at each final timestep.
    """
    total, num_left = 0, num_candidates
    for decision in decisions:
        total += num_left
        num_left = decision.num_kept * (2 if resample else 1)
    return total + (num_left * num_final_timesteps if num_left > 1 else 0)
