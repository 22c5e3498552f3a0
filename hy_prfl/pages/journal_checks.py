"""Checks, line by line, that a journal belongs to a study."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from .items import CLIP_CHOICES, PAIR_ANSWERS, Kind, is_text, parse_time
from .journal import FORMAT, Journal


def check_head(journal: Journal, *, kind: Kind, questions: Sequence[str]) -> None:
    """Raise a `ValueError` unless the first line is the head of a study of this kind that asks these questions."""
    head = journal.events[0]
    if head["type"] != "study" or head.get("format") != FORMAT:
        raise ValueError(f"{journal.path}, line 1: this is not a journal of labels.")
    expected: dict[str, Any] = {"kind": kind, "questions": list(questions)}
    for name, value in expected.items():
        if head.get(name) != value:
            raise ValueError(
                f"{journal.path}: its `{name}` is {head.get(name)!r}, not {value!r}. Choose another `output`."
            )
    try:
        bytes.fromhex(head["secret"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{journal.path}, line 1: `secret` is missing or broken.") from error
    if not isinstance(head.get("inputs", {}), dict):
        raise ValueError(f"{journal.path}, line 1: `inputs` must be an object, got {head['inputs']!r}.")


def check_event(
    event: Mapping[str, Any],
    where: str,
    *,
    kind: Kind,
    questions: Sequence[str],
    items: Container[str],
    given: Container[tuple[str, str]],
    change: str,
) -> None:
    """
    Raise a `ValueError` unless a line can follow the earlier ones.

    Args:
        event, where: The line, and its place for messages.
        items (`Container[str]`): Ids of the input's items.
        given (`Container[tuple[str, str]]`): Annotator and item of the judgements that count so far.
        change (`str`): Sentence that says how the input has changed, see [`describe_change`].
    """
    if event["type"] not in ("label", "skip", "undo"):
        raise ValueError(f"{where}: `type` must be label, skip or undo, got {event['type']!r}.")
    for name in ("item", "annotator", "key", "time"):
        if not isinstance(event.get(name), str) or not is_text(event[name]):
            raise ValueError(f"{where}: `{name}` must be text, got {event.get(name)!r}.")
    if event["item"] not in items:
        raise ValueError(f"{where}: there is no clip or pair {event['item']!r} in the input. {change}")
    try:
        parse_time(event["time"])
    except ValueError as error:
        raise ValueError(f"{where}: `time` {event['time']!r} is not a time in ISO 8601.") from error
    was_given = (event["annotator"], event["item"]) in given
    if was_given != (event["type"] == "undo"):
        problem = "has judged this already" if was_given else "has not judged this, so there is nothing to undo"
        raise ValueError(f"{where}: {event['annotator']!r} {problem}.")
    if event["type"] == "label":
        answers, seconds = event.get("answers"), event.get("seconds")
        choices = CLIP_CHOICES if kind == "clips" else PAIR_ANSWERS
        if (
            not isinstance(answers, dict)
            or set(answers) != set(questions)
            or any(answer not in choices for answer in answers.values())
        ):
            raise ValueError(
                f"{where}: `answers` must have one of {', '.join(choices)} for each of {', '.join(questions)}, got "
                f"{answers!r}."
            )
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float))):
            raise ValueError(f"{where}: `seconds` must be a number, got {seconds!r}.")


def describe_change(journal: Journal, inputs: Mapping[str, str]) -> str:
    """The inputs of the journal and those of now, for messages about a journal of another study."""
    known = journal.events[0].get("inputs", {})
    return (
        f"The journal is of {_listed(known)}; the input, {_listed(inputs)}, is another study or has changed since. Choose "
        "another `output`."
    )


def _listed(inputs: Mapping[str, str]) -> str:
    return " and ".join(f"`{name}` '{path}'" for name, path in inputs.items()) or "an unnamed input"
