"""Where a result comes from: identities of its files, and a record of how a run was started."""

import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from .atomic_writes import write_text


logger = logging.getLogger(__name__)

# Files of a run besides weights.
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


def path_identity(path: str, revision: str | None = None) -> str:
    """
    Short text that changes when the files behind a path do, without reading them.

    For a local file or folder it is a hash of the names, sizes and times of its files, so it stays the same if the
    folder is moved or renamed. For a Hub id it is the id with its revision.
    """
    root = Path(path)
    if not root.exists():
        return path if revision is None else f"{path}@{revision}"
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    states = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def run_record(*, seed: int, num_processes: int = 1) -> dict[str, Any]:
    """
    What a run was started with, as JSON values.

    | key | value |
    |---|---|
    | `started` | now, UTC, ISO 8601 |
    | `command` | the command line, word by word; the values of tokens are left out |
    | `seed`, `num_processes` | as given |
    | `hy_prfl`, `python`, `platform` | versions |
    | `libraries` | versions by name, null for what is not installed |
    | `devices` | type of the accelerator, `cpu` if there is none, and the names of those that this process sees |
    | `git` | `commit` and `dirty` of the repository that the working directory is in, null if it is in none |

    Args:
        seed (`int`):
            Seed of the run.
        num_processes (`int`, defaults to 1):
            Processes that run it.
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
    Add a record to a JSON list, which has one for each start or continuation of the run.

    Raises:
        ValueError: If there is a file that is no such list.
    """
    path = Path(path)
    records = read_run_records(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*records, dict(record)], indent=2) + "\n")


def finish_run_record(path: str | Path, global_step: int) -> None:
    """Note in the last record that the run has ended, and written its result, after this many updates, and when."""
    _end_run_record(path, {"finished_step": global_step, "finished": _now()})


def stop_run_record(path: str | Path, global_step: int, reason: str) -> None:
    """Note in the last record that the run has ended without a result after this many updates, when and why."""
    _end_run_record(path, {"stopped_step": global_step, "stopped": _now(), "stopped_because": reason})


def _end_run_record(path: str | Path, end: Mapping[str, Any]) -> None:
    path = Path(path)
    *earlier, last = read_run_records(path)
    write_text(path, json.dumps([*earlier, {**last, **end}], indent=2) + "\n")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_run_records(path: str | Path) -> list[dict[str, Any]]:
    """
    What `write_run_record` wrote, oldest first; empty if there is no file.

    Raises:
        ValueError: If there is a file that is no such list.
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
    Lines of a run's `metrics.jsonl`, each with its number of updates; empty if there is no file.

    A last line that was cut off, by a full disk or a killed process, is left out with a warning.

    Raises:
        ValueError: If another line is broken; names file and line.
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
    Commit of the repository that a folder is in, and whether tracked files differ from it.

    Returns:
        `{"commit": ..., "dirty": ...}`, or None if there is no repository or commit, or if git is not installed, does
        not answer or does not trust the owner of the folder.
    """
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(directory: str | Path, *arguments: str) -> str | None:
    # Without optional locks: reading a repository must not disturb somebody who works in it.
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
    """The command line with `...` for whatever follows an option that is, or ends in, `token`."""
    kept = []
    for previous, word in pairwise(["", *words]):
        is_value = re.fullmatch(r"--?(\w+[-_])?token", previous) is not None
        kept.append("..." if is_value else re.sub(r"^(--?(?:\w+[-_])?token)=.*$", r"\1=...", word, flags=re.DOTALL))
    return kept
