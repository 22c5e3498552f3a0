"""Who is shown what, and what a journal says afterwards."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import hy_prfl.pages.reservations as reservations
import hy_prfl.pages.study as study_module
from hy_prfl.pages.items import ConflictError, StudyError
from hy_prfl.pages.study import Study


def answer(
    study: Study, annotator: str, choice: str = "good", window: str = "w", key: str | None = None
) -> str | None:
    """Answer what a window shows; returns the item's id, None if there is nothing left."""
    items = study.next_items(annotator, window)
    if not items:
        return None
    answers = dict.fromkeys(study.questions, choice)
    study.label(annotator, study.public_id(items[0].id), answers, key=key or f"{annotator}-{items[0].id}", seconds=1.5)
    return items[0].id


def test_every_clip_goes_to_so_many_people(open_study: Callable[..., Study]) -> None:
    study = open_study(6, labels_per_item=2)
    people = ["ann", "bob", "cem"]
    shown = Counter()
    while any(item := [answer(study, person) for person in people]):
        shown.update((person, item_id) for person, item_id in zip(people, item, strict=True) if item_id)
    assert set(shown.values()) == {1}
    assert Counter(item for _, item in shown) == dict.fromkeys(study.items, 2)
    # All three worked to the end, or nearly so.
    assert min(Counter(person for person, _ in shown).values()) >= 3


def test_two_windows_of_one_person_show_different_clips(open_study: Callable[..., Study]) -> None:
    study = open_study(6)
    windows = [study.next_items("ann", "one"), study.next_items("ann", "two")]
    assert not {item.id for item in windows[0]} & {item.id for item in windows[1]}
    # The same window, loaded again, shows the same.
    assert study.next_items("ann", "one") == windows[0]


def test_what_is_only_loaded_ahead_is_taken_over(open_study: Callable[..., Study]) -> None:
    study = open_study(2)
    assert len(study.next_items("ann", "a")) == 2
    assert [item.id for item in study.next_items("bob", "b")] == [list(study.items)[1]]
    assert len(study.next_items("ann", "a")) == 1
    assert not study.next_items("cem", "c")


def test_reservations_end(open_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "LEASE_SECONDS", 0.0)
    study = open_study(1)
    one = study.next_items("ann", "a")
    assert study.next_items("bob", "b") == one
    # Both labels are kept.
    assert answer(study, "bob", window="b")
    study.label("ann", study.public_id(one[0].id), {"physics_quality": "poor"}, key="k")
    assert len(study.labels) == 2


def test_the_journal_brings_everything_back(open_study: Callable[..., Study]) -> None:
    study = open_study(6, labels_per_item=2)
    for choice in ("good", "poor", "unsure"):
        answer(study, "ann", choice)
    study.skip("ann", study.public_id(study.next_items("ann", "w")[0].id), key="s")
    answer(study, "bob")
    labels, given, public = study.labels, dict(study.given), study.public_id("x")
    again = open_study(6, labels_per_item=2)
    assert again.labels == labels
    assert again.given == given
    assert again.public_id("x") == public
    assert again.progress("ann") | {"per_hour": 0} == study.progress("ann") | {"per_hour": 0}
    assert again.last_item("ann") == study.last_item("ann")


def test_a_request_that_comes_twice_counts_once(open_study: Callable[..., Study]) -> None:
    study = open_study(3)
    item = study.public_id(study.next_items("ann", "w")[0].id)
    for _ in range(2):
        study.label("ann", item, {"physics_quality": "good"}, key="k")
    assert len(study.journal.events) == 2
    with pytest.raises(ConflictError, match="judged this one already"):
        study.label("ann", item, {"physics_quality": "poor"}, key="other")
    for _ in range(2):
        study.undo("ann", "w", item, key="u")
    assert len(study.journal.events) == 3
    assert not study.labels
    assert study.public_id(study.next_items("ann", "w")[0].id) == item


def test_undo_takes_back_the_last_answer_only(open_study: Callable[..., Study]) -> None:
    study = open_study(3)
    first, second = (answer(study, "ann") for _ in range(2))
    with pytest.raises(ConflictError, match="not your last answer"):
        study.undo("ann", "w", study.public_id(str(first)), key="u")
    study.undo("ann", "w", study.public_id(str(second)), key="v")
    study.undo("ann", "w", study.public_id(str(first)), key="w")
    assert study.last_item("ann") is None
    assert [item.id for item in study.next_items("ann", "w")][:2] == [first, second]
    assert answer(study, "ann", "poor", key="again") == first
    assert [label["answers"] for label in study.labels] == [{"physics_quality": "poor"}]


def test_a_skipped_clip_goes_to_others(open_study: Callable[..., Study]) -> None:
    study = open_study(1)
    study.skip("ann", study.public_id(list(study.items)[0]), key="s")
    assert not study.next_items("ann", "w")
    assert answer(study, "bob")
    assert study.progress("ann")["skipped"] == 1


def test_gold_clips_are_shown_to_everybody_once(open_study: Callable[..., Study], manifest: Any) -> None:
    ids = [row["id"] for row in json.loads(manifest.read_text())]
    gold = {clip_id: {"physics_quality": "good"} for clip_id in ids[:4]}
    study = open_study(24, gold=gold, gold_share=0.4)
    seen: dict[str, list[str]] = {"ann": [], "bob": []}
    while any(found := [(person, answer(study, person)) for person in seen]):
        for person, item in found:
            if item is None:
                break
            seen[person].append(item)
        if all(item is None for _, item in found):
            break
    regular = [item for items in seen.values() for item in items if item not in gold]
    assert sorted(regular) == sorted(ids[4:])
    for items in seen.values():
        assert len(items) == len(set(items))
        assert 1 <= len(set(items) & set(gold)) <= 4


def test_sides_are_random_and_answers_know_them(open_study: Callable[..., Study]) -> None:
    study = open_study(12, kind="pairs", labels_per_item=None)
    sides = {(person, item): study.is_swapped(person, item) for person in ("ann", "bob") for item in study.items}
    assert 4 < sum(sides.values()) < 20
    assert any(sides["ann", item] != sides["bob", item] for item in study.items)
    for person in ("ann", "bob"):
        for item in study.items.values():
            # Always for model a, wherever it stands.
            left = study.shown_clips(person, item)[0].id.startswith("model_a")
            answers = {"preference": "left" if left else "right"}
            study.label(person, study.public_id(item.id), answers, key=f"{person}{item.id}")
    assert {label["answers"]["preference"] for label in study.labels} == {"first"}


def test_progress_has_a_pace(open_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(10)
    clock = iter(f"2026-01-01T{hour}:{minute:02d}:00.000+00:00" for hour in ("10", "12") for minute in range(3))
    monkeypatch.setattr(study_module, "_now", lambda: next(clock))
    for _ in range(6):
        answer(study, "ann")
    progress = study.progress("ann")
    # A break of two hours says nothing.
    assert progress["per_hour"] == 60
    assert progress["seconds_left"] == 240
    assert (progress["labelled"], progress["left"], progress["done"], progress["total"]) == (6, 4, 6, 10)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({}, "expected an answer to each of physics_quality"),
        ({"physics_quality": "great"}, "must be one of good, poor"),
    ],
)
def test_answers_must_fit(open_study: Callable[..., Study], answers: dict[str, str], words: str) -> None:
    study = open_study(1)
    item = study.public_id(list(study.items)[0])
    with pytest.raises(StudyError, match=words):
        study.label("ann", item, answers, key="k")
    with pytest.raises(StudyError, match="no such clip"):
        study.label("ann", list(study.items)[0], {"physics_quality": "good"}, key="k")
    assert len(study.journal.events) == 1


def test_a_journal_of_another_study_is_refused(open_study: Callable[..., Study]) -> None:
    study = open_study(6)
    for _ in range(4):
        answer(study, "ann")
    with pytest.raises(ValueError, match="its `questions` is \\['physics_quality'\\], not \\['blur'\\]"):
        open_study(6, questions=["blur"])
    with pytest.raises(ValueError, match="line 3: there is no clip or pair 'model_b_01' in the input"):
        open_study(1)
    # More clips than before are fine.
    assert len(open_study(8).labels) == 4


@pytest.mark.parametrize(
    ("line", "change", "words"),
    [
        (1, {"kind": None}, "its `kind` is None, not 'clips'"),
        (1, {"questions": None}, "its `questions` is None"),
        (1, {"secret": None}, "line 1: `secret` is missing or broken"),
        (1, {"secret": "xy"}, "line 1: `secret` is missing or broken"),
        (1, {"inputs": 3}, "line 1: `inputs` must be an object"),
        (1, {"format": 7}, "line 1: this is not a journal of labels"),
        (2, {"type": "vote"}, "line 2: `type` must be label, skip or undo, got 'vote'"),
        (2, {"type": []}, "line 2: `type` must be label, skip or undo"),
        (2, {"annotator": None}, "line 2: `annotator` must be text, got None"),
        (2, {"annotator": "\ud800"}, "line 2: `annotator` must be text"),
        (2, {"item": ["x"]}, "line 2: `item` must be text"),
        (2, {"time": "yesterday"}, "line 2: `time` 'yesterday' is not a time in ISO 8601"),
        (2, {"time": None}, "line 2: `time` must be text, got None"),
        (2, {"answers": None}, "line 2: `answers` must have one of good, poor, unsure for each of physics_quality"),
        (2, {"answers": {"physics_quality": "great"}}, "line 2: `answers` must have"),
        (2, {"answers": {"physics_quality": ["good"]}}, "line 2: `answers` must have"),
        (2, {"seconds": "long"}, "line 2: `seconds` must be a number"),
        (2, {"type": "undo"}, "line 2: 'ann' has not judged this, so there is nothing to undo"),
        (2, {"content": "00"}, "was judged with another video or caption"),
    ],
)
def test_broken_journals(open_study: Callable[..., Study], line: int, change: dict[str, Any], words: str) -> None:
    """One line that says where, at the start and not at the first request."""
    study = open_study(2)
    answer(study, "ann")
    path = study.journal.path
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[line - 1] = {name: value for name, value in (lines[line - 1] | change).items() if value is not None}
    path.write_text("".join(json.dumps(event) + "\n" for event in lines))
    with pytest.raises(ValueError, match=words) as error:
        open_study(2)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
