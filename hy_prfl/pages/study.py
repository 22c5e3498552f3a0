"""A study: its items, who judges them, and the answers so far. Only the journal is kept when the process ends."""

import copy
import hashlib
import hmac
import json
import logging
import os
import secrets
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..data.hashes import hash_file, hash_text
from .items import CLIP_CHOICES, PAIR_CHOICES, Clip, ConflictError, Item, Kind, StudyError, parse_time
from .journal import FORMAT, Journal
from .journal_checks import check_event, check_head, describe_change
from .reservations import Lease, Reservations


logger = logging.getLogger(__name__)

# A longer time between two answers is a break, and does not count for the pace.
BREAK_SECONDS = 300.0


class Study:
    """
    Hands out items and takes answers.

    Each item goes to `labels_per_item` people. The items that a window shows or has loaded in advance are reserved for
    it, so people who work at the same time do not answer an item more often than requested. Late answers are kept too.
    Gold items are mixed in at random, and everybody sees each of them once.

    Args:
        journal (`Journal`):
            An open journal. If it is empty, a head with the questions is written.
        items (`Sequence[Item]`):
            Items in the order in which they are judged.
        kind (`str`):
            `clips` or `pairs`.
        questions (`Sequence[str]`):
            Names of the questions about each item.
        labels_per_item (`int`, *optional*):
            Number of people who judge each item. Everybody if None.
        gold_share (`float`, defaults to 0):
            Share of the items shown that are gold, as long as there are any that the person has not seen.
        inputs (`Mapping[str, str]`, *optional*):
            Files or folders of the items, by the name of the option. They are stored in the journal's head, for messages.
            A journal without judgements gets a new head if they differ.

    Raises:
        ValueError: If a line of the journal is broken, or if the journal belongs to another study: another kind, other
            questions, unknown items, or judgements of other videos or captions under the same ids.
    """

    def __init__(
        self,
        journal: Journal,
        items: Sequence[Item],
        *,
        kind: Kind,
        questions: Sequence[str],
        labels_per_item: int | None,
        gold_share: float = 0.0,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        self.journal = journal
        self.kind: Kind = kind
        self.questions = list(questions)
        self.labels_per_item = labels_per_item
        self.gold_share = gold_share
        self.items = {item.id: item for item in items}
        self.inputs = inputs = dict(inputs or {})
        if journal.events:
            check_head(journal, kind=kind, questions=self.questions)
        if len(journal.events) == 1 and journal.events[0].get("inputs", {}) != inputs:
            journal.clear()
        if not journal.events:
            head = {"type": "study", "format": FORMAT, "kind": kind, "questions": self.questions, "inputs": inputs}
            journal.append({**head, "secret": secrets.token_hex(16), "time": _now()})
        self._secret = bytes.fromhex(journal.events[0]["secret"])
        # By annotator and item: the label or skip that counts.
        self.given: dict[tuple[str, str], dict[str, Any]] = {}
        self._history: dict[str, list[str]] = defaultdict(list)
        self._num_labels: Counter[str] = Counter()
        self._reservations = Reservations()
        # By item: sizes and times of its files when they were hashed, and the digest.
        self._contents: dict[str, tuple[list[tuple[int, int]], str]] = {}
        change = describe_change(journal, inputs)
        for number, event in enumerate(journal.events[1:], 2):
            check_event(
                event,
                f"{journal.path}, line {number}",
                kind=kind,
                questions=self.questions,
                items=self.items,
                given=self.given,
                change=change,
            )
            self._apply(event)
        self._check_contents()
        self._public = {self.public_id(item.id): item.id for item in items}
        self._media = {self.media_id(clip): clip for item in items for clip in item.clips}

    @property
    def choices(self) -> tuple[str, ...]:
        """The possible answers to a question, as the page shows them."""
        return CLIP_CHOICES if self.kind == "clips" else PAIR_CHOICES

    @property
    def labels(self) -> list[dict[str, Any]]:
        """The labels that count, oldest first: `item`, `annotator`, `answers`, `seconds`, `time`."""
        return [event for event in self.given.values() if event["type"] == "label"]

    def snapshot(self) -> "Study":
        """A copy that does not change any more, for another thread to count and write. It takes no answers."""
        frozen = copy.copy(self)
        frozen.given = dict(self.given)
        return frozen

    def content(self, item_id: str) -> str:
        """
        Digest of what is judged: the videos' contents and the caption. It is kept with each judgement.

        Raises:
            OSError: If a video cannot be read.
        """
        clips = self.items[item_id].clips
        state = [(stat.st_size, stat.st_mtime_ns) for stat in (os.stat(clip.video) for clip in clips)]
        known = self._contents.get(item_id)
        if known is None or known[0] != state:
            digest = hash_text(json.dumps([[hash_file(clip.video), clip.caption] for clip in clips]))
            known = self._contents[item_id] = (state, digest)
        return known[1]

    def public_id(self, item_id: str) -> str:
        """Name of an item for the browser. It does not reveal the model."""
        return self._digest("item", item_id)[:24]

    def media_id(self, clip: Clip) -> str:
        """Name of a clip's file for the browser, see `public_id`."""
        return self._digest("clip", clip.id, str(clip.video))[:24]

    def video(self, media_id: str) -> Path:
        """
        The file for a name from `media_id`. Files outside of the study cannot be requested.

        Raises:
            StudyError: If no clip has this name.
        """
        if media_id not in self._media:
            raise StudyError("there is no such clip.")
        return self._media[media_id].video

    def is_swapped(self, annotator: str, item_id: str) -> bool:
        """Whether this person sees the second clip of a pair on the left: random over pairs, but fixed for each."""
        return self.kind == "pairs" and self._draw("side", annotator, item_id) < 0.5

    def shown_clips(self, annotator: str, item: Item) -> list[Clip]:
        """Clips of an item from left to right."""
        return list(reversed(item.clips)) if self.is_swapped(annotator, item.id) else list(item.clips)

    def next_items(self, annotator: str, window: str, count: int = 3) -> list[Item]:
        """
        Reserve the item that a window shows now and those that it loads in advance. Empty if this person is done.

        Args:
            annotator (`str`): Name of the person.
            window (`str`): Name of the browser window. It gets the same items again until they are answered.
            count (`int`, defaults to 3): Items to reserve.
        """
        lease = self._reservations.renew(annotator, window)
        lease.items = [item for item in lease.items if (annotator, item) not in self.given]
        while len(lease.items) < count:
            item_id = self._find_item(annotator, len(lease.items))
            if item_id is None:
                break
            lease.items.append(item_id)
        if not lease.items:
            self._take_over(annotator, lease)
        return [self.items[item_id] for item_id in lease.items]

    def label(
        self, annotator: str, public_id: str, answers: Mapping[str, str], *, key: str, seconds: float | None = None
    ) -> None:
        """
        Write a label to the disk. A repeated request, recognised by its key, changes nothing.

        Args:
            answers (`Mapping[str, str]`): A choice for each question.
            key (`str`): Name of the request. A browser that got no reply sends it again.
            seconds (`float`, *optional*): How long the item was looked at.

        Raises:
            StudyError: If there is no such item, its video cannot be read, or an answer is missing or unknown.
            ConflictError: If this person has judged the item already.
            OSError: If the disk did not take it; nothing has changed then.
        """
        item_id = self._item_id(public_id)
        if set(answers) != set(self.questions):
            raise StudyError(f"expected an answer to each of {', '.join(self.questions)}, got {sorted(answers)}.")
        for question, answer in answers.items():
            if answer not in self.choices:
                raise StudyError(f"`{question}` must be one of {', '.join(self.choices)}, got {answer!r}.")
        meant = {question: self._meaning(annotator, item_id, answers[question]) for question in self.questions}
        event = {"type": "label", "item": item_id, "annotator": annotator, "answers": meant, "seconds": seconds}
        self._record(event | {"content": self._content_now(item_id), "key": key, "time": _now()})

    def skip(self, annotator: str, public_id: str, *, key: str) -> None:
        """Note that this person does not want to judge an item; it goes to others. Raises as `label`."""
        item_id = self._item_id(public_id)
        event = {"type": "skip", "item": item_id, "annotator": annotator, "content": self._content_now(item_id)}
        self._record(event | {"key": key, "time": _now()})

    def undo(self, annotator: str, window: str, public_id: str, *, key: str) -> None:
        """
        Take back this person's last label or skip, and show that item again in this window.

        Raises:
            ConflictError: If `public_id` is not the last one (any more).
        """
        item_id = self._item_id(public_id)
        last = self.last_item(annotator)
        if last != public_id:
            undone = [event for event in self.journal.events if event.get("key") == key and event["type"] == "undo"]
            if undone:
                return
            raise ConflictError("this is not your last answer; another window may have changed it.")
        event = {"type": "undo", "item": item_id, "annotator": annotator, "key": key, "time": _now()}
        self.journal.append(event)
        self._apply(event)
        self._reservations.show_first(annotator, window, item_id)

    def last_item(self, annotator: str) -> str | None:
        """Public id of the item whose answer `undo` would remove; None if there is none."""
        history = self._history[annotator]
        return self.public_id(history[-1]) if history else None

    def progress(self, annotator: str) -> dict[str, Any]:
        """
        Progress of this person and of all people together.

        `labelled`, `skipped` and `left` count items of this person. `done` and `total` count those of all people, without
        gold. `per_hour` is the pace of the last answers without breaks, and `seconds_left` the remaining time at this
        pace; both are None after too few answers.
        """
        mine = [event for (name, _), event in self.given.items() if name == annotator]
        regular = [item.id for item in self.items.values() if not item.gold]
        left = sum((annotator, item_id) not in self.given and not self._is_full(item_id) for item_id in regular)
        wanted = self.labels_per_item or 1
        times = [parse_time(event["time"]).timestamp() for event in mine if event["type"] == "label"]
        gaps = [late - early for early, late in pairwise(times[-51:])]
        gaps = [gap for gap in gaps if 0 <= gap < BREAK_SECONDS]
        seconds = statistics.median(gaps) if len(gaps) >= 3 else None
        return {
            "labelled": sum(event["type"] == "label" for event in mine),
            "skipped": sum(event["type"] == "skip" for event in mine),
            "left": left,
            "done": sum(self._num_labels[item_id] >= wanted for item_id in regular),
            "total": len(regular),
            "per_hour": None if not seconds else 3600 / seconds,
            "seconds_left": None if seconds is None else left * seconds,
        }

    def import_label(self, annotator: str, item_id: str, answers: Mapping[str, str], *, time: str | None) -> bool:
        """Import a label, in the journal's terms. Returns False if this person has judged the item already."""
        if (annotator, item_id) in self.given:
            return False
        event: dict[str, Any] = {"type": "label", "item": item_id, "annotator": annotator, "answers": dict(answers)}
        event |= {"seconds": None, "content": self.content(item_id)}
        event |= {"key": f"import-{secrets.token_hex(8)}", "time": time or _now()}
        self.journal.append(event)
        self._apply(event)
        return True

    def _check_contents(self) -> None:
        """Raise a `ValueError` if the video or the caption of a judgement is not that of the input any more."""
        unknown = 0
        for event in self.given.values():
            if event.get("content") is None:
                unknown += 1
            elif event["content"] != self.content(event["item"]):
                raise ValueError(
                    f"{self.journal.path}: {event['item']!r} was judged with another video or caption. "
                    f"{describe_change(self.journal, self.inputs)}"
                )
        if unknown:
            logger.warning(
                f"{self.journal.path}: {unknown} judgements of an older version do not record their videos. They are "
                "assumed to be of the videos in the input."
            )

    def _content_now(self, item_id: str) -> str:
        try:
            return self.content(item_id)
        except OSError as error:
            raise StudyError(f"a video of this clip or pair cannot be read: {error.strerror}.") from error

    def _record(self, event: dict[str, Any]) -> None:
        found = self.given.get((event["annotator"], event["item"]))
        if found is not None and found["key"] == event["key"]:
            return
        if found is not None:
            raise ConflictError("you have judged this one already, perhaps in another window.")
        self.journal.append(event)
        self._apply(event)

    def _apply(self, event: Mapping[str, Any]) -> None:
        """Update the counts with an event that has been written."""
        key = (event["annotator"], event["item"])
        if event["type"] == "undo":
            self._num_labels[key[1]] -= self.given.pop(key)["type"] == "label"
            self._history[key[0]].remove(key[1])
        else:
            self.given[key] = dict(event)
            self._num_labels[key[1]] += event["type"] == "label"
            self._history[key[0]].append(key[1])

    def _find_item(self, annotator: str, ahead: int) -> str | None:
        """The next free item for this person, `ahead` items after the one that is shown."""
        own = self._reservations.items_of(annotator)
        number = sum(name == annotator for name, _ in self.given) + ahead
        regular = [item for item in self.items.values() if not item.gold]
        free = (
            item.id
            for item in regular
            if (annotator, item.id) not in self.given
            and item.id not in own
            and not self._is_full(item.id, self._reservations.num_others(annotator, item.id))
        )
        found = next(free, None)
        if found is not None and self._draw("gold", annotator, str(number)) < self.gold_share:
            gold = [item for item in self.items.values() if item.gold and item.id not in own]
            unseen = [item.id for item in gold if (annotator, item.id) not in self.given]
            if unseen:
                return min(unseen, key=lambda item_id: self._draw("order", annotator, item_id))
        return found

    def _take_over(self, annotator: str, lease: Lease) -> None:
        """If no item is free, take one that another window has loaded in advance and does not show yet."""
        for name, other, item_id in self._reservations.loaded_ahead(lease):
            is_mine = (annotator, item_id) in self.given or self.items[item_id].gold
            if not is_mine and (name == annotator or not self._is_full(item_id)):
                other.items.remove(item_id)
                lease.items.append(item_id)
                return

    def _is_full(self, item_id: str, num_reserved: int = 0) -> bool:
        limit = self.labels_per_item
        return limit is not None and self._num_labels[item_id] + num_reserved >= limit

    def _item_id(self, public_id: str) -> str:
        if public_id not in self._public:
            raise StudyError("there is no such clip or pair in this study.")
        return self._public[public_id]

    def _meaning(self, annotator: str, item_id: str, answer: str) -> str:
        if self.kind == "clips" or answer == "tie":
            return answer
        return "second" if (answer == "left") == self.is_swapped(annotator, item_id) else "first"

    def _digest(self, *words: str) -> str:
        return hmac.new(self._secret, "\0".join(words).encode(), hashlib.sha256).hexdigest()

    def _draw(self, *words: str) -> float:
        """A number in [0, 1) that depends only on the study and these words."""
        return int(self._digest(*words)[:13], 16) / 16**13


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
