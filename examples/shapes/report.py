"""
Writes the results of the demo as one self-contained HTML page: plots and videos are inside it.

It uses the same parts as the pages of runs (`hy_prfl.pages`) and reads the files that the runs wrote. It computes nothing
but averages.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hy_prfl.pages.figures import INK, add_legend, draw_curves
from hy_prfl.pages.rendering import as_json, percent, render
from hy_prfl.runtime.atomic_writes import write_text


ARMS = {"base": "Before", "flow_matching": "Flow matching only", "prfl": "PRFL", "round": "PRFL after a round"}
ARM_COLORS = {"base": "#8a93a0", "flow_matching": "#3b82c4", "prfl": "#e0762f", "round": "#2c8a57"}

# Thirds of the denoising chain by their timesteps. The chain starts at 1000, pure noise.
THIRDS = {"early": (2000 / 3, 1000), "middle": (1000 / 3, 2000 / 3), "late": (0, 1000 / 3)}

# Title of a plot -> the metrics it shows. "judge/good" is added by `summary.curves` for runs with validation videos.
CURVES = {
    "Reward of the clips in training": ("train/reward",),
    "Judge: share of good clips": ("judge/good",),
    "Flow-matching loss": ("train/flow_loss",),
    "Reward loss": ("train/reward_loss",),
    "Loss of the reward model": ("train/loss", "validation/loss"),
}

# Metrics in [0, 1]; they are drawn on that scale.
SHARES = {"train/reward", "judge/good"}

RESULTS_NOTE = (
    "All generators use the same held-out captions and seeds. Good is the share of clips that pass the independent judge, "
    "which tracks the shape in the decoded pixels and never uses the reward model. The columns after it count the failures "
    "of the other clips. The mean reward is the reward model's own score, at high (early), middle and low (late) noise "
    "levels: a higher reward does not prove that the videos are better."
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    The videos of one prompt and one seed.

    Args:
        videos (`Mapping[str, Path]`):
            mp4 file of each arm, see `ARMS`.
        verdicts (`Mapping[str, str]`):
            The judge's verdict on each, "good" or the kind of failure.
    """

    caption: str
    seed: int
    videos: Mapping[str, Path | str]
    verdicts: Mapping[str, str] = field(default_factory=dict)


def write_report(
    output: Path | str,
    *,
    summary: Mapping[str, Any] | Path | str,
    runs: Mapping[str, Path | str],
    videos: Sequence[Comparison],
    config: Mapping[str, Mapping[str, Any]],
    title: str = "PRFL on moving shapes",
) -> Path:
    """
    Write the page.

    Args:
        output (`Path` or `str`):
            The HTML file.
        summary (`Mapping`, `Path` or `str`):
            The demo's `summary.json` or its content: for each arm `{"good": share, "reward": mean, "failures":
            {kind: count}, "rewards_by_timestep": {timestep: mean}}`, and `{"seconds": {stage: seconds}}`. If it has
            `reward_model.majority_accuracy`, that is drawn as a line below the accuracy.
        runs (`Mapping[str, Path | str]`):
            `metrics.jsonl` of each run by its name. A run with the name of an arm gets its colour.
        videos (`Sequence[Comparison]`):
            Videos to show side by side.
        config (`Mapping[str, Mapping]`):
            Options of each stage.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If a video or a metrics file does not exist.
        ValueError: If the summary has none of the arms, or a timestep is neither a number nor a third of the chain.
    """
    if isinstance(summary, (str, Path)):
        summary = json.loads(Path(summary).read_text(encoding="utf-8"))
    arms = {arm: name for arm, name in ARMS.items() if arm in summary}
    if not arms:
        raise ValueError(f"`summary` must have one of {', '.join(ARMS)}, got {', '.join(summary) or 'nothing'}.")
    records = {name: read_metrics(Path(path)) for name, path in runs.items()}
    page = render(
        "demo.html.j2",
        folder=Path(__file__).parent,
        title=title,
        summary=summary,
        arms=arms,
        colors=ARM_COLORS,
        results_note=RESULTS_NOTE,
        judged=judged_rows(summary, arms),
        rewards=reward_rows(summary, arms),
        videos=videos,
        curves=curve_figures(records),
        by_sigma=sigma_figures(records, summary),
        seconds=[[name.replace("_", " "), f"{value:.0f}"] for name, value in summary.get("seconds", {}).items()],
        config={name: [[key, as_json(value)] for key, value in options.items()] for name, options in config.items()},
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    return output


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def judged_rows(summary: Mapping[str, Any], arms: Mapping[str, str]) -> list[list[str]]:
    """A table of the judge's results for each arm. The first row is the header."""
    kinds = list(dict.fromkeys(kind for arm in arms for kind in summary[arm].get("failures", {})))
    shares = ["good", *(name for name in ("right_shape", "right_color") if any(name in summary[arm] for arm in arms))]
    rows = [
        [name, *(percent(summary[arm].get(share)) for share in shares)]
        + [str(summary[arm].get("failures", {}).get(kind, 0)) for kind in kinds]
        for arm, name in arms.items()
    ]
    return [[word.replace("_", " ") for word in ["", *shares, *kinds]], *rows]


def reward_rows(summary: Mapping[str, Any], arms: Mapping[str, str]) -> list[list[str]]:
    """A table of the rewards of each arm. The first row is the header."""
    rows = [
        [name, decimal(summary[arm].get("reward"))] + [decimal(thirds.get(third)) for third in THIRDS]
        for arm, name in arms.items()
        for thirds in [rewards_by_third(summary[arm].get("rewards_by_timestep", {}))]
    ]
    return [["", "mean reward", *(f"{third} timesteps" for third in THIRDS)], *rows]


def rewards_by_third(rewards: Mapping[str, float]) -> dict[str, float]:
    """Mean reward in each third of the chain, from rewards by timestep. Rewards by third are not changed."""
    found: dict[str, list[float]] = {}
    for name, reward in rewards.items():
        third = name
        if name not in THIRDS:
            match = re.fullmatch(r"(?:reward_)?t?(\d+(?:\.\d+)?)", str(name))
            if match is None:
                raise ValueError(f"`rewards_by_timestep` must have timesteps for keys, got {name!r}.")
            timestep = float(match[1])
            third = next(third for third, (low, _) in THIRDS.items() if timestep >= low)
        found.setdefault(third, []).append(reward)
    return {third: sum(values) / len(values) for third, values in found.items()}


def curve_figures(records: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Figure]:
    """Plots of metrics against the step. A plot shows all runs with that metric."""
    figures = {}
    for title, names in CURVES.items():
        found = {
            (run, name): [(line["step"], line[name]) for line in lines if name in line]
            for name in names
            for run, lines in records.items()
        }
        found = {key: points for key, points in found.items() if points}
        several = len({name for _, name in found}) > 1
        labels = {
            (run, name): ARMS.get(run, run.replace("_", " ")) + (f", {name.split('/')[0]}" if several else "")
            for run, name in found
        }
        if found:
            figures[title] = draw_curves(
                title,
                "step (PRFL: of two updates)",
                {labels[key]: points for key, points in found.items()},
                colors={labels[key]: ARM_COLORS[key[0]] for key in found if key[0] in ARM_COLORS},
                is_share=set(names) <= SHARES,
                whole=True,
            )
    return figures


def sigma_figures(
    records: Mapping[str, Sequence[Mapping[str, float]]], summary: Mapping[str, Any]
) -> dict[str, Figure]:
    """Accuracy and AUC of the reward model against sigma, from the last validation of each run."""
    figures = {}
    for name, title in (("accuracy", "Accuracy"), ("auc", "AUC")):
        curves = {run: last_by_sigma(lines, f"validation/{name}/t") for run, lines in records.items()}
        curves = {run.replace("_", " "): points for run, points in curves.items() if points}
        if not curves:
            continue
        label = "sigma (1 is pure noise)"
        figure = draw_curves(f"{title} on held-out clips", label, curves, colors=ARM_COLORS, always_marked=True)
        guess = summary.get("reward_model", {}).get("majority_accuracy") if name == "accuracy" else 0.5
        if guess is not None:
            figure.axes[0].axhline(guess, color=INK, linestyle=":", label="guessing")
        add_legend(figure.axes[0])
        figures[title] = figure
    return figures


def last_by_sigma(lines: Sequence[Mapping[str, float]], prefix: str) -> list[tuple[float, float]]:
    """Points (sigma, value) from the last line with metrics of this prefix."""
    found = [[name for name in line if name.startswith(prefix)] for line in lines]
    last = next((index for index in reversed(range(len(lines))) if found[index]), None)
    if last is None:
        return []
    return sorted((float(name.removeprefix(prefix)) / 1000, lines[last][name]) for name in found[last])


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
