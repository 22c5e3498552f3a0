"""Two folders of `generate` as pairs to compare, and what people said of them as numbers."""

import logging
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap
from statsmodels.stats.proportion import proportion_confint

from ..data.manifest import ManifestRow, read_manifest
from ..inference.video_files import MANIFEST, VideoSettings, read_record
from .annotation import check_videos
from .items import Clip, Item
from .study import Study
from .votes import agreement, answers_to, vote


logger = logging.getLogger(__name__)

CONFIDENCE = 0.95
# Names of the outcomes by what the journal says; the first clip of an item is from the left folder.
OUTCOMES = {"first": "left", "tie": "tie", "second": "right"}
# What `generate` adds to the id of a prompt to name a video.
SEED = re.compile(r"_seed_\d+$")
SCORES = {"left": 0.0, "tie": 0.5, "right": 1.0}


def read_pairs(left: str | Path, right: str | Path) -> list[Item]:
    """
    One item for each video that both folders have; the first clip is the left one.

    Videos have one `prompt` if caption and images, as `generate` keeps them in the file, are the same. It is named by the
    id of its first video without `_seed_<seed>`.

    Raises:
        FileNotFoundError: If a folder has no `manifest.json`.
        ValueError: If the folders are one, a video is in one of them only, or its caption differs.
    """
    folders = [Path(left), Path(right)]
    if folders[0].resolve() == folders[1].resolve():
        raise ValueError(f"`left` and `right` are the same folder, '{left}'.")
    manifests = []
    for folder in folders:
        rows = read_manifest(folder / MANIFEST)
        check_videos(rows)
        manifests.append({row.id: row for row in rows})
    for one, other in ((0, 1), (1, 0)):
        single = [row_id for row_id in manifests[one] if row_id not in manifests[other]]
        if single:
            raise ValueError(
                f"{len(single)} videos of '{folders[one]}' are not in '{folders[other]}', the first is {single[0]!r}. "
                "Both must be made from the same prompts and seeds."
            )
    items, records = [], []
    prompts: dict[tuple[Any, ...], str] = {}
    for row_id, row in manifests[0].items():
        other_row = manifests[1][row_id]
        if row.prompt != other_row.prompt:
            raise ValueError(
                f"{other_row.where}: the caption of {row_id!r} is {other_row.prompt!r}, but {row.prompt!r} in {row.where}."
            )
        clips = (_clip(row), _clip(other_row))
        records.append([read_record(clip.video) for clip in clips])
        name = SEED.sub("", row_id)
        # Without a caption and images in the file, only the name tells prompts apart.
        images = tuple(records[-1][0].get(image) for image in ("image", "last_image"))
        source = (row.prompt, *images) if row.prompt or any(images) else (name,)
        if source not in prompts:
            prompts[source] = row_id if name in prompts.values() else name
        items.append(Item(id=row_id, clips=clips, prompt=prompts[source]))
    _warn_of_settings(records)
    return items


def compare(study: Study, left: str, right: str) -> dict[str, Any]:
    """
    Wins, ties and losses, for each question and in it for each prompt and person.

    `votes` has for `left`, `tie` and `right` the number of votes, their share and its 95 % Wilson interval, which takes
    votes as independent. They are not: people see the same prompts. `score` is the mean over prompts of 1 for a vote for
    the right folder, 0.5 for a tie and 0 for the left one; its interval is from a bootstrap over prompts, None where all
    prompts have the same mean or there are fewer than two. `prompts` counts prompts by their majority, and `p_value` is that
    of the sign test over those that have a winner. Votes on all videos of a prompt, which differ in their seed, count
    together; `agreement` is on videos.

    Args:
        left, right (`str`): Names of the folders, for the result.
    """
    people = sorted({label["annotator"] for label in study.labels})
    return {
        "left": left,
        "right": right,
        "num_prompts": len({_prompt(item) for item in study.items.values()}),
        "num_videos": len(study.items),
        "num_annotators": len(people),
        "confidence": CONFIDENCE,
        "questions": {question: _one_question(study, question, people) for question in study.questions},
    }


def _one_question(study: Study, question: str, people: Sequence[str]) -> dict[str, Any]:
    answers = answers_to(study.labels, question, people)
    by_prompt: dict[str, list[str]] = defaultdict(list)
    captions, num_videos = {}, Counter[str]()
    for item_id, given in answers.items():
        item = study.items[item_id]
        by_prompt[_prompt(item)] += [OUTCOMES[answer] for answer in given.values()]
        captions[_prompt(item)] = item.clips[0].caption
        num_videos[_prompt(item)] += 1
    by_person: dict[str, list[str]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    for label in study.labels:
        by_person[label["annotator"]].append(OUTCOMES[label["answers"][question]])
        if label.get("seconds") is not None:
            seconds[label["annotator"]].append(label["seconds"])
    everything = [outcome for outcomes in by_prompt.values() for outcome in outcomes]
    majority = {prompt: vote(outcomes) for prompt, outcomes in by_prompt.items()}
    winners = Counter(majority.values())
    decided = winners["left"] + winners["right"]
    return {
        "votes": _shares(everything),
        "score": _score([statistics.mean(SCORES[outcome] for outcome in outcomes) for outcomes in by_prompt.values()]),
        "prompts": {"left": winners["left"], "tie": winners["tie"] + winners[None], "right": winners["right"]},
        "p_value": float(binomtest(winners["right"], decided).pvalue) if decided else None,
        "agreement": agreement(answers),
        "per_prompt": [
            {
                "id": prompt,
                "caption": captions[prompt],
                "num_videos": num_videos[prompt],
                **_counts(outcomes),
                "majority": majority[prompt],
            }
            for prompt, outcomes in by_prompt.items()
        ],
        "per_annotator": {
            name: {
                **_counts(outcomes),
                "score": statistics.mean(SCORES[outcome] for outcome in outcomes),
                "median_seconds": statistics.median(seconds[name]) if seconds[name] else None,
            }
            for name, outcomes in by_person.items()
        },
    }


def _counts(outcomes: Sequence[str]) -> dict[str, int]:
    return {name: outcomes.count(name) for name in SCORES}


def _shares(outcomes: Sequence[str]) -> dict[str, dict[str, Any]]:
    shares: dict[str, dict[str, Any]] = {}
    for name, count in _counts(outcomes).items():
        if outcomes:
            low, high = proportion_confint(count, len(outcomes), 1 - CONFIDENCE, "wilson")
            shares[name] = {
                "count": count,
                "share": count / len(outcomes),
                "interval": [float(low), float(high)],
            }
        else:
            shares[name] = {"count": 0, "share": None, "interval": None}
    return shares


def _score(means: Sequence[float]) -> dict[str, Any]:
    if not means:
        return {"mean": None, "interval": None}
    interval = None
    if len(set(means)) > 1:
        found = bootstrap((np.array(means),), np.mean, confidence_level=CONFIDENCE, rng=np.random.default_rng(0))
        interval = [float(found.confidence_interval.low), float(found.confidence_interval.high)]
    return {"mean": statistics.mean(means), "interval": interval}


def _clip(row: ManifestRow) -> Clip:
    assert row.video is not None
    return Clip(id=row.id, video=row.video, caption=row.prompt)


def _prompt(item: Item) -> str:
    return item.id if item.prompt is None else item.prompt


def _warn_of_settings(records: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Log which settings, other than the model, the two videos of a pair differ in."""
    different: Counter[str] = Counter()
    names = [each.name for each in fields(VideoSettings)]
    for left, right in records:
        different.update(name for name in (*names, "seed") if left.get(name) != right.get(name))
    if different:
        listed = ", ".join(f"`{name}` ({count})" for name, count in different.items())
        logger.warning(f"videos of the same name were made with other settings (in so many pairs): {listed}.")
