"""The videos on a run's page: before and after training, and the samples of its validations."""

import re
from pathlib import Path

import numpy as np

from ..data.manifest import read_manifest


STEP_FOLDER = re.compile(r"step-(\d+)")


def pairs_to_show(
    before: Path, after: Path, num_samples: int, budget: float
) -> tuple[list[tuple[str, str, dict[str, Path]]], float]:
    """
    Id, caption and the two videos of each row that both folders have, and the rest of the budget in bytes.

    Raises:
        ValueError: If the folders have no video in common, or a video has another caption in the other one.
    """
    theirs = {row.id: row for row in read_manifest(after / "manifest.json")}
    shown = []
    common = [row for row in read_manifest(before / "manifest.json") if row.id in theirs]
    if not common:
        raise ValueError(
            f"'{before}' and '{after}' have no video in common; make both from the same prompts and seeds."
        )
    for row in common:
        other = theirs[row.id]
        if row.prompt != other.prompt:
            raise ValueError(
                f"{other.where}: the caption of {row.id!r} is {other.prompt!r}, but {row.prompt!r} in {row.where}; make "
                "both from the same prompts and seeds."
            )
    for row in common[:num_samples]:
        videos = {"before": row.video, "after": theirs[row.id].video}
        paths = {name: path for name, path in videos.items() if path is not None}
        size = sum(path.stat().st_size for path in paths.values())
        if size <= budget:
            budget -= size
            shown.append((row.id, row.prompt, paths))
    return shown, budget


def samples_to_show(
    folder: Path, num_samples: int, budget: float, num_steps: int = 5
) -> tuple[list[tuple[str, list[tuple[int, Path]]]], str]:
    """Videos of validations at some steps, the first and the last among them, by sample; and a note on what is not shown."""
    steps = {int(match[1]): path for path in folder.glob("step-*") if (match := STEP_FOLDER.fullmatch(path.name))}
    if not steps:
        return [], ""
    order = sorted(steps)
    chosen = [order[index] for index in sorted({round(x) for x in np.linspace(0, len(order) - 1, num_steps)})]
    names = sorted({path.stem for path in steps[chosen[-1]].glob("*.mp4")})
    samples = []
    for name in names[:num_samples]:
        videos = [(step, steps[step] / f"{name}.mp4") for step in chosen if (steps[step] / f"{name}.mp4").is_file()]
        size = sum(path.stat().st_size for _, path in videos)
        if size <= budget:
            budget -= size
            samples.append((name, videos))
    note = f"{len(samples)} of {len(names)} samples at {len(chosen)} of {len(order)} validations, the same noise in a row."
    return samples, note
