"""Writes what `examples.rounds` found as one HTML page that needs nothing else."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hy_prfl.pages.figures import draw_curves
from hy_prfl.pages.rendering import as_json, number, percent, render
from hy_prfl.runtime.atomic_writes import write_text


NAMES = {"base": "base, before"}


def evaluation_folder(root: Path, name: str) -> Path:
    """Where videos are made to evaluate a generator: that of a round by its number, or `base`."""
    return root / "base" / "evaluation" if name == "base" else root / "rounds" / name / "evaluation"


def write_page(root: Path, results: Mapping[str, Any], config: Any, *, num_videos: int) -> Path:
    """
    Write `rounds.html`.

    Args:
        root (`Path`):
            Folder of the rounds; videos and labels are read from it.
        results (`Mapping[str, Any]`):
            Content of `rounds.json`.
        config (dataclass):
            Options of the run, which the page lists.
        num_videos (`int`):
            Prompts whose videos are shown.

    Returns:
        `Path`: the page.
    """
    rounds = results["rounds"]
    page = render(
        "rounds.html.j2",
        folder=Path(__file__).parent,
        title="Rounds of PRFL",
        cards=cards(rounds),
        labels=label_rows(rounds),
        labels_note=(
            "Videos of each round, which the generator of the round before has made, and their labels for "
            f"{results['task'].replace('_', ' ')}. Videos of the same prompts are held out in every round."
        ),
        rewards=reward_rows(rounds),
        validation=validation_rows(rounds),
        judged=judged_rows(rounds),
        curves=curves(rounds),
        videos=videos_to_show(root, [str(each["round"]) for each in rounds if "evaluation" in each], num_videos),
        seconds=[[name.replace("_", " "), f"{value:.0f}"] for name, value in results["seconds"].items()],
        config=[[name, as_json(value)] for name, value in dataclasses.asdict(config).items() if value is not None],
    )
    path = root / "rounds.html"
    write_text(path, page)
    return path


def share_good(counts: Mapping[str, Any], total: str) -> float | None:
    return counts["num_good"] / counts[total] if counts[total] else None


def name_of(each: Mapping[str, Any]) -> str:
    return NAMES.get(str(each["round"]), f"round {each['round']}")


def cards(rounds: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The figures that count most: value and label."""
    labelled = [each for each in rounds if "labels" in each]
    found = [(str(len(labelled)), "rounds"), (str(sum(each["labels"]["num_labelled"] for each in labelled)), "labels")]
    for each in rounds:
        if "evaluation" in each:
            found.append((percent(share_good(each["evaluation"], "num_videos")), f"good videos, {name_of(each)}"))
    return found


def label_rows(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Videos and labels of each round, under a head; empty before there are any."""
    labelled = [each for each in rounds if "labels" in each]
    kinds = list(dict.fromkeys(kind for each in labelled for kind in each["labels"]["kinds"]))
    names = ["num_videos", "num_labelled", "num_train", "num_held_out"]
    head = ["", "videos", "with a label", "to train", "held out", "all labels to train", "good", *kinds]
    rows = [
        [
            name_of(each),
            *(str(each["labels"][name]) for name in names),
            str(each["num_labels"]),
            percent(share_good(each["labels"], "num_labelled")),
            *(str(each["labels"]["kinds"].get(kind, 0)) for kind in kinds),
        ]
        for each in labelled
    ]
    return [[word.replace("_", " ") for word in head], *rows] if rows else []


def reward_rows(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """How the reward models before and after a round do on its held-out videos, under a head."""
    rows = [
        [name_of(each)]
        + [number(each["new_videos"][model][name]) for name in ("auc", "accuracy") for model in ("before", "after")]
        for each in rounds
        if "new_videos" in each
    ]
    head = ["", *(f"{name}, {model}" for name in ("AUC", "accuracy") for model in ("before", "after"))]
    return [head, *rows] if rows else []


def validation_rows(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """AUC of each round's reward model on every validation dataset, under a head."""
    names = list(dict.fromkeys(name for each in rounds for name in each.get("validation_auc", {})))
    rows = [
        [f"reward model of {name_of(each)}", *(number(each["validation_auc"].get(name)) for name in names)]
        for each in rounds
        if "validation_auc" in each
    ]
    return [["", *(name.replace("_", " ") for name in names)], *rows] if rows else []


def judged_rows(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The judge's view of each generator, under a head."""
    judged = [each for each in rounds if "evaluation" in each]
    kinds = list(dict.fromkeys(kind for each in judged for kind in each["evaluation"]["kinds"]))
    rows = [
        [
            name_of(each),
            str(each["evaluation"]["num_videos"]),
            percent(share_good(each["evaluation"], "num_videos")),
            *(str(each["evaluation"]["kinds"].get(kind, 0)) for kind in kinds),
            number(each.get("training_reward")),
        ]
        for each in judged
    ]
    return (
        [["", "videos", "good", *(kind.replace("_", " ") for kind in kinds), "training reward"], *rows] if rows else []
    )


def curves(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Shares and AUC against the round."""
    good = {
        "evaluation": [
            (int(each["round"]), share)
            for each in rounds
            if each["round"] != "base" and "evaluation" in each
            if (share := share_good(each["evaluation"], "num_videos")) is not None
        ],
        "labelled videos": [
            (int(each["round"]), share)
            for each in rounds
            if "labels" in each and (share := share_good(each["labels"], "num_labelled")) is not None
        ],
    }
    auc = {
        f"reward model {model} the round": [
            (int(each["round"]), each["new_videos"][model]["auc"])
            for each in rounds
            if "new_videos" in each and each["new_videos"][model]["auc"] is not None
        ]
        for model in ("before", "after")
    }
    figures = {}
    for title, found in (("Share of good videos", good), ("AUC on a round's held-out videos", auc)):
        drawn = {name: points for name, points in found.items() if points}
        if drawn:
            figures[title] = draw_curves(title, "round", drawn, is_share=True, whole=True)
    return figures


def videos_to_show(root: Path, names: Sequence[str], num_videos: int) -> list[dict[str, Any]]:
    """Evaluation videos of the first prompts by generator, with the judge's word, or whether it calls them good."""
    shown: dict[str, dict[str, Any]] = {}
    for name in names:
        folder = evaluation_folder(root, name)
        verdicts = {row["id"]: row for row in json.loads((folder / "labels.json").read_text(encoding="utf-8"))}
        rows = json.loads((folder / "videos" / "manifest.json").read_text(encoding="utf-8"))
        for row in rows[:num_videos]:
            verdict = verdicts[row["id"]]
            prompt = shown.setdefault(row["id"], {"caption": row["caption"], "seed": row["seed"], "videos": []})
            title = NAMES.get(name, f"round {name}")
            prompt["videos"].append((title, folder / "videos" / row["video"], str(verdict.get("kind") or "")))
    return list(shown.values())
