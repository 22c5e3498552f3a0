"""The page of a run, made from the files of the run."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from ..formats.checkpoints import VALIDATION_FOLDER
from ..runtime.atomic_writes import write_text
from ..runtime.provenance import CONFIG_FILE, METRICS_FILE, RUN_FILE, read_metric_lines, read_run_records
from .rendering import as_json, number, render
from .report_comparison import describe_comparison
from .report_cost import cost_rows
from .report_figures import calibration, monitor_parts, series, sigma_figures, training_figures
from .report_videos import pairs_to_show, samples_to_show


PAGE_FILE = "report.html"
# Shown large, if the run has them: metric and whether its first value is shown too.
HEADLINES = {"accuracy": False, "auc": False, "pair_accuracy": False, "reward": True}


@dataclass
class RunPage:
    """Values for the template of a run's page. An empty value leaves its section out."""

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
            Limit of the videos embedded in the page. Videos beyond it are left out, and the page says so.

    Returns:
        `Path`: the page.

    Raises:
        FileNotFoundError: If `run_dir` is not the folder of a run, or another file does not exist.
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
        # The parser's messages have several lines.
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from error
    if config is None:
        return {}
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"{path}: expected options by name, got {str(config)[:80]!r}.")
    return config


def state_of_run(
    lines: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> str:
    """One sentence on the kind and the progress of a run."""
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
    """Value and label of the cards: steps, and metrics of the last validation."""
    cards = [(str(max((int(line["step"]) for line in lines), default=0)), "steps")]
    for metric, with_first in HEADLINES.items():
        points = series(lines, f"validation/{metric}")
        if points:
            first = f", {number(points[0][1])} at step {points[0][0]:g}" if with_first and len(points) > 1 else ""
            cards.append((number(points[-1][1]), f"{metric.replace('_', ' ')} in the last validation{first}"))
    verdicts = [line["verdict"] for line in lines if "verdict" in line]
    if verdicts:
        cards.append((str(verdicts[-1]), "verdict of the monitor"))
    if "lora_rank" in config:
        rank = config["lora_rank"]
        cards.append(("all" if rank is None else f"rank {rank}", "weights train" if rank is None else "LoRA trains"))
    return cards


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[list[str]]:
    """Rows of a nested mapping, names joined by dots."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        elif name == "command" and isinstance(value, list):
            yield [f"{prefix}{name}", " ".join(map(str, value))]
        else:
            yield [f"{prefix}{name}", as_json(value)]
