"""
Writes what the demo found as one HTML page that needs nothing else: plots and videos are inside it.

The page is made from files that the runs leave behind, and computes nothing but averages.
"""

import base64
import html
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


STYLE = Path(__file__).with_name("report.css")

ARMS = {"base": "Before", "flow_matching": "Flow matching only", "prfl": "PRFL"}
ARM_COLORS = {"base": "#8a93a0", "flow_matching": "#3b82c4", "prfl": "#e0762f"}
OTHER_COLORS = ("#4ba37a", "#a06cc9", "#c2557a", "#b59a2c")
# Legible on light and on dark pages; the plots have no background of their own.
INK = "#858d98"

# Timesteps of the chain by thirds: it starts at 1000, pure noise.
THIRDS = {"early": (2000 / 3, 1000), "middle": (1000 / 3, 2000 / 3), "late": (0, 1000 / 3)}

# Title of a plot -> the metrics it shows; "judge/good" is what whoever samples during training may write as well.
CURVES = {
    "Reward of the clips in training": ("train/reward",),
    "Judge: share of good clips": ("judge/good",),
    "Flow-matching loss": ("train/flow_loss",),
    "Reward loss": ("train/reward_loss",),
    "Loss of the reward model": ("train/loss", "validation/loss"),
}

# Metrics that lie between 0 and 1, and are drawn on that scale.
SHARES = {"train/reward", "judge/good"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    The videos of one prompt and one seed.

    Args:
        videos (`Mapping[str, Path]`):
            mp4 file of each arm ("base", "flow_matching", "prfl").
        verdicts (`Mapping[str, str]`):
            What the judge said about each, "good" or the kind of failure.
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
            {kind: count}, "rewards_by_timestep": {timestep: mean}}`, and `{"seconds": {stage: seconds}}`. Optional
            `reward_model.majority_accuracy` is drawn under the accuracy.
        runs (`Mapping[str, Path | str]`):
            `metrics.jsonl` of each run by its name; those called like an arm get its colour.
        videos (`Sequence[Comparison]`):
            Videos to show side by side.
        config (`Mapping[str, Mapping]`):
            Options of each stage.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If a video or a metrics file is not there.
        ValueError: If the summary has none of the arms, or a timestep is neither a number nor a third of the chain.
    """
    if isinstance(summary, (str, Path)):
        summary = json.loads(Path(summary).read_text(encoding="utf-8"))
    arms = [arm for arm in ARMS if arm in summary]
    if not arms:
        raise ValueError(f"`summary` must have one of {', '.join(ARMS)}, got {', '.join(summary) or 'nothing'}.")
    records = {name: read_metrics(Path(path)) for name, path in runs.items()}
    sections = [
        headline(summary, arms),
        section("Results", results_tables(summary, arms), RESULTS_NOTE),
        section("Before and after", video_grid(videos), VIDEOS_NOTE),
        section("Training", plots(curve_figures(records))),
        section("Reward model", plots(sigma_figures(records, summary)), SIGMA_NOTE),
        section("Cost", seconds_table(summary.get("seconds", {}))),
        section("Configuration", config_tables(config)),
    ]
    page = PAGE.format(
        title=escape(title), style=STYLE.read_text(encoding="utf-8"), body="\n".join(filter(None, sections))
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, output)
    return output


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def section(title: str, content: str, note: str = "") -> str:
    """A titled part of the page, nothing if there is no content."""
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>" if content else ""


def headline(summary: Mapping[str, Any], arms: Sequence[str]) -> str:
    """The share of good clips of each arm, large."""
    cards = [
        f'<div class="card"><span class="dot" style="background:{ARM_COLORS[arm]}"></span>{ARMS[arm]}'
        f"<b>{percent(summary[arm]['good'])}</b>good clips</div>"
        for arm in arms
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def results_tables(summary: Mapping[str, Any], arms: Sequence[str]) -> str:
    """The judge's view of each arm, and below it the reward model's."""
    kinds = list(dict.fromkeys(kind for arm in arms for kind in summary[arm].get("failures", {})))
    shares = ["good", *(name for name in ("right_shape", "right_color") if any(name in summary[arm] for arm in arms))]
    judged = [
        [ARMS[arm], *(percent(summary[arm].get(name)) for name in shares)]
        + [str(summary[arm].get("failures", {}).get(kind, 0)) for kind in kinds]
        for arm in arms
    ]
    rewards = [
        [ARMS[arm], decimal(summary[arm].get("reward"))] + [decimal(thirds.get(third)) for third in THIRDS]
        for arm in arms
        for thirds in [rewards_by_third(summary[arm].get("rewards_by_timestep", {}))]
    ]
    head = [word.replace("_", " ") for word in ["", *shares, *kinds]]
    return table(head, judged) + table(["", "mean reward", *(f"{third} timesteps" for third in THIRDS)], rewards)


def rewards_by_third(rewards: Mapping[str, float]) -> dict[str, float]:
    """Mean reward in each third of the chain, from rewards by timestep (or by third, taken as they are)."""
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


def video_grid(videos: Sequence[Comparison]) -> str:
    """Every comparison as a card with its videos side by side."""
    cards = []
    for comparison in videos:
        figures = [
            f"<figure>{video_tag(Path(comparison.videos[arm]), f'{comparison.caption}, {ARMS[arm]}')}"
            f"<figcaption>{ARMS[arm]}{verdict_tag(comparison.verdicts.get(arm))}</figcaption></figure>"
            for arm in ARMS
            if arm in comparison.videos
        ]
        cards.append(
            f"<article><h3>{escape(comparison.caption)} <small>seed {comparison.seed}</small></h3>"
            f'<div class="row">{"".join(figures)}</div></article>'
        )
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def video_tag(path: Path, label: str) -> str:
    """A looping video with the file inside it; a tap stops it and starts it again."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<video autoplay loop muted playsinline preload="auto" aria-label="{escape(label)}" '
        f'onclick="this.paused?this.play():this.pause()" src="data:video/mp4;base64,{data}"></video>'
    )


def verdict_tag(kind: str | None) -> str:
    if kind is None:
        return ""
    return f'<span class="chip {"good" if kind == "good" else "bad"}">{escape(kind.replace("_", " "))}</span>'


def curve_figures(records: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Figure]:
    """Metrics against updates, all runs that have one in one plot."""
    figures = {}
    for title, names in CURVES.items():
        curves = {
            (run, name): [(line["step"], line[name]) for line in lines if name in line]
            for name in names
            for run, lines in records.items()
        }
        curves = {key: points for key, points in curves.items() if points}
        if curves:
            figure, axes = new_figure(title, "step (PRFL: of two updates)")
            for index, ((run, name), points) in enumerate(curves.items()):
                label = ARMS.get(run, run.replace("_", " "))
                if len({key[1] for key in curves}) > 1:
                    label += f", {name.split('/')[0]}"
                color = ARM_COLORS.get(run, OTHER_COLORS[index % len(OTHER_COLORS)])
                axes.plot(*zip(*points, strict=True), label=label, color=color, marker="o" if len(points) < 20 else "")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if set(names) <= SHARES:
                axes.set_ylim(-0.03, 1.03)
            add_legend(axes)
            figures[title] = figure
    return figures


def sigma_figures(
    records: Mapping[str, Sequence[Mapping[str, float]]], summary: Mapping[str, Any]
) -> dict[str, Figure]:
    """Accuracy and AUC of the reward model against sigma, as the last validation of each run found them."""
    figures = {}
    for name, title in (("accuracy", "Accuracy"), ("auc", "AUC")):
        curves = {run: last_by_sigma(lines, f"validation/{name}/t") for run, lines in records.items()}
        curves = {run: points for run, points in curves.items() if points}
        if not curves:
            continue
        figure, axes = new_figure(f"{title} on held-out clips", "sigma (1 is pure noise)")
        for index, (run, points) in enumerate(curves.items()):
            color = ARM_COLORS.get(run, OTHER_COLORS[index % len(OTHER_COLORS)])
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=run.replace("_", " "))
        guess = summary.get("reward_model", {}).get("majority_accuracy") if name == "accuracy" else 0.5
        if guess is not None:
            axes.axhline(guess, color=INK, linestyle=":", label="guessing")
        add_legend(axes)
        figures[title] = figure
    return figures


def last_by_sigma(lines: Sequence[Mapping[str, float]], prefix: str) -> list[tuple[float, float]]:
    """(sigma, value) of the last line that has such metrics."""
    found = [[name for name in line if name.startswith(prefix)] for line in lines]
    last = next((index for index in reversed(range(len(lines))) if found[index]), None)
    if last is None:
        return []
    return sorted((float(name.removeprefix(prefix)) / 1000, lines[last][name]) for name in found[last])


def new_figure(title: str, label: str) -> tuple[Figure, Any]:
    """An empty plot that suits light and dark pages."""
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.set_xlabel(label, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def add_legend(axes: Any) -> None:
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def plots(figures: Mapping[str, Figure]) -> str:
    """Pictures of the figures, as SVG inside the page."""
    images = []
    for title, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        data = base64.b64encode(buffer.getvalue()).decode()
        images.append(f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">')
    return f'<div class="plots">{"".join(images)}</div>' if images else ""


def seconds_table(seconds: Mapping[str, float]) -> str:
    rows = [[name.replace("_", " "), f"{value:.0f}"] for name, value in seconds.items()]
    return table(["stage", "seconds"], rows) if rows else ""


def config_tables(config: Mapping[str, Mapping[str, Any]]) -> str:
    """One table of options for each stage, folded."""
    return "".join(
        f"<details><summary>{escape(name.replace('_', ' '))}</summary>"
        f"{table(['option', 'value'], [[key, json.dumps(value, default=str)] for key, value in options.items()])}</details>"
        for name, options in config.items()
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML table that scrolls sideways where it is too wide; the first column names the rows."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def escape(text: str) -> str:
    return html.escape(str(text), quote=True)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


RESULTS_NOTE = (
    "The same held-out captions and seeds for all. <b>Good</b> is the share of clips that pass the independent judge, "
    "which tracks the shape in the decoded pixels and never sees the reward model; how many of the others fail in which "
    "way stands behind it. The mean reward is the reward model's own view, with much noise (early), some, and little "
    "(late): that it rises does not prove the videos better."
)
VIDEOS_NOTE = "The same prompt and seed in each row. Tap a video to stop it."
SIGMA_NOTE = "How well the reward model tells good clips from bad ones through the noise."

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""
