"""Labels from and for Label Studio: its JSON export has one task for each clip or pair, with the annotations in it."""

import logging
from collections.abc import Mapping
from datetime import timezone
from pathlib import Path
from typing import Any

from ..data.records import parse_json, read_utf8
from .items import CLIP_CHOICES, PAIR_ANSWERS, Item, parse_time
from .study import Study


logger = logging.getLogger(__name__)

# `from_name` of a clip's question is the task; that of a pair is this one.
PAIR_SIDES = {"left": "first", "right": "second"}
# Longest e-mail address.
MAX_PERSON = 254


def export_tasks(study: Study) -> list[dict[str, Any]]:
    """
    Items and their labels as Label Studio imports them (`Import` of a project, or `label-studio-sdk`).

    A clip has `data.video`, a pair `data.video1` and `data.video2`, and both `data.id` and `data.caption`. A question is
    a `Choices` tag named like it, that of pairs a `Pairwise` tag; a tie is a `Choices` with the value `tie`.
    """
    labels: dict[str, list[Mapping[str, Any]]] = {item_id: [] for item_id in study.items}
    for label in study.labels:
        labels[label["item"]].append(label)
    return [
        {"id": number, "data": _data(item), "annotations": [_annotation(study, label) for label in labels[item.id]]}
        for number, item in enumerate(study.items.values(), 1)
    ]


def import_tasks(study: Study, path: str | Path) -> tuple[int, int]:
    """
    Take the annotations of a Label Studio export into the journal.

    Annotations that were skipped in Label Studio are not labels; the log lists them.

    Returns:
        `tuple[int, int]`: labels that were added, and those that were there already (same person, same item).

    Raises:
        ValueError: If the file is no such export, a task is none of the study, or an annotation has no person, no time
            or an answer that is none of the choices; names file, task and annotation. Nothing is taken then.
    """
    tasks = parse_json(read_utf8(Path(path)), str(path))
    if not isinstance(tasks, list):
        raise ValueError(f"{path}: expected a JSON list of tasks, as `JSON` of Label Studio's export is.")
    found: list[tuple[str, str, dict[str, str], str | None]] = []
    skipped: list[str] = []
    for number, task in enumerate(tasks, 1):
        where = f"{path}, task {number}"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise ValueError(f"{where}: there is no `data`; this is not an export of Label Studio.")
        item_id = str(task["data"].get("id"))
        if item_id not in study.items:
            raise ValueError(f"{where}: `data.id` {item_id!r} is not a clip or pair of the input.")
        annotations = task.get("annotations", [])
        if not isinstance(annotations, list):
            raise ValueError(f"{where}: `annotations` must be a list, got {annotations!r}.")
        for index, annotation in enumerate(annotations, 1):
            place = f"{where}, annotation {index}"
            if not isinstance(annotation, dict):
                raise ValueError(f"{place}: expected an object, got {annotation!r}.")
            # Label Studio's word for skipped.
            if annotation.get("was_cancelled"):
                skipped.append(f"task {number}, annotation {index} ({item_id!r})")
                continue
            answers = _answers(study, annotation, place)
            person = _person(annotation.get("completed_by"), place)
            found.append((person, item_id, answers, _time(annotation.get("created_at"), place)))
    if skipped:
        more = f"; and {len(skipped) - 20} more" if len(skipped) > 20 else ""
        logger.warning(
            f"{path}: {len(skipped)} annotations were skipped in Label Studio and are not labels: "
            f"{'; '.join(skipped[:20])}{more}."
        )
    added = sum(study.import_label(person, item_id, answers, time=when) for person, item_id, answers, when in found)
    return added, len(found) - added


def _data(item: Item) -> dict[str, str]:
    data = {"id": item.id, "caption": item.clips[0].caption}
    if len(item.clips) == 1:
        return data | {"video": str(item.clips[0].video)}
    return data | {f"video{number}": str(clip.video) for number, clip in enumerate(item.clips, 1)}


def _annotation(study: Study, label: Mapping[str, Any]) -> dict[str, Any]:
    results = []
    for question, answer in label["answers"].items():
        if study.kind == "clips":
            value: dict[str, Any] = {"type": "choices", "to_name": "video", "value": {"choices": [answer]}}
        elif answer == "tie":
            value = {"type": "choices", "to_name": "video1", "value": {"choices": ["tie"]}}
        else:
            side = next(side for side, meaning in PAIR_SIDES.items() if meaning == answer)
            value = {"type": "pairwise", "to_name": "video1,video2", "value": {"selected": side}}
        results.append({"from_name": question, **value})
    person = {"email": label["annotator"]}
    return {"completed_by": person, "created_at": label["time"], "was_cancelled": False, "result": results}


def _person(completed_by: Any, where: str) -> str:
    """E-mail, name or number of a person."""
    found = completed_by
    if isinstance(completed_by, dict):
        found = completed_by.get("email") or completed_by.get("username") or completed_by.get("id")
    is_name = isinstance(found, (str, int)) and not isinstance(found, bool)
    name = str(found).strip() if is_name else ""
    # Printable text has no halves of surrogate pairs, which cannot be written.
    if not 0 < len(name) <= MAX_PERSON or not name.isprintable():
        raise ValueError(f"{where}: `completed_by` must say who it is from, got {completed_by!r}.")
    return name


def _time(created_at: Any, where: str) -> str | None:
    """`created_at` as the journal has times; None if there is none."""
    if created_at is None:
        return None
    try:
        return parse_time(created_at).astimezone(timezone.utc).isoformat(timespec="milliseconds")
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: `created_at` must be a time of ISO 8601, got {created_at!r}.") from error


def _answers(study: Study, annotation: Mapping[str, Any], where: str) -> dict[str, str]:
    answers: dict[str, str] = {}
    choices = CLIP_CHOICES if study.kind == "clips" else PAIR_ANSWERS
    results = annotation.get("result", [])
    if not isinstance(results, list):
        raise ValueError(f"{where}: `result` must be a list, got {results!r}.")
    for result in results:
        value = result.get("value", {}) if isinstance(result, dict) else None
        if not isinstance(value, dict) or not isinstance(value.get("choices", []), list):
            raise ValueError(f"{where}: expected a `value` with `choices` or `selected`, got {result!r}.")
        answer: Any = value.get("selected") or next(iter(value.get("choices", [])), None)
        if study.kind == "pairs" and isinstance(answer, str):
            answer = PAIR_SIDES.get(answer, answer)
        # A single question needs no name, because projects may use any name for its tag.
        question = study.questions[0] if len(study.questions) == 1 else result.get("from_name")
        if question not in study.questions:
            raise ValueError(f"{where}: `from_name` {question!r} is none of {', '.join(study.questions)}.")
        if answer not in choices:
            raise ValueError(f"{where}: `{question}` is {answer!r}, expected one of {', '.join(choices)}.")
        if answers.get(question, answer) != answer:
            raise ValueError(f"{where}: `{question}` is both {answers[question]!r} and {answer!r}.")
        answers[question] = answer
    absent = [question for question in study.questions if question not in answers]
    if absent:
        raise ValueError(f"{where}: there is no answer to {', '.join(absent)}.")
    return answers
