"""The page of a run, from the files that the run left behind. Nothing is measured here but calibration."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from ..data.manifest import read_manifest
from ..data.records import parse_json, read_records, read_utf8
from ..flow_matching import NUM_TRAIN_TIMESTEPS
from ..formats.checkpoints import VALIDATION_FOLDER
from ..runtime.atomic_writes import write_text
from ..runtime.provenance import CONFIG_FILE, METRICS_FILE, RUN_FILE, read_metric_lines, read_run_records
from .figures import INK, Points, draw_curves
from .rendering import as_json, number, percent, render


PAGE_FILE = "report.html"
SPLITS = ("train", "validation")
AT_TIMESTEP = re.compile(r"(?P<metric>.+)/t(?P<timestep>\d+(?:\.\d+)?)")
STEP_FOLDER = re.compile(r"step-(\d+)")
# Metrics between 0 and 1, which are drawn on that scale.
SHARES = ("accuracy", "precision", "recall", "f1", "auc", "pair_accuracy", "reward", "monitor_reward")
# Shown large, if the run has them: metric and whether its first value is shown too.
HEADLINES = {"accuracy": False, "auc": False, "pair_accuracy": False, "reward": True}
NUM_BINS = 10
# What a monitor adds to a validation, by the plot that shows it, each with its name there.
MONITOR_PLOTS: dict[str, dict[str, str]] = {
    "Reward in training against held-out": {
        "reward": "reward in training", "monitor_reward": "held-out reward", "reward_gap": "the former less the latter",
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
# Shown by the monitor's section and not by a plot of its own each.
MONITORED = {name for names in MONITOR_PLOTS.values() for name in names} - {"reward"}
IN_WORDS = re.compile(r"monitor_reward(_\d+|_logit)?|verdict")


@dataclass
class RunPage:
    """What the template of a run shows. Every value is ready to be written; empty ones leave their section out."""

    note: str = ""
    headline: list[tuple[str, str]] = field(default_factory=list)
    before_after: list[tuple[str, str, dict[str, Path]]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, Figure] = field(default_factory=dict)
    monitor: dict[str, Figure] = field(default_factory=dict)
    monitor_note: str = ""
    monitor_rows: list[list[str]] = field(default_factory=list)
    by_sigma: dict[str, Figure] = field(default_factory=dict)
    calibration: dict[str, Figure] = field(default_factory=dict)
    calibration_note: str = ""
    calibration_rows: list[list[str]] = field(default_factory=list)
    samples: list[tuple[str, list[tuple[int, Path]]]] = field(default_factory=list)
    samples_note: str = ""
    cost: list[list[str]] = field(default_factory=list)
    cost_note: str = ""
    config: list[list[str]] = field(default_factory=list)
    provenance: list[tuple[str, list[list[str]]]] = field(default_factory=list)


def write_run_page(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    title: str | None = None,
    plan: str | Path | None = None,
    scores: str | Path | None = None,
    before: str | Path | None = None,
    after: str | Path | None = None,
    comparisons: Sequence[str | Path] = (),
    num_samples: int = 6,
    max_megabytes: float = 50.0,
) -> Path:
    """
    Write one HTML file that shows a run and needs nothing else.

    Args:
        run_dir (`str` or `Path`):
            Folder of a reward or PRFL run, finished or not.
        output (`str` or `Path`, *optional*):
            The file, `report.html` in the run's folder if left out.
        title (`str`, *optional*):
            The headline, the folder's name if left out.
        plan (`str` or `Path`, *optional*):
            File that `plan --output` wrote, for the cost.
        scores (`str` or `Path`, *optional*):
            Table of `score` of labelled clips, for the calibration.
        before, after (`str` or `Path`, *optional*):
            Folders of `generate` with the same prompts and seeds, shown side by side.
        comparisons (`Sequence`):
            Results of `compare`.
        num_samples (`int`, defaults to 6):
            Videos, or pairs of them, of each kind that are shown at most.
        max_megabytes (`float`, defaults to 50):
            Videos that are put into the page at most. What does not fit is left out, and the page says so.

    Returns:
        `Path`: the page.

    Raises:
        FileNotFoundError: If the folder is none of a run, or a file that is named is not there.
        ValueError: If a file is broken, or a score table has no labels.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS_FILE).is_file():
        raise FileNotFoundError(f"'{run_dir}' is not the folder of a run: there is no {METRICS_FILE} in it.")
    lines = [json.loads(line) for _, line in read_metric_lines(run_dir / METRICS_FILE)]
    records = read_run_records(run_dir / RUN_FILE)
    for index, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{run_dir / RUN_FILE}: record {index}: expected an object, got {record!r}.")
    config: dict[str, Any] = {}
    if (run_dir / CONFIG_FILE).is_file():
        config = read_run_config(run_dir / CONFIG_FILE)
    budget = max_megabytes * 1e6
    page = RunPage(
        note=state_of_run(lines, records, config),
        headline=headlines(lines, config),
        comparisons=[describe_comparison(path) for path in comparisons],
        curves=training_figures(lines),
        by_sigma=sigma_figures(lines),
        config=[[name, as_json(value)] for name, value in config.items()],
        provenance=[
            (f"start {index} of {len(records)}, {record.get('started', '?')}", list(flatten(record)))
            for index, record in enumerate(records, 1)
        ],
    )
    page.cost, page.cost_note = cost_rows(lines, records, plan)
    if is_prfl(config):
        page.monitor, page.monitor_rows, page.monitor_note = monitor_parts(lines, config)
    if scores is not None:
        page.calibration, page.calibration_rows, page.calibration_note = calibration(Path(scores))
    if before is not None and after is not None:
        page.before_after, budget = pairs_to_show(Path(before), Path(after), num_samples, budget)
    page.samples, page.samples_note = samples_to_show(run_dir / VALIDATION_FOLDER, num_samples, budget)
    output = run_dir / PAGE_FILE if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, render("run.html.j2", title=title or run_dir.resolve().name, run=page))
    return output


def read_run_config(path: Path) -> dict[str, Any]:
    """
    A run's options.

    Raises:
        ValueError: If the file is broken, or holds no options; names file and line.
    """
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        # Those of the parser are of several lines.
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from error
    if config is None:
        return {}
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"{path}: expected options by name, got {str(config)[:80]!r}.")
    return config


def state_of_run(
    lines: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> str:
    """A sentence: which kind of run it is, and how far it has come."""
    kind = "Fine-tuning of a generator (PRFL)" if is_prfl(config) else "Reward model"
    model = config.get("pretrained_model_name_or_path", "an unknown model")
    step = max((int(line["step"]) for line in lines), default=0)
    finished = records[-1].get("finished_step") if records else None
    state = f"finished after {finished} steps" if finished is not None else f"not finished, at step {step}"
    if records and "stopped_step" in records[-1]:
        state = f"stopped by its monitor after {records[-1]['stopped_step']} steps"
    return f"{kind}, from {model}; {state}."


def is_prfl(config: Mapping[str, Any]) -> bool:
    """Whether these are options of the fine-tuning of a generator."""
    return "reward_model" in config and "task" not in config


def headlines(lines: Sequence[Mapping[str, float]], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Value and label of the cards: steps, and what the last validation found."""
    cards = [(str(max((int(line["step"]) for line in lines), default=0)), "steps")]
    for metric, with_first in HEADLINES.items():
        points = series(lines, f"validation/{metric}")
        if points:
            first = f", {number(points[0][1])} at step {points[0][0]:g}" if with_first and len(points) > 1 else ""
            cards.append((number(points[-1][1]), f"{metric.replace('_', ' ')} in the last validation{first}"))
    verdicts = [line["verdict"] for line in lines if "verdict" in line]
    if verdicts:
        cards.append((str(verdicts[-1]), "is what the monitor finds the run"))
    if "lora_rank" in config:
        rank = config["lora_rank"]
        cards.append(("all" if rank is None else f"rank {rank}", "weights train" if rank is None else "LoRA trains"))
    return cards


def series(lines: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) of one metric."""
    return [(line["step"], line[name]) for line in lines if name in line]


def training_figures(lines: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """
    A plot of each metric against the step, of training, validation and each of several validation datasets in one. Those
    at a noise level are left out, and so are the monitor's.
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
    """Plots of what the monitor measured, a row for each of its verdicts, and a note; without a monitor the note only."""
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
            for number, model in enumerate(models, 1):
                curves[f"held-out {number}: {model}"] = series(watched, f"validation/monitor_reward_{number}")
        curves = {label: points for label, points in curves.items() if points}
        if curves:
            figures[title] = draw_curves(title, "step", curves, whole=True)
    rows = [[str(line["step"]), str(line["verdict"]), str(line["verdict_reason"])] for line in watched]
    action = config.get("on_hacking") or "warn"
    note = f"By the rules of docs/monitor.md; step 0 is the base. `on_hacking` is {action}."
    return figures, rows, note


def sigma_figures(lines: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """A plot of each metric that was measured at several noise levels: the first and the last validation."""
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


def pairs_to_show(
    before: Path, after: Path, num_samples: int, budget: float
) -> tuple[list[tuple[str, str, dict[str, Path]]], float]:
    """
    Id, caption and the two videos of what both folders have, and what is left of the budget in bytes.

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


def cost_rows(
    lines: Sequence[Mapping[str, float]], records: Sequence[Mapping[str, Any]], plan: str | Path | None
) -> tuple[list[list[str]], str]:
    """Rows of what was planned and what was measured, and a note."""
    planned: dict[str, Any] = {}
    if plan is not None:
        planned = parse_json(read_utf8(Path(plan)), str(plan))
        if not isinstance(planned, dict):
            raise ValueError(f"{plan}: not a plan: expected a JSON object, got {type(planned).__name__}.")
        absent = {"peak", "hours", "seconds_per_step"} - set(planned)
        if absent:
            raise ValueError(f"{plan}: not a plan, these keys are missing: {', '.join(sorted(absent))}.")
    hours, steps = measured_time(records)
    per_step = None if hours is None or not steps else 3600 * hours / steps
    memory = measured_memory(records)
    unmeasured = "not measured" if "peak" in planned and hours is not None else "-"
    rows = [
        ["hours", number(planned.get("hours")), number(hours)],
        ["seconds per step", number(planned.get("seconds_per_step")), number(per_step)],
        ["GB of GPU memory", number(planned.get("peak")), unmeasured if memory is None else number(memory)],
        [
            "GPUs or processes",
            number(planned.get("num_gpus")),
            number(records[-1].get("num_processes")) if records else "-",
        ],
    ]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    note = "Measured hours are from start to end, with loading, validation and checkpoints; planned ones are of the steps."
    if memory is not None:
        note += (
            " Measured memory is what tensors took on the fullest GPU; the planned one has what CUDA takes as well."
        )
    return rows, note if rows else ""


def measured_time(records: Sequence[Mapping[str, Any]]) -> tuple[float | None, int]:
    """Hours and steps of the last start of a run that has finished; None if it has not, or is too old to say."""
    if not records or "finished" not in records[-1]:
        return None, 0
    last = records[-1]
    passed = datetime.fromisoformat(last["finished"]) - datetime.fromisoformat(last["started"])
    return passed.total_seconds() / 3600, int(last["finished_step"]) - int(last.get("resumed_step", 0))


def measured_memory(records: Sequence[Mapping[str, Any]]) -> float | None:
    """GB that tensors took on the fullest GPU in the last start; None on a CPU, or if it did not finish or is too old."""
    peaks = records[-1].get("peak_gpu_memory", []) if records else []
    if not isinstance(peaks, list) or not all(isinstance(peak, int) for peak in peaks):
        raise ValueError(f"{RUN_FILE}: `peak_gpu_memory` must be a list of bytes, got {peaks!r}.")
    return max(peaks) / 1e9 if peaks else None


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


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[list[str]]:
    """Rows of a nested mapping, names joined by dots."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        elif name == "command" and isinstance(value, list):
            yield [f"{prefix}{name}", " ".join(map(str, value))]
        else:
            yield [f"{prefix}{name}", as_json(value)]


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{percent(interval[0], 1)} to {percent(interval[1], 1)}"


def _tally(counts: Mapping[str, Any]) -> str:
    return f"{counts['left']} left, {counts['tie']} tie, {counts['right']} right"
