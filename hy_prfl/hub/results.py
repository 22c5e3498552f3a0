"""The evaluation of a run for its model card: metrics at each noise level, in the Hub's format, and a plot."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, constants
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..configs.base import names_in
from ..flow_matching import NUM_TRAIN_TIMESTEPS
from ..runtime.atomic_writes import replacing
from ..runtime.provenance import METRICS_FILE


Metrics = dict[str, float]

EVAL_RESULTS_FILE = f"{constants.EVAL_RESULTS_FOLDER}/hy_prfl.yaml"
# Type of a dataset that is not on the Hub. It must not have the form of a Hub id.
LOCAL_DATASET = "local"
AT_TIMESTEP = re.compile(r"(?P<metric>.+)/t(?P<timestep>\d+)")
METRIC_NAMES = {"auc": "AUC", "f1": "F1"}


def best_metrics(files: Mapping[str, Path]) -> Metrics:
    """Metrics of the pushed model: those of the best model, or else those of the last validation."""
    best = json.loads(files["metrics.json"].read_text(encoding="utf-8")) if "metrics.json" in files else {}
    if best:
        return {name: value for name, value in best.items() if isinstance(value, (int, float))}
    validations = [entry for entry in read_history(files) if any(name.startswith("validation/") for name in entry)]
    if not validations:
        return {}
    last = {
        name.removeprefix("validation/"): value for name, value in validations[-1].items() if "validation/" in name
    }
    return {"global_step": validations[-1]["step"], **last}


def eval_results(
    task: str, config: Mapping[str, Any], metrics: Metrics, *, is_reward: bool, dataset_on_hub: bool
) -> list[EvalResult]:
    """
    The metrics at each noise level, and their means, in the format of the Hub's `model-index`.

    Args:
        task (`str`):
            The Hub's name of the model's task, such as `text-to-video`.
        config (`Mapping[str, Any]`):
            Options of the run.
        is_reward (`bool`):
            Whether the model is a reward model.
        dataset_on_hub (`bool`):
            Whether `validation_dataset` is a single repository on the Hub, not a folder and not several datasets.
    """
    if not metrics or not config.get("validation_dataset"):
        return []
    datasets = names_in(config["validation_dataset"])
    names = ", ".join(re.split(r"[/\\]", dataset.rstrip("/\\"))[-1] for dataset in datasets)
    subject = f"{config.get('task')} of noisy latents" if is_reward else "reward of samples"
    results = []
    for name, value in metrics.items():
        if name == "global_step" or not math.isfinite(value):
            continue
        at = AT_TIMESTEP.fullmatch(name)
        metric = at["metric"] if at else name
        sigma = None if at is None else int(at["timestep"]) / NUM_TRAIN_TIMESTEPS
        level = "all noise levels" if at is None else f"sigma {sigma:g}"
        pretty = METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize())
        results.append(
            EvalResult(
                task_type=task,
                task_name=f"{subject}, {level}",
                dataset_type=datasets[0] if dataset_on_hub else LOCAL_DATASET,
                dataset_name=names,
                dataset_config=level,
                dataset_args=None if at is None else {"timestep": int(at["timestep"]), "sigma": sigma},
                metric_type=metric,
                metric_name=f"{pretty}, mean" if at is None else f"{pretty} at {level}",
                metric_value=round(float(value), 6),
            )
        )
    return results


def eval_result_entries(results: Sequence[EvalResult]) -> list[EvalResultEntry]:
    """
    The same results for `.eval_results/*.yaml`. This format supports only datasets on the Hub: none for a local dataset.

    Each metric at each noise level is a task of its own, such as `accuracy_t200`. The mean is the task `accuracy`.
    """
    entries = []
    for result in results:
        if result.dataset_type != LOCAL_DATASET:
            timestep = (result.dataset_args or {}).get("timestep")
            task_id = result.metric_type if timestep is None else f"{result.metric_type}_t{timestep}"
            entries.append(
                EvalResultEntry(
                    result.dataset_type, task_id.replace("/", "_"), result.metric_value, notes=result.task_name
                )
            )
    return entries


def metric_table(metrics: Metrics) -> tuple[list[int], list[tuple[str, list[str]]]]:
    """Timesteps, and for each metric its name and the cells of its row: the value at each timestep, and the mean."""
    by_timestep: dict[str, dict[int, float]] = defaultdict(dict)
    for name, value in metrics.items():
        at = AT_TIMESTEP.fullmatch(name)
        if at:
            by_timestep[at["metric"]][int(at["timestep"])] = value
    timesteps = sorted({timestep for row in by_timestep.values() for timestep in row})
    rows = []
    for metric, row in by_timestep.items():
        values = [*(row.get(timestep) for timestep in timesteps), metrics.get(metric)]
        rows.append((METRIC_NAMES.get(metric, metric), ["" if value is None else f"{value:.3f}" for value in values]))
    return timesteps, rows


def draw_training(history: list[Metrics], metrics: Metrics, path: Path) -> bool:
    """
    Draw a PNG with every training curve against the step, and every metric against the timestep.

    Returns:
        `bool`: whether there was anything to draw.
    """
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in history:
        for name, value in entry.items():
            if name.startswith("train/"):
                curves[name.removeprefix("train/")].append((entry["step"], value))
    levels: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, value in metrics.items():
        at = AT_TIMESTEP.fullmatch(name)
        if at:
            levels[at["metric"]].append((int(at["timestep"]), value))
    panels = [(f"training: {name}", "step", points) for name, points in curves.items()]
    panels += [(f"evaluation: {name}", "timestep", sorted(points)) for name, points in levels.items()]
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    # Without pyplot, which keeps every figure in memory and works in only one thread.
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, axis, points) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.plot(*zip(*points, strict=True), marker="o" if axis == "timestep" or len(points) == 1 else None)
        axes.set_title(name)
        axes.set_xlabel(axis)
        axes.grid(visible=True, alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def read_history(files: Mapping[str, Path]) -> list[Metrics]:
    """The lines of `metrics.jsonl`, none if there is no such file."""
    if METRICS_FILE not in files:
        return []
    return [json.loads(line) for line in files[METRICS_FILE].read_text(encoding="utf-8").splitlines()]
