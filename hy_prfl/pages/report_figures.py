"""The figures of a run's page: its metrics over the steps and by noise level, its monitor, and calibration."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from ..data.records import read_records
from ..evaluation.real_rewards import NUM_BINS
from ..flow_matching import NUM_TRAIN_TIMESTEPS
from .figures import INK, Points, draw_curves
from .rendering import number


SPLITS = ("train", "validation")
AT_TIMESTEP = re.compile(r"(?P<metric>.+)/t(?P<timestep>\d+(?:\.\d+)?)")
# Metrics between 0 and 1, which are drawn on that scale.
SHARES = ("accuracy", "precision", "recall", "f1", "auc", "pair_accuracy", "reward", "monitor_reward")
# Metrics of a monitor by the plot that shows them, each with its label.
MONITOR_PLOTS: dict[str, dict[str, str]] = {
    "Reward in training against held-out": {
        "reward": "reward in training", "monitor_reward": "held-out reward", "reward_gap": "difference of the two",
        "real_reward": "reward in training, of real clips",
    },
    "Reward in training, samples to real clips": {
        "reward_above_real": "share of samples above 95 % of real clips",
        "calibration_error": "calibration error on labelled real clips",
    },
    "Distance to the base": {"sample_drift": "samples", "velocity_drift": "velocities"},
    "Samples to real latents, ratios": {
        "latents_temporal_energy": "motion", "latents_spatial_low": "low frequencies",
        "latents_spatial_middle": "middle", "latents_spatial_high": "high",
        "latents_temporal_slow": "slow", "latents_temporal_fast": "fast",
    },
    "Samples to real latents, distances": {
        "latents_distance": "all statistics", "latents_channel_means": "channel means",
        "latents_channel_stds": "channel standard deviations",
    },
}  # fmt: skip
# Metrics of the monitor's section, which have no plots of their own.
MONITORED = {name for names in MONITOR_PLOTS.values() for name in names} - {"reward"}
IN_WORDS = re.compile(r"monitor_reward(_\d+|_logit)?|verdict")


def series(lines: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) of one metric."""
    return [(line["step"], line[name]) for line in lines if name in line]


def training_figures(lines: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """
    A plot of each metric over the steps, with curves of training, validation and each of several validation datasets.
    Metrics at single noise levels and those of the monitor are left out.
    """
    names = dict.fromkeys(name.split("/", 1)[1] for line in lines for name in line if name.split("/")[0] in SPLITS)
    figures = {}
    parts: dict[str, list[str]] = {}
    for name in names:
        part, _, metric = name.partition("/")
        if metric in names:
            parts.setdefault(metric, []).append(part)
    for name in names:
        is_part = name.partition("/")[2] in names
        if AT_TIMESTEP.fullmatch(name) or is_part or name in MONITORED or IN_WORDS.fullmatch(name):
            continue
        curves = {split: series(lines, f"{split}/{name}") for split in SPLITS}
        curves |= {part: series(lines, f"validation/{part}/{name}") for part in parts.get(name, [])}
        curves = {split: points for split, points in curves.items() if points}
        title = name.replace("_", " ")
        figures[title] = draw_curves(title, "step", curves, is_share=name in SHARES, whole=True)
    return figures


def monitor_parts(
    lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> tuple[dict[str, Figure], list[list[str]], str]:
    """Plots of the monitor's metrics, a row for each of its verdicts, and a note; without a monitor only the note."""
    watched = [line for line in lines if "verdict" in line]
    if not watched:
        return (
            {},
            [],
            (
                "This run had no monitor: nothing here tells better videos from a reward that was fooled. "
                "`--monitor_reward_models` and `--on_hacking` add one."
            ),
        )
    figures = {}
    for title, names in MONITOR_PLOTS.items():
        curves = {label: series(watched, f"validation/{name}") for name, label in names.items()}
        if title == next(iter(MONITOR_PLOTS)):
            models = config.get("monitor_reward_models") or []
            for place, model in enumerate(models, 1):
                curves[f"held-out {place}: {model}"] = series(watched, f"validation/monitor_reward_{place}")
        curves = {label: points for label, points in curves.items() if points}
        if curves:
            figures[title] = draw_curves(title, "step", curves, whole=True)
    rows = [[str(line["step"]), str(line["verdict"]), str(line["verdict_reason"])] for line in watched]
    action = config.get("on_hacking") or "warn"
    note = f"By the rules of docs/monitor.md; step 0 is the base. `on_hacking` is {action}."
    return figures, rows, note


def sigma_figures(lines: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """A plot of each metric by noise level, in the first and in the last validation."""
    found: dict[str, dict[str, Points]] = {}
    for line in lines:
        at: dict[str, list[tuple[float, float]]] = {}
        for name, value in line.items():
            match = AT_TIMESTEP.fullmatch(name.removeprefix("validation/"))
            if match is not None:
                at.setdefault(match["metric"], []).append((float(match["timestep"]) / NUM_TRAIN_TIMESTEPS, value))
        for metric, points in at.items():
            if len(points) > 1:
                found.setdefault(metric, {})[f"step {line['step']}"] = sorted(points)
    figures = {}
    for metric, by_step in found.items():
        ends = {step: by_step[step] for step in dict.fromkeys((list(by_step)[0], list(by_step)[-1]))}
        title = f"{metric.replace('_', ' ')} by noise level"
        figures[title] = draw_curves(
            title, "sigma", ends, is_share=metric.split("/")[-1] in SHARES, always_marked=True
        )
    return figures


def calibration(path: Path) -> tuple[dict[str, Figure], list[list[str]], str]:
    """
    Whether a reward of 0.8 means that 8 of 10 clips are good, at each noise level of a table of `score`.

    Returns:
        A plot, a row of the table for each noise level, and a note.

    Raises:
        ValueError: If the table has no labels, or no rewards by noise level.
    """
    rows = [record for _, record in read_records(path, {"id": ("id",), "label": ("label",)})]
    columns = [name for name in (rows[0] if rows else {}) if re.fullmatch(r"reward_t[\d.]+", name)]
    labelled = [row for row in rows if row.get("label") is not None and row.get("reward") is not None]
    if not labelled or not columns:
        raise ValueError(f"{path}: there are no clips with a label and with rewards by noise level (`reward_t...`).")
    labels = np.array([int(float(row["label"])) for row in labelled])
    curves, table = {}, []
    for name in columns:
        rewards = np.array([float(row[name]) for row in labelled])
        sigma = float(name.removeprefix("reward_t")) / NUM_TRAIN_TIMESTEPS
        good, mean = calibration_curve(labels, rewards, n_bins=NUM_BINS)
        curves[f"sigma {sigma:g}"] = list(zip(mean.tolist(), good.tolist(), strict=True))
        brier = float(brier_score_loss(labels, rewards, pos_label=1))
        values = [len(labels), float(rewards.mean()), float(labels.mean()), brier]
        table.append([f"sigma {sigma:g}", *map(number, values)])
    title = "Share of good clips by reward"
    figure = draw_curves(title, "mean reward of a bin", curves, is_share=True, always_marked=True)
    figure.axes[0].plot([0, 1], [0, 1], color=INK, linestyle=":")
    figure.axes[0].set_xlim(-0.03, 1.03)
    note = (
        f"From {path.name}, {len(labelled)} labelled clips in {NUM_BINS} bins of equal width. On the dotted line a reward "
        "is the probability that a clip is good."
    )
    return {title: figure}, table, note
