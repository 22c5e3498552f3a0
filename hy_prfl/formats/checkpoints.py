"""The folders of a run: finds, checks and deletes checkpoints, and sets aside results that a resumed run replaces."""

import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.atomic_writes import move, recover_folder, write_text
from ..runtime.provenance import METRICS_FILE, RUN_FILE, read_metric_lines, read_run_records
from .layout import EXPERT_FOLDERS, LORA_FILES


logger = logging.getLogger(__name__)

STATE_FILE, FILES_FILE = "trainer_state.json", "files.json"
SCHEDULE_FILE = "custom_checkpoint_0.pkl"
BEST_FOLDER, MODEL_FOLDER, AVERAGE_FOLDER, VALIDATION_FOLDER = "best", "reward_model", "ema", "validation"
# Results of each trainer besides checkpoints.
REWARD_RESULTS = (BEST_FOLDER, MODEL_FOLDER)
PRFL_RESULTS = (VALIDATION_FOLDER, *EXPERT_FOLDERS.values(), *LORA_FILES.values())
CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]+)")
VALIDATION_NAME = re.compile(r"step-([0-9]+)")
ABANDONED_NAME = re.compile(r"abandoned-([0-9]+)")
# Lists the files that are being moved into an `abandoned-<n>`. If the process dies, the next start finishes the move.
ABANDONING_FILE = ".abandoning.json"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, in the order of their steps, without folders that still have their temporary name."""
    return _numbered_folders(output_dir, CHECKPOINT_NAME)


def _numbered_folders(parent: Path, name: re.Pattern[str]) -> list[Path]:
    """Folders whose whole name matches, in the order of the number in it."""
    numbers = {path: match for path in parent.glob("*") if (match := name.fullmatch(path.name)) and path.is_dir()}
    return sorted(numbers, key=lambda path: int(numbers[path].group(1)))


def checkpoint_step(checkpoint: Path) -> int:
    """Number of updates in a checkpoint folder's name."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint}: a checkpoint folder is called 'checkpoint-<step>'.")
    return int(match.group(1))


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    The checkpoint to continue from, or None to start from the beginning.

    Args:
        resume_from_checkpoint (`str`, *optional*):
            `"latest"` for the newest complete checkpoint in `output_dir`, if there is one; or the path of a checkpoint.

    Raises:
        FileNotFoundError: If the path is not a complete checkpoint.
        ValueError: If `output_dir` already holds checkpoints, and nothing or a checkpoint from another folder is
            resumed; or if a checkpoint's name and its state have different steps.
    """
    # Finish what a killed run began: the renaming of a finished folder, or the move of abandoned results.
    for outdated in output_dir.glob(".*.old"):
        recover_folder(output_dir / outdated.name.removeprefix(".").removesuffix(".old"))
    _finish_abandoning(output_dir)
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if checkpoints:
            raise ValueError(
                f"`output_dir`: {output_dir} already holds {checkpoints[-1].name}. Continue with "
                "`--resume_from_checkpoint latest` or choose another folder."
            )
        return None
    if resume_from_checkpoint == "latest":
        for path in reversed(checkpoints):
            if (path / STATE_FILE).is_file():
                _check_step(path)
                return path
            logger.warning("%s is not a complete checkpoint and is skipped: it has no %s.", path, STATE_FILE)
        logger.info("There is no complete checkpoint in %s: the run starts from the beginning.", output_dir)
        return None
    checkpoint = Path(resume_from_checkpoint)
    if not (checkpoint / STATE_FILE).is_file():
        raise FileNotFoundError(
            f"`resume_from_checkpoint`: {checkpoint} is not a complete checkpoint: it has no {STATE_FILE}."
            + (f" Did you mean {inside[-1]}?" if (inside := list_checkpoints(checkpoint)) else "")
        )
    absolute = Path(os.path.abspath(checkpoint))
    if absolute.parent.resolve() == output_dir.resolve() and CHECKPOINT_NAME.fullmatch(absolute.name):
        _check_step(absolute)
    elif checkpoints:
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} is not in `output_dir` {output_dir}, which already holds "
            f"{checkpoints[-1].name}. Continue with `--resume_from_checkpoint latest` or choose another folder."
        )
    return checkpoint


def _check_step(checkpoint: Path) -> None:
    step = read_state(checkpoint)["global_step"]
    if step != checkpoint_step(checkpoint):
        raise ValueError(f"{checkpoint}: its {STATE_FILE} has step {step}, its name another one.")


def abandon(output_dir: Path, step: int, results: Sequence[str]) -> Path | None:
    """
    Move results of later steps into a new folder when a run continues from an earlier step.

    These are checkpoints, the best model, results and validation videos of more than `step` updates. Lines of
    `metrics.jsonl` are copied. Nothing is deleted. Later starts do not read the new folder, but its checkpoints count
    towards the limit of `delete_old_checkpoints`.

    Args:
        step (`int`):
            Updates after which the run continues, 0 if it starts from the beginning.
        results (`Sequence[str]`):
            Names of the results that this trainer writes besides checkpoints. Results of the other trainer, which may
            be in the same folder, stay.

    Returns:
        `Path`, *optional*: The new folder `output_dir/abandoned-<n>`, None if there was nothing.
    """
    names = [path.name for path in list_checkpoints(output_dir) if checkpoint_step(path) > step]
    best = best_report(output_dir)
    if BEST_FOLDER in results and best is not None and best["global_step"] > step:
        names.append(BEST_FOLDER)
    for path in _numbered_folders(output_dir / VALIDATION_FOLDER, VALIDATION_NAME):
        if VALIDATION_FOLDER in results and int(path.name.removeprefix("step-")) > step:
            names.append(f"{VALIDATION_FOLDER}/{path.name}")
    finished = [
        record["finished_step"] for record in read_run_records(output_dir / RUN_FILE) if "finished_step" in record
    ]
    # Older versions did not record the step of a result.
    if finished[-1] > step if finished else bool(names) or step == 0:
        kept_by_step = (BEST_FOLDER, VALIDATION_FOLDER)
        names += [name for name in results if name not in kept_by_step and (output_dir / name).exists()]
    if not names:
        return None
    numbers = [int(path.name.removeprefix("abandoned-")) for path in _numbered_folders(output_dir, ABANDONED_NAME)]
    folder = output_dir / f"abandoned-{max(numbers, default=0) + 1}"
    folder.mkdir()
    lines = [line for line_step, line in read_metric_lines(output_dir / METRICS_FILE) if line_step > step]
    if lines:
        write_text(folder / METRICS_FILE, "".join(f"{line}\n" for line in lines))
    write_text(output_dir / ABANDONING_FILE, json.dumps({"folder": folder.name, "names": names}))
    _finish_abandoning(output_dir)
    return folder


def _finish_abandoning(output_dir: Path) -> None:
    """Move the files that `ABANDONING_FILE` lists, if it exists. Several processes may call this at once."""
    try:
        record = json.loads((output_dir / ABANDONING_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    for name in record["names"]:
        target = output_dir / record["folder"] / name
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            move(output_dir / name, target)
    (output_dir / ABANDONING_FILE).unlink(missing_ok=True)


def best_report(output_dir: Path) -> dict[str, Any] | None:
    """Metrics and `global_step` of a run's best model so far, None if there is none."""
    try:
        return json.loads((output_dir / BEST_FOLDER / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def delete_old_checkpoints(output_dir: Path, newest: Path, total_limit: int) -> None:
    """Keep `newest` and at most `total_limit - 1` others. Abandoned ones are deleted first, then the oldest."""
    abandoned = [path for each in _numbered_folders(output_dir, ABANDONED_NAME) for path in list_checkpoints(each)]
    others = [*abandoned, *(path for path in list_checkpoints(output_dir) if path != newest)]
    for old in others[: max(0, len(others) + 1 - total_limit)]:
        logger.info("Deleting %s: `checkpoints_total_limit` is %d.", old, total_limit)
        shutil.rmtree(old)
        if old in abandoned and not any(old.parent.iterdir()):
            old.parent.rmdir()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """
    The `state` that was passed to `save_checkpoint`.

    Raises:
        ValueError: If the file is broken.
    """
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise ValueError(f"{path}: expected a mapping with `global_step`, got {state!r}.")
    return state


def check_files(checkpoint: Path, *, with_optimizer: bool) -> None:
    """
    Refuse a checkpoint that was copied or written incompletely.

    Args:
        with_optimizer (`bool`):
            Whether the states of the optimizer and the random number generators must be complete too.

    Raises:
        ValueError: If a file is missing or its size has changed since it was saved. The message names the file.
    """
    # Older versions wrote no list of files.
    if not (checkpoint / FILES_FILE).is_file():
        return
    sizes = json.loads((checkpoint / FILES_FILE).read_text(encoding="utf-8"))
    for name, size in sizes.items():
        is_needed = with_optimizer or name == SCHEDULE_FILE or name.endswith((".safetensors", ".json"))
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if is_needed and found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"{checkpoint} is not complete: '{name}' {state}.")
