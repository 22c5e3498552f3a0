"""From a manifest to what people are asked, and from their answers to files that `label` and `preprocess` read."""

import json
import logging
import os
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.manifest import ManifestRow
from ..data.records import read_records
from ..runtime.atomic_writes import write_text
from .items import Clip, Item
from .study import Study
from .votes import Rule, agreement, answers_to, gold_accuracy, vote


logger = logging.getLogger(__name__)

# The one question about a pair.
PREFERENCE = "preference"
# Columns of a score table that are read.
SCORE_FIELDS = {"id": ("id",), "reward": ("reward",)}


def read_scores(paths: Sequence[str | Path]) -> list[dict[str, float | None]]:
    """
    Rewards by clip id from tables of `score`, one dictionary for each; None where a clip could not be scored.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a table has no column `id` or `reward`, or a reward is not in [0, 1]; names file and row.
    """
    tables = []
    for path in map(Path, paths):
        rewards: dict[str, float | None] = {}
        for where, record in read_records(path, SCORE_FIELDS):
            if record.get("id") is None or "reward" not in record:
                raise ValueError(f"{where}: `id` or `reward` is missing; expected a table written by `hy-prfl score`.")
            value = record["reward"]
            try:
                rewards[str(record["id"])] = None if value is None else float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: `reward` must be a number, got {value!r}.") from error
            if value is not None and not 0 <= float(value) <= 1:
                raise ValueError(f"{where}: `reward` must be in [0, 1], got {value!r}.")
        tables.append(rewards)
    return tables


def uncertainty(item: Item, tables: Sequence[Mapping[str, float | None]]) -> float:
    """
    How uncertain the reward models are about an item. Minus infinity for items without a score.

    With one table, an item is more uncertain the nearer its reward is to 0.5 or, for a pair, the nearer the two rewards
    are to each other. With several tables it is the variance of the reward, or of the difference, over the tables.
    """
    values = []
    for table in tables:
        rewards = [table[clip.id] for clip in item.clips]
        if any(reward is None for reward in rewards):
            return float("-inf")
        numbers = [float(reward) for reward in rewards if reward is not None]
        values.append(numbers[0] - (numbers[1] if len(numbers) > 1 else 0.5))
    return -abs(values[0]) if len(values) == 1 else statistics.pvariance(values)


def order_items(
    items: Sequence[Item], order: str, *, seed: int, tables: Sequence[Mapping[str, float | None]] = ()
) -> list[Item]:
    """
    Items in the order in which they are judged.

    Args:
        order (`str`): `manifest` (as given), `random`, or `uncertain` (see `uncertainty`, most uncertain first).
        seed (`int`): Seed of `random`, and of ties of `uncertain`.

    Raises:
        ValueError: If a table lacks one of the clips.
    """
    items = list(items)
    if order != "manifest":
        random.Random(seed).shuffle(items)
    if order == "uncertain":
        ids = [clip.id for item in items for clip in item.clips]
        for number, table in enumerate(tables, 1):
            absent = [clip_id for clip_id in ids if clip_id not in table]
            if absent:
                raise ValueError(f"`scores`: table {number} lacks {len(absent)} clips, the first is {absent[0]!r}.")
        items.sort(key=lambda item: -uncertainty(item, tables))
        unknown = sum(uncertainty(item, tables) == float("-inf") for item in items)
        if unknown:
            logger.warning(f"`scores`: {unknown} clips or pairs have no reward and come last.")
    return items


def check_videos(rows: Sequence[ManifestRow]) -> None:
    """Raise a `ValueError` that names the first row whose video does not exist."""
    absent = [row for row in rows if row.video is None or not row.video.is_file()]
    if absent:
        row = absent[0]
        reason = row.missing.get(row.video, "the file is gone") if row.video else "it names no video"
        raise ValueError(f"{row.where}: {len(absent)} clips cannot be shown, this is the first: {reason}.")


def clip_items(rows: Sequence[ManifestRow]) -> list[Item]:
    """One item for each clip of a manifest."""
    return [Item(id=row.id, clips=(_clip(row),)) for row in rows]


def pair_items(rows: Sequence[ManifestRow]) -> list[Item]:
    """
    One item for each pair of a manifest: two clips of one `pair_id`. Clips without one are left out, and the log says so.

    Raises:
        ValueError: If there is no pair, or a `pair_id` does not have exactly two clips, or these have two captions.
    """
    by_pair: dict[str, list[ManifestRow]] = defaultdict(list)
    for row in rows:
        if row.pair_id is not None:
            by_pair[row.pair_id].append(row)
    if not by_pair:
        raise ValueError("no row of the manifest has a `pair_id`, so there is no pair to compare.")
    for pair_id, members in by_pair.items():
        if len(members) != 2:
            raise ValueError(f"{members[0].where}: `pair_id` {pair_id!r} has {len(members)} clips, expected 2.")
        one, other = members
        if one.prompt != other.prompt:
            raise ValueError(
                f"{other.where}: the caption of {other.id!r} is {other.prompt!r}, but that of {one.id!r}, of the same "
                f"`pair_id` {pair_id!r}, is {one.prompt!r}; a pair has one caption."
            )
    single = sum(row.pair_id is None for row in rows)
    if single:
        logger.warning(f"{single} clips of the manifest have no `pair_id` and are not shown.")
    return [Item(id=pair_id, clips=(_clip(one), _clip(other))) for pair_id, (one, other) in by_pair.items()]


def clip_rows(
    study: Study,
    rows: Sequence[ManifestRow],
    folder: Path,
    *,
    rule: Rule,
    min_votes: int,
    annotators: Sequence[str],
) -> list[dict[str, Any]]:
    """
    Rows of a labelled manifest: the fields of the manifest, with the labels that people gave.

    A task that was asked is null if it has too few answers or no majority, even if the manifest has a label. Labels of
    other tasks stay. Gold clips get their right answers.

    Args:
        folder (`Path`): Where the rows will be written; paths are relative to it.
    """
    answers = {task: answers_to(study.labels, task, annotators) for task in study.questions}
    result = []
    for row in rows:
        record = _record(row, folder)
        for task in study.questions:
            given = list(answers[task].get(row.id, {}).values())
            known = study.items[row.id].gold.get(task)
            winner = known if known is not None else vote(given, rule, min_votes)
            record[task] = None if winner is None else int(winner == "good")
        result.append(record)
    return result


def pair_rows(
    study: Study,
    rows: Sequence[ManifestRow],
    folder: Path,
    *,
    rule: Rule,
    min_votes: int,
    annotators: Sequence[str],
) -> list[dict[str, Any]]:
    """
    Like `clip_rows`, for pairs: the better clip gets the other's id as `rejected_id`.

    After a tie, or without a majority, neither gets one. Gold pairs get their right answers. Clips outside of all pairs
    keep the manifest's `rejected_id`.
    """
    answers = answers_to(study.labels, PREFERENCE, annotators)
    loser: dict[str, str] = {}
    for item in study.items.values():
        first, second = item.clips
        winner = item.gold.get(PREFERENCE) or vote(list(answers.get(item.id, {}).values()), rule, min_votes)
        if winner in ("first", "second"):
            won, lost = (first, second) if winner == "first" else (second, first)
            loser[won.id] = lost.id
    asked = {clip.id for item in study.items.values() for clip in item.clips}
    result = []
    for row in rows:
        record = _record(row, folder)
        if row.id in asked:
            record.pop("rejected_id", None)
        if row.id in loser:
            record["rejected_id"] = loser[row.id]
        result.append(record)
    return result


def summarize(study: Study, *, rule: Rule, min_votes: int, annotators: Sequence[str]) -> dict[str, Any]:
    """Numbers on people and questions: answers, pace, accuracy on gold, votes, agreement."""
    gold = {item.id: item.gold for item in study.items.values() if item.gold}
    accuracy = gold_accuracy(study.labels, gold)
    people = {}
    for name in sorted({name for name, _ in study.given}):
        mine = [event for (annotator, _), event in study.given.items() if annotator == name]
        seconds = [event["seconds"] for event in mine if event.get("seconds") is not None]
        people[name] = {
            "labels": sum(event["type"] == "label" for event in mine),
            "skipped": sum(event["type"] == "skip" for event in mine),
            "median_seconds": statistics.median(seconds) if seconds else None,
            "gold": accuracy.get(name),
            "counts": name in annotators,
        }
    questions = {}
    for question in study.questions:
        answers = {
            item: given
            for item, given in answers_to(study.labels, question, annotators).items()
            if question not in gold.get(item, {})
        }
        votes = Counter(vote(list(given.values()), rule, min_votes) for given in answers.values())
        undecided = votes.pop(None, 0)
        questions[question] = {"votes": dict(sorted(votes.items())), "undecided": undecided} | {
            "agreement": agreement(answers)
        }
    return {"kind": study.kind, "rule": rule, "min_votes": min_votes, "annotators": people, "questions": questions}


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _clip(row: ManifestRow) -> Clip:
    assert row.video is not None
    return Clip(id=row.id, video=row.video, caption=row.prompt)


def _record(row: ManifestRow, folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"id": row.id}
    for name in ("video", "image", "last_image"):
        path = getattr(row, name)
        if path is not None:
            record[name] = os.path.relpath(path, folder)
    if row.prompt:
        record["caption"] = row.prompt
    for name in ("long_prompt", "pair_id", "rejected_id"):
        if getattr(row, name) is not None:
            record["long_caption" if name == "long_prompt" else name] = getattr(row, name)
    return record | {name: value for name, value in row.labels.items() if value is not None}
