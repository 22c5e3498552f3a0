"""How many candidates go on after which step, as it is written in options: `6:4,12:2,20:1`."""

import re
from dataclasses import dataclass

from .base import check


@dataclass(frozen=True)
class Decision:
    """After this many steps of the chain, the best `num_kept` candidates go on; both at least 1."""

    step: int
    num_kept: int


def parse_keep(text: str | None) -> tuple[Decision, ...]:
    """
    Decisions in the order of the chain; none for None.

    Raises:
        ValueError: If it is not a list of `step:number` with both at least 1 and steps that ascend.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    valid = all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", part) for part in parts)
    check(valid, "keep", text, "a list of step:number, both at least 1, such as 6:4,12:2,20:1")
    decisions = tuple(Decision(*map(int, part.split(":"))) for part in parts)
    steps = [decision.step for decision in decisions]
    check(steps == sorted(set(steps)), "keep", text, "a list whose steps ascend")
    return decisions


def check_keep(
    decisions: tuple[Decision, ...], *, num_candidates: int, num_inference_steps: int, resample: bool = False
) -> None:
    """Raise a `ValueError` unless every decision is within the chain and drops at least one candidate."""
    there = num_candidates
    for decision in decisions:
        shown = f"{decision.step}:{decision.num_kept}"
        # After the last step nothing is left to be saved: the best of all is taken there anyway.
        in_chain = decision.step < num_inference_steps
        check(in_chain, "keep", shown, f"after a step before the last of `num_inference_steps` {num_inference_steps}")
        check(decision.num_kept < there, "keep", shown, f"fewer than the {there} candidates that are there by then")
        there = decision.num_kept * (2 if resample else 1)


def format_keep(decisions: tuple[Decision, ...]) -> str:
    """What `parse_keep` reads."""
    return ",".join(f"{decision.step}:{decision.num_kept}" for decision in decisions)


def num_forwards(
    decisions: tuple[Decision, ...], *, num_candidates: int, num_inference_steps: int, resample: bool = False
) -> int:
    """Steps that all candidates of a prompt take together. Classifier-free guidance takes two forwards for each."""
    total, there, before = 0, num_candidates, 0
    for decision in decisions:
        total += there * (decision.step - before)
        there, before = decision.num_kept * (2 if resample else 1), decision.step
    return total + there * (num_inference_steps - before)


def num_scores(
    decisions: tuple[Decision, ...], *, num_candidates: int, num_final_timesteps: int, resample: bool = False
) -> int:
    """Forwards of the reward model for all candidates of a prompt: one for each at a decision, and those at the end."""
    total, there = 0, num_candidates
    for decision in decisions:
        total += there
        there = decision.num_kept * (2 if resample else 1)
    return total + (there * num_final_timesteps if there > 1 else 0)
