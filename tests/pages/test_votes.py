"""Votes and agreement against numbers that were computed by hand, or are in the literature."""

import pytest

from hy_prfl.pages.votes import agreement, answers_to, gold_accuracy, vote


@pytest.mark.parametrize(
    ("answers", "rule", "min_votes", "expected"),
    [
        (["good"], "majority", 1, "good"),
        (["good", "poor"], "majority", 1, None),
        (["good", "poor", "good"], "majority", 1, "good"),
        (["good", "poor", "good"], "unanimous", 1, None),
        (["poor", "poor"], "unanimous", 2, "poor"),
        (["poor", "poor"], "majority", 3, None),
        (["first", "second", "tie", "first", "second"], "majority", 1, None),
        ([], "majority", 1, None),
    ],
)
def test_vote(answers: list[str], rule: str, min_votes: int, expected: str | None) -> None:
    assert vote(answers, rule, min_votes) == expected


def test_unsure_is_no_answer() -> None:
    labels = [
        {"item": "x", "annotator": name, "answers": {"q": choice}}
        for name, choice in (("ann", "good"), ("bob", "unsure"), ("cem", "poor"))
    ]
    assert answers_to(labels, "q", ["ann", "bob"]) == {"x": {"ann": "good"}}


def test_kappa_of_two() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed .7, expected .5, kappa .4 (the example of Cohen's kappa).
    cells = [("good", "good")] * 20 + [("good", "poor")] * 5 + [("poor", "good")] * 10 + [("poor", "poor")] * 15
    found = agreement({str(index): {"ann": one, "bob": other} for index, (one, other) in enumerate(cells)})
    assert found["num_items"] == 50
    assert found["percent"] == pytest.approx(0.7)
    assert found["cohen_kappa"] == pytest.approx(0.4)
    # Fleiss' chance agreement is that of the pooled shares: 55 good, 45 poor of 100.
    chance = 0.55**2 + 0.45**2
    assert found["fleiss_kappa"] == pytest.approx((0.7 - chance) / (1 - chance))


def test_kappa_of_fleiss_1971() -> None:
    """The ten subjects and fourteen raters of the usual example: kappa .210."""
    counts = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    answers = {}
    for subject, row in enumerate(counts):
        votes = [str(category) for category, count in enumerate(row) for _ in range(count)]
        answers[str(subject)] = {f"rater {index}": category for index, category in enumerate(votes)}
    found = agreement(answers)
    assert found["fleiss_kappa"] == pytest.approx(0.210, abs=5e-4)
    assert (found["fleiss_num_items"], found["fleiss_num_answers"]) == (10, 14)


def test_nothing_is_said_where_nothing_can_be() -> None:
    nothing = agreement({"x": {"ann": "good"}})
    assert nothing["num_items"] == 0
    assert nothing["percent"] is nothing["cohen_kappa"] is nothing["fleiss_kappa"] is None
    constant = agreement({name: {"ann": "good", "bob": "good"} for name in "xyz"})
    assert constant["percent"] == 1
    assert constant["cohen_kappa"] is constant["fleiss_kappa"] is None


def test_gold_accuracy() -> None:
    gold = {"x": {"q": "good"}, "y": {"q": "poor", "r": "poor"}}
    labels = [
        {"item": "x", "annotator": "ann", "answers": {"q": "good", "r": "poor"}},
        {"item": "y", "annotator": "ann", "answers": {"q": "unsure", "r": "poor"}},
        {"item": "z", "annotator": "bob", "answers": {"q": "good", "r": "good"}},
    ]
    assert gold_accuracy(labels, gold) == {"ann": {"num_answers": 3, "accuracy": pytest.approx(2 / 3)}}
