"""The cost of a run on its page: what was planned beside what was measured."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..data.records import parse_json, read_utf8
from ..runtime.provenance import RUN_FILE
from .rendering import number


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
        note += " Measured memory is that of tensors on the fullest GPU; planned memory includes that of CUDA."
    return rows, note if rows else ""


def measured_time(records: Sequence[Mapping[str, Any]]) -> tuple[float | None, int]:
    """Hours and steps of the last start; no hours if it has not finished, or its record is of an older version."""
    if not records or "finished" not in records[-1]:
        return None, 0
    last = records[-1]
    passed = datetime.fromisoformat(last["finished"]) - datetime.fromisoformat(last["started"])
    return passed.total_seconds() / 3600, int(last["finished_step"]) - int(last.get("resumed_step", 0))


def measured_memory(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Peak GB of tensors on the fullest GPU in the last start; None on a CPU, or if it has no such record."""
    peaks = records[-1].get("peak_gpu_memory", []) if records else []
    if not isinstance(peaks, list) or not all(isinstance(peak, int) for peak in peaks):
        raise ValueError(f"{RUN_FILE}: `peak_gpu_memory` must be a list of bytes, got {peaks!r}.")
    return max(peaks) / 1e9 if peaks else None
