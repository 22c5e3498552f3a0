"""Provenance of results: identities of files, and a record of how a run was started."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from ..version import __version__
from .atomic_writes import write_text


logger = logging.getLogger(__name__)

# Files in the folder of a run, besides weights.
CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.jsonl"
RUN_FILE = "run.json"

LIBRARIES = (
    "torch",
    "accelerate",
    "deepspeed",
    "diffusers",
    "transformers",
    "peft",
    "torchao",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "av",
)


def save_config(config: Any, path: Path) -> None:
    """Write a config dataclass, all at once, as a YAML file that `--config` reads back to an equal config."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def path_identity(path: str, revision: str | None = None) -> str:
    """
    Short text that changes when the files of a path change. Their content is not read.

    For a local file or folder it is a hash of names, sizes and modification times, so it does not change if the folder
    is moved or renamed. For a Hub id it is the id with its revision.
    """
    root = Path(path)
    if not root.exists():
        return path if revision is None else f"{path}@{revision}"
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    states = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def run_record(*, seed: int, num_processes: int = 1) -> dict[str, Any]:
    """
    Record of how a run was started, as JSON values.

    | key | value |
    |---|---|
    | `started` | now, UTC, ISO 8601 |
    | `command` | list of the words of the command line; access tokens are left out |
    | `seed`, `num_processes` | as given |
    | `hy_prfl`, `python`, `platform` | versions |
    | `libraries` | versions by name, null if not installed |
    | `devices` | type of the accelerator, `cpu` if there is none, and names of the devices that this process sees |
    | `git` | `commit` and `dirty` of the working directory's repository, null if there is none |

    Args:
        seed (`int`):
            Seed of the run.
        num_processes (`int`, defaults to 1):
            Processes of the run.
    """
    return {
        "started": _now(),
        "command": _without_tokens(sys.argv),
        "seed": seed,
        "num_processes": num_processes,
        "hy_prfl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _library_version(name) for name in LIBRARIES},
        "devices": _devices(),
        "git": git_state(),
    }


def write_run_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """
    Append a record to the JSON list of a run. The list has one record for each start or continuation.

    Raises:
        ValueError: If the file exists and is not such a list.
    """
    path = Path(path)
    records = read_run_records(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*records, dict(record)], indent=2) + "\n")


def finish_run_record(path: str | Path, global_step: int, *, peak_gpu_memory: Sequence[int]) -> None:
    """
    Add to the last record that the run has finished: the number of updates, the time, and the memory it took.

    Args:
        peak_gpu_memory (`Sequence[int]`):
            Peak bytes of tensors since that start, of each process with an accelerator.
    """
    end = {"finished_step": global_step, "finished": _now(), "peak_gpu_memory": list(peak_gpu_memory)}
    _end_run_record(path, end)


def stop_run_record(path: str | Path, global_step: int, reason: str) -> None:
    """Add to the last record that the run has ended without a result: the number of updates, the time, and why."""
    _end_run_record(path, {"stopped_step": global_step, "stopped": _now(), "stopped_because": reason})


def _end_run_record(path: str | Path, end: Mapping[str, Any]) -> None:
    path = Path(path)
    *earlier, last = read_run_records(path)
    write_text(path, json.dumps([*earlier, {**last, **end}], indent=2) + "\n")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_run_records(path: str | Path) -> list[dict[str, Any]]:
    """
    Records that `write_run_record` wrote, oldest first; empty if there is no file.

    Raises:
        ValueError: If the file exists and is not such a list.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON list of records, got {type(records).__name__}.")
    return records


def read_metric_lines(path: str | Path) -> list[tuple[int, str]]:
    """
    Lines of a run's `metrics.jsonl` as pairs of the number of updates and the line; empty if there is no file.

    If the last line was cut off by a full disk or a killed process, it is skipped with a warning.

    Raises:
        ValueError: If another line is invalid; names the file and the line.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append((int(json.loads(line)["step"]), line))
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with `step`, got {line!r}."
                ) from error
            logger.warning("%s, line %d: the line was cut off and is left out: %r.", path, number, line)
    return found


def git_state(directory: str | Path = ".") -> dict[str, Any] | None:
    """
    Commit of a folder's git repository, and whether tracked files differ from it.

    Returns:
        `{"commit": ..., "dirty": ...}`. None if there is no repository or commit, or if git is not installed, does not
        answer in time or does not trust the owner of the folder.
    """
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(directory: str | Path, *arguments: str) -> str | None:
    # Without optional locks, so that other git commands in the repository are not disturbed.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        finished = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None


def _library_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return {"type": "cpu", "names": []}
    names = []
    if accelerator.type in ("cuda", "xpu"):
        module = torch.get_device_module(accelerator)
        names = [module.get_device_name(index) for index in range(module.device_count())]
    return {"type": accelerator.type, "names": names}


def _without_tokens(words: list[str]) -> list[str]:
    """The command line, with `...` for the value of each option whose name is or ends in `token`."""
    kept = []
    for previous, word in pairwise(["", *words]):
        is_value = re.fullmatch(r"--?(\w+[-_])?token", previous) is not None
        kept.append("..." if is_value else re.sub(r"^(--?(?:\w+[-_])?token)=.*$", r"\1=...", word, flags=re.DOTALL))
    return kept
