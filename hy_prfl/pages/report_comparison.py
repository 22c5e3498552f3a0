"""A result of `compare` on a run's page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.records import parse_json, read_utf8
from .rendering import number, percent


def describe_comparison(path: str | Path) -> dict[str, Any]:
    """
    A result of `compare`, ready for the page.

    Raises:
        ValueError: If the file is no such result.
    """
    result = parse_json(read_utf8(Path(path)), str(path))
    if not isinstance(result, dict) or "questions" not in result:
        raise ValueError(f"{path}: not a result of `hy-prfl compare`: there is no `questions`.")
    try:
        return _described(result)
    except KeyError as error:
        raise ValueError(f"{path}: not a result of `hy-prfl compare`: there is no `{error.args[0]}`.") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a result of `hy-prfl compare`: {error}.") from error


def _described(result: Mapping[str, Any]) -> dict[str, Any]:
    names = {"left": result["left"], "tie": "tie", "right": result["right"]}
    questions = []
    for name, question in result["questions"].items():
        votes, score = question["votes"], question["score"]
        rows = [
            [names[side], str(vote["count"]), percent(vote["share"], 1), _interval(vote["interval"])]
            for side, vote in votes.items()
        ]
        rows.append(
            [
                f"for {result['right']}, ties half, over prompts",
                "",
                percent(score["mean"], 1),
                _interval(score["interval"]),
            ]
        )
        counts = question["prompts"]
        prompts = [[f"majority: {names[side]}", str(count)] for side, count in counts.items()]
        prompts += [[each["caption"], _tally(each)] for each in question["per_prompt"]]
        agreed = question["agreement"]
        people = [["agreement, Fleiss' kappa", number(agreed["fleiss_kappa"])]]
        people += [[person, _tally(each)] for person, each in question["per_annotator"].items()]
        shares = ", ".join(f"{names[side]} {percent(vote['share'])}" for side, vote in votes.items())
        questions.append(
            {"name": name, "votes": votes, "label": shares, "rows": rows, "prompts": prompts, "people": people}
        )
    note = (
        f"{result['left']} (left in the bar) against {result['right']} (right), blind: {result['num_annotators']} people, "
        f"{result['num_prompts']} prompts"
    )
    if result.get("num_videos", result["num_prompts"]) != result["num_prompts"]:
        note += f" of {result['num_videos']} pairs of videos"
    note += "."
    return {"note": note, "questions": questions}


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{percent(interval[0], 1)} to {percent(interval[1], 1)}"


def _tally(counts: Mapping[str, Any]) -> str:
    return f"{counts['left']} left, {counts['tie']} tie, {counts['right']} right"
