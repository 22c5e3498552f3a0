"""The table of scores: saved batch by batch, so that scoring can be killed and resumed, then written as one file."""

import csv
import glob
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data.hashes import hash_text
from ..data.schema import TASKS, task_label
from ..data.video import VideoError
from ..runtime.atomic_writes import write_text
from ..runtime.distributed import process_state
from .reward_evaluator import classification_metrics


SUFFIXES = (".csv", ".json", ".jsonl")

# position of a clip -> its line in a partial file: `logits`, one for each timestep, or the reason why there are none.
Results = dict[int, dict[str, Any]]


def write_scores(
    clips: Sequence[Mapping[str, Any]],
    batches: Sequence[list[int]],
    score_batch: Callable[[list[int]], list[list[float]]],
    output: str | Path,
    timesteps: Sequence[float],
    *,
    task: str,
    request: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """
    Score batches, divided among the processes of `accelerate`, into a table in the order of `clips`.

    Each process appends its scores to a partial file beside `output`. A killed run resumes from these files, with any
    number of processes; they are deleted when the table is written. A summary, with the metrics of [`summarize`], is
    written beside the table as `<output>.summary.json`.

    | column | meaning |
    |---|---|
    | `id`, `prompt`, `source` | the clip |
    | `label` | its label for the reward model's task, if any clip has one |
    | `reward`, `logit` | means over the timesteps |
    | `reward_t<timestep>`, `logit_t<timestep>` | at that noise level; `reward = sigmoid(logit)` |
    | `error` | why there is no score, if any clip has none |

    Args:
        clips (`Sequence[Mapping]`):
            `id`, `prompt`, `source` and labels of each clip.
        batches (`Sequence[list[int]]`):
            Positions in `clips` that are scored at once. They must not depend on the number of processes.
        score_batch (`Callable`):
            Positions -> logits `(batch_size, num_timesteps)`. Raises a `VideoError` if the batch cannot be used.
        output (`str` or `Path`):
            A .csv, .json or .jsonl file.
        request (`Mapping`):
            Everything that the scores depend on, as JSON. Partial files of another request are deleted.

    Returns:
        `list[dict]`: the rows of the table, on every process.

    Raises:
        ValueError: If a score is not finite, or no clip could be scored.
    """
    state = process_state()
    output = Path(output)
    digest = _digest(request)
    if state.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in _partial_files(output):
            if _header(path) != digest:
                path.unlink()
    state.wait_for_everyone()
    results = _read_results(output)
    # No process writes before all have read, so that all divide the same list.
    state.wait_for_everyone()

    pending = [batch for batch in batches if not all(position in results for position in batch)]
    share = pending[state.process_index :: state.num_processes]
    with _open_partial(output.with_name(f"{output.name}.partial-{state.process_index}.jsonl"), digest) as file:
        for positions in tqdm(share, desc="Scoring", unit="batch", disable=not state.is_main_process):
            for result in _score(clips, positions, score_batch):
                file.write(json.dumps(result) + "\n")
            file.flush()
    state.wait_for_everyone()

    results = _read_results(output)
    rows = [_table_row(clip, results[position], timesteps, task) for position, clip in enumerate(clips)]
    state.wait_for_everyone()
    any_scored = any(row["logit"] is not None for row in rows)
    if state.is_main_process and any_scored:
        _write_table(_drop_empty_columns(rows), output)
        summary = {"request": dict(request), **summarize(rows, timesteps, task)}
        write_text(summary_path(output), json.dumps(summary, indent=1))
    if state.is_main_process:
        for path in _partial_files(output):
            path.unlink()
    state.wait_for_everyone()
    if not any_scored:
        raise ValueError(
            f"none of the {len(rows)} clips could be scored, the first, '{rows[0]['id']}', for this reason: "
            f"{rows[0]['error']}"
        )
    return _drop_empty_columns(rows)


def is_scored(output: str | Path, request: Mapping[str, Any], *, overwrite: bool = False) -> bool:
    """
    Whether `output` already has the scores of this request.

    Raises:
        ValueError: If it has other scores, unless `overwrite` is set or a killed run was replacing them.
    """
    output = Path(output)
    if not output.exists():
        return False
    found: dict[str, Any] = {}
    if summary_path(output).is_file():
        found = json.loads(summary_path(output).read_text(encoding="utf-8"))["request"]
    # Compared as JSON, which has no tuples.
    expected = json.loads(json.dumps(request))
    if found == expected:
        return True
    # Partial files are deleted last: if there are any, a run of this request was interrupted.
    unfinished = any(_header(path) == _digest(request) for path in _partial_files(output))
    if not overwrite and not unfinished:
        different = sorted(key for key in expected | found if expected.get(key) != found.get(key))
        raise ValueError(
            f"`output` '{output}' holds other scores (different: {', '.join(different)}). Choose another file, or set "
            "`overwrite`."
        )
    return False


def summary_path(output: str | Path) -> Path:
    """File of the summary beside a table."""
    return Path(f"{output}.summary.json")


def summarize(rows: Sequence[Mapping[str, Any]], timesteps: Sequence[float], task: str) -> dict[str, Any]:
    """
    Number of clips, mean rewards and, where clips have labels, the metrics that training logs under the same names.

    `accuracy/t<timestep>` (precision, recall, f1, loss, auc likewise) is that of the logits at one noise level,
    `accuracy` its mean over the noise levels.
    """
    scored = [row for row in rows if row["logit"] is not None]
    labeled = [row for row in scored if row["label"] is not None]
    summary: dict[str, Any] = {
        "task": task,
        "num_clips": len(rows),
        "num_scored": len(scored),
        "num_labeled": len(labeled),
        "rewards": {},
        "metrics": {},
    }
    if scored:
        names = ["reward", *(f"reward_{_name(timestep)}" for timestep in timesteps)]
        summary["rewards"] = {name: float(np.mean([row[name] for row in scored])) for name in names}
    if labeled:
        labels = np.array([row["label"] for row in labeled])
        metrics = {}
        for timestep in timesteps:
            logits = np.array([row[f"logit_{_name(timestep)}"] for row in labeled])
            metrics[_name(timestep)] = classification_metrics(logits, labels)
        kinds = list(metrics[_name(timesteps[0])])
        summary["metrics"] = {kind: float(np.mean([values[kind] for values in metrics.values()])) for kind in kinds}
        for name, values in metrics.items():
            summary["metrics"] |= {f"{kind}/{name}": value for kind, value in values.items()}
    return summary


def _digest(request: Mapping[str, Any]) -> str:
    return hash_text(json.dumps(request, sort_keys=True))


def _name(timestep: float) -> str:
    return f"t{timestep:g}"


def _score(
    clips: Sequence[Mapping[str, Any]], positions: list[int], score_batch: Callable[[list[int]], list[list[float]]]
) -> list[dict[str, Any]]:
    try:
        logits = score_batch(positions)
    except VideoError as error:
        return [{"position": position, "error": str(error)} for position in positions]
    for position, values in zip(positions, logits, strict=True):
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"The score of clip '{clips[position]['id']}' is not finite: {values}.")
    return [{"position": position, "logits": values} for position, values in zip(positions, logits, strict=True)]


def _partial_files(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.partial-*.jsonl"))


def _complete_lines(path: Path) -> list[str]:
    """Lines of a partial file, without the one that a killed process left unfinished."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _header(path: Path) -> str | None:
    lines = _complete_lines(path)
    return json.loads(lines[0])["request"] if lines else None


def _read_results(output: Path) -> Results:
    lines = [line for path in _partial_files(output) for line in _complete_lines(path)[1:]]
    return {result["position"]: result for result in map(json.loads, lines)}


def _open_partial(path: Path, digest: str) -> io.TextIOWrapper:
    """Open a partial file for appending; a new one starts with the digest of its request."""
    lines = _complete_lines(path) if path.exists() else []
    file = open(path, "r+" if path.exists() else "x", encoding="utf-8", newline="\n")
    file.truncate(sum(len(line.encode()) + 1 for line in lines))
    file.seek(0, os.SEEK_END)
    if not lines:
        file.write(json.dumps({"request": digest}) + "\n")
    return file


def _table_row(
    clip: Mapping[str, Any], result: Mapping[str, Any], timesteps: Sequence[float], task: str
) -> dict[str, Any]:
    logits = result.get("logits")
    row = {name: clip[name] for name in ("id", "prompt", "source")}
    row["label"] = task_label(clip, task) if task in TASKS else None
    row |= {"reward": None, "logit": None}
    rewards = [] if logits is None else torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
    for index, timestep in enumerate(timesteps):
        logit = None if logits is None else logits[index]
        row[f"reward_{_name(timestep)}"] = None if logit is None else rewards[index]
        row[f"logit_{_name(timestep)}"] = logit
    if logits is not None:
        row["reward"] = float(np.mean(rewards))
        row["logit"] = float(np.mean(logits))
    return row | {"error": result.get("error")}


def _drop_empty_columns(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out `label` and `error` if no row has one."""
    empty = {name for name in ("label", "error") if all(row[name] is None for row in rows)}
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]


def _write_table(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    if output.suffix == ".json":
        write_text(output, json.dumps(rows, indent=1, ensure_ascii=False))
    elif output.suffix == ".jsonl":
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif output.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(output, text.getvalue())
    else:
        raise ValueError(f"`output` must end in {', '.join(SUFFIXES)}, got '{output}'.")
