"""Labels from and for Label Studio: its JSON export has one task for each clip or pair, with the annotations in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.records import parse_json, read_utf8
from .study import CLIP_CHOICES, Item, Study


# `from_name` of a clip's question is the task; that of a pair is this one.
PAIR_SIDES = {"left": "first", "right": "second"}


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

    Returns:
        `tuple[int, int]`: labels that were added, and those that were there already (same person, same item).

    Raises:
        ValueError: If the file is no such export, a task is none of the study, or an answer is none of its choices;
            names file, task and annotation.
    """
    tasks = parse_json(read_utf8(Path(path)), str(path))
    if not isinstance(tasks, list):
        raise ValueError(f"{path}: expected a JSON list of tasks, as `JSON` of Label Studio's export is.")
    found: list[tuple[str, str, dict[str, str], str | None]] = []
    for number, task in enumerate(tasks, 1):
        where = f"{path}, task {number}"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise ValueError(f"{where}: there is no `data`; this is no export of Label Studio.")
        item_id = str(task["data"].get("id"))
        if item_id not in study.items:
            raise ValueError(f"{where}: `data.id` {item_id!r} is no clip or pair of the input.")
        for index, annotation in enumerate(task.get("annotations", []), 1):
            # Cancelled is Label Studio's word for skipped.
            if not annotation.get("was_cancelled"):
                answers = _answers(study, annotation, f"{where}, annotation {index}")
                person = _person(annotation.get("completed_by"))
                found.append((person, item_id, answers, annotation.get("created_at")))
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


def _person(completed_by: Any) -> str:
    if isinstance(completed_by, dict):
        return str(completed_by.get("email") or completed_by.get("username") or completed_by.get("id"))
    return str(completed_by)


def _answers(study: Study, annotation: Mapping[str, Any], where: str) -> dict[str, str]:
    answers: dict[str, str] = {}
    results: Sequence[Mapping[str, Any]] = annotation.get("result", [])
    for result in results:
        value = result.get("value", {})
        answer: Any = value.get("selected") or next(iter(value.get("choices", [])), None)
        answer = PAIR_SIDES.get(answer, answer) if study.kind == "pairs" else answer
        choices = CLIP_CHOICES if study.kind == "clips" else (*PAIR_SIDES.values(), "tie")
        # One question needs no name: projects call their tags as they like.
        question = study.questions[0] if len(study.questions) == 1 else result.get("from_name")
        if question not in study.questions:
            raise ValueError(f"{where}: `from_name` {question!r} is none of {', '.join(study.questions)}.")
        if answer not in choices:
            raise ValueError(f"{where}: `{question}` is {answer!r}, expected one of {', '.join(choices)}.")
        answers[question] = answer
    absent = [question for question in study.questions if question not in answers]
    if absent:
        raise ValueError(f"{where}: there is no answer to {', '.join(absent)}.")
    return answers
