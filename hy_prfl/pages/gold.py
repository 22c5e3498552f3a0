"""Gold: clips and pairs whose right answers are known, to measure annotators."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..data.annotations import read_annotations
from ..data.manifest import FIELDS, ManifestRow
from ..data.records import read_records, read_text
from .annotation import PREFERENCE
from .items import Item
from .study import Study
from .votes import gold_accuracy


logger = logging.getLogger(__name__)

# By item and question, in the words of the journal.
Gold = Mapping[str, Mapping[str, str]]


def with_gold(items: Sequence[Item], gold: Gold) -> list[Item]:
    """The items, with their right answers where these are known."""
    return [replace(item, gold=gold.get(item.id, {})) for item in items]


def read_gold(path: str | Path, rows: Sequence[ManifestRow], tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    """
    Right answers by clip id and task, from a file in the format of `label`.

    Raises:
        ValueError: If it names a clip that is not in the manifest, or has no answer for any of the tasks.
    """
    ids = {row.id for row in rows}
    gold = {}
    for clip_id, labels in read_annotations(path).items():
        if clip_id not in ids:
            raise ValueError(f"{path}: clip {clip_id!r} is not in the manifest.")
        answers = {task: "good" if labels[task] else "poor" for task in tasks if task in labels}
        if answers:
            gold[clip_id] = answers
    if not gold:
        raise ValueError(f"{path}: no clip has a label of {', '.join(tasks)}.")
    return gold


def read_gold_pairs(path: str | Path, pairs: Sequence[Item]) -> dict[str, dict[str, str]]:
    """
    Right answers by pair, from a file whose rows name the better clip as `id` and the other one as `rejected_id`.

    `annotate` writes such files. Rows without a `rejected_id` are ignored. A tie is never right.

    Args:
        pairs (`Sequence[Item]`): Those of the manifest.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row has no `id`, or names clips that are not a pair of the manifest, if two rows contradict each
            other, or no row has a `rejected_id`; names file and row.
    """
    path = Path(path)
    by_clips = {frozenset(clip.id for clip in pair.clips): pair for pair in pairs}
    gold: dict[str, dict[str, str]] = {}
    for where, record in read_records(path, {name: FIELDS[name] for name in ("id", "rejected_id")}):
        better, worse = (read_text(record, FIELDS[name], where) for name in ("id", "rejected_id"))
        if better is None:
            raise ValueError(f"{where}: `id` is missing.")
        if worse is None:
            continue
        pair = by_clips.get(frozenset({better, worse}))
        if pair is None:
            raise ValueError(f"{where}: {better!r} and `rejected_id` {worse!r} are not a pair of the manifest.")
        answer = {PREFERENCE: "first" if pair.clips[0].id == better else "second"}
        if gold.setdefault(pair.id, answer) != answer:
            raise ValueError(
                f"{where}: `rejected_id` says that {better!r} is better than {worse!r}, but an earlier row says the opposite."
            )
    if not gold:
        raise ValueError(f"{path}: no row has a `rejected_id`, the id of the worse clip of a pair.")
    return gold


def trusted_annotators(study: Study, min_gold_accuracy: float | None) -> list[str]:
    """People whose answers count: all, or those whose accuracy on gold clips is high enough."""
    names = sorted({label["annotator"] for label in study.labels})
    if min_gold_accuracy is None:
        return names
    accuracy = gold_accuracy(study.labels, {item.id: item.gold for item in study.items.values() if item.gold})
    low = [name for name in names if name in accuracy and accuracy[name]["accuracy"] < min_gold_accuracy]
    for name in low:
        share = accuracy[name]["accuracy"]
        logger.warning(f"{name}: right about {share:.0%} of the gold answers, so the labels are not used.")
    return [name for name in names if name not in low]
