"""Combines people's answers into one label for each clip, and measures their agreement."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa


Rule = Literal["majority", "unanimous"]
# By item, and in it by annotator.
Answers = Mapping[str, Mapping[str, str]]


def answers_to(
    labels: Iterable[Mapping[str, Any]], question: str, annotators: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Answers of these people to one question, by item and annotator; `unsure` is no answer."""
    kept = set(annotators)
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for label in labels:
        answer = label["answers"][question]
        if label["annotator"] in kept and answer != "unsure":
            answers[label["item"]][label["annotator"]] = answer
    return dict(answers)


def vote(answers: Sequence[str], rule: Rule = "majority", min_votes: int = 1) -> str | None:
    """
    The answer of most people, or None if there is none.

    Args:
        rule (`str`, defaults to `"majority"`):
            `majority` wants more votes than any other answer has, `unanimous` the same answer from all.
        min_votes (`int`, defaults to 1):
            Answers that must be there.
    """
    if len(answers) < max(1, min_votes):
        return None
    (winner, most), *others = Counter(answers).most_common()
    if others and (rule == "unanimous" or others[0][1] == most):
        return None
    return winner


def agreement(answers: Answers) -> dict[str, Any]:
    """
    Agreement of people on the items that several of them have judged.

    | key | value |
    |---|---|
    | `num_items` | items with two answers or more |
    | `percent` | mean share of pairs of answers to an item that are the same, in [0, 1] |
    | `cohen_kappa` | mean over all pairs of people with at least two items in common, each weighted by their number (Light 1971) |
    | `fleiss_kappa`, `fleiss_num_items`, `fleiss_num_answers` | over the items with the most usual number of answers, which \
is two or more |

    Values are None where they are undefined: no common items, or all answers are the same.
    """
    shared = {item: votes for item, votes in answers.items() if len(votes) > 1}
    same = [
        statistics.mean(one == other for one, other in combinations(votes.values(), 2)) for votes in shared.values()
    ]
    result: dict[str, Any] = {"num_items": len(shared), "percent": statistics.mean(same) if same else None}
    return result | {"cohen_kappa": _mean_cohen(shared)} | _fleiss(shared)


def _mean_cohen(shared: Answers) -> float | None:
    by_pair: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for votes in shared.values():
        for one, other in combinations(sorted(votes), 2):
            by_pair[one, other].append((votes[one], votes[other]))
    kappas, weights = [], []
    for pairs in by_pair.values():
        # Kappa is undefined if both people always gave the same single answer.
        if len(pairs) > 1 and len({answer for pair in pairs for answer in pair}) > 1:
            kappas.append(float(cohen_kappa_score(*zip(*pairs, strict=True))))
            weights.append(len(pairs))
    return float(np.average(kappas, weights=weights)) if kappas else None


def _fleiss(shared: Answers) -> dict[str, Any]:
    sizes = Counter(len(votes) for votes in shared.values())
    size = max(sizes, key=lambda size: (sizes[size], size)) if sizes else 0
    rows = [list(votes.values()) for votes in shared.values() if len(votes) == size]
    kappa = None
    if len({answer for row in rows for answer in row}) > 1:
        table, _ = aggregate_raters(np.array(rows))
        kappa = float(fleiss_kappa(table))
    return {
        "fleiss_kappa": None if kappa is None or math.isnan(kappa) else kappa,
        "fleiss_num_items": len(rows),
        "fleiss_num_answers": size,
    }


def gold_accuracy(labels: Iterable[Mapping[str, Any]], gold: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """
    Accuracy of each person on items with a known answer.

    Args:
        gold (`Mapping[str, Mapping[str, str]]`): Right answers by item and question.

    Returns:
        `dict`: by annotator `{"num_answers": ..., "accuracy": ...}`; `unsure` and `tie` count as wrong.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for label in labels:
        for question, answer in gold.get(label["item"], {}).items():
            right[label["annotator"]].append(label["answers"][question] == answer)
    return {name: {"num_answers": len(hits), "accuracy": statistics.mean(hits)} for name, hits in right.items()}
