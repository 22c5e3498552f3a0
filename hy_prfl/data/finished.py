"""Checks whether a folder already holds the requested dataset, and which clips would be lost by replacing it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..runtime.atomic_writes import recover_folder
from .hashes import hash_text
from .manifest import ManifestRow


STATE_FILE = "preprocess.json"
REPORT_FILE = "report.jsonl"


def request_digest(
    rows: Sequence[ManifestRow],
    settings: Mapping[str, Any],
    files: Sequence[Path] = (),
    hashes: Mapping[Path, str] | None = None,
) -> str:
    """
    Hash of a request: settings, rows, and the state of the rows' files and of `files`.

    Args:
        hashes (`Mapping`, *optional*):
            Result of `hash_files` for all of these files. Without it, sizes and time stamps are used. This is quick for
            any number of clips, because no file is read. But a file that was replaced by one of the same size and time
            is not noticed.
    """

    def state_of(path: Path) -> str | tuple[int, int] | None:
        return _file_state(path) if hashes is None else hashes.get(path)

    request = [
        [
            (row.id, row.prompt, row.long_prompt, row.pair_id, row.rejected_id, sorted(row.labels.items())),
            [(str(path), state_of(path)) for path in row.files],
        ]
        for row in rows
    ]
    states = [(str(path), state_of(path)) for path in files]
    return hash_text(json.dumps([request, dict(settings), states], sort_keys=True))


def _file_state(path: Path) -> tuple[int, int] | None:
    if not path.is_file():
        return None
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def is_complete(
    output_dir: Path,
    digest: str,
    settings: Mapping[str, Any],
    rows: Sequence[ManifestRow],
    *,
    overwrite: bool = False,
) -> bool:
    """
    Whether `output_dir` already holds the requested dataset.

    Args:
        digest (`str`):
            `request_digest(...)` of the requested dataset.
        settings (`Mapping`):
            Options that the requested rows depend on, as JSON values.
        rows (`Sequence[ManifestRow]`):
            The requested rows.
        overwrite (`bool`, defaults to `False`):
            Whether a dataset with other settings may be replaced, and rows that are no longer requested may be dropped.

    Raises:
        ValueError: If the folder holds something that must not be replaced. This is: files that `build_dataset` did not
            write; a dataset that would lose merged labels; or, unless `overwrite` is set, a dataset with other settings
            or with clips that are not in `rows`.
    """
    recover_folder(output_dir)
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    if not (output_dir / STATE_FILE).is_file():
        raise ValueError(f"`output_dir` '{output_dir}' is not empty and holds no dataset of `preprocess`.")
    state = json.loads((output_dir / STATE_FILE).read_text(encoding="utf-8"))
    if state["digest"] == digest:
        return True
    if state.get("labelled"):
        raise ValueError(
            f"`output_dir` '{output_dir}' holds other rows or settings than requested, and labels that `label` merged; "
            "these would be lost. Choose another `output_dir` and merge the labels again."
        )
    if overwrite:
        return False
    found, expected = state.get("settings", {}), json.loads(json.dumps(dict(settings)))
    different = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if different:
        raise ValueError(
            f"`output_dir` '{output_dir}' holds a finished dataset that was made with other options (different: "
            f"{', '.join(different)}). Choose another `output_dir`, or set `overwrite` to lose it."
        )
    # A clip that got a new id is found by its file.
    ids, files = {row.id for row in rows}, {str(path) for row in rows for path in row.files[:1]}
    table = Dataset.load_from_disk(str(output_dir)).data.table
    old = zip(table.column("id").to_pylist(), table.column("source").to_pylist(), strict=True)
    dropped = [(name, "it is not in the list") for name, file in old if name not in ids and file not in files]
    check_dropped(output_dir, dropped)
    return False


def check_dropped(output_dir: Path, dropped: Sequence[tuple[str, str]]) -> None:
    """Raise a `ValueError` if a dataset would lose clips. `dropped` has their ids with the reasons."""
    if dropped:
        name, reason = dropped[0]
        raise ValueError(
            f"`output_dir` '{output_dir}' holds a finished dataset, and {len(dropped)} of its encoded clips would be "
            f"lost. The first one is {name!r}: {reason}. Choose another `output_dir`, or set `overwrite` to drop them."
        )


def dropped_clips(
    output_dir: Path, rows: Sequence[ManifestRow], progress: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Ids, with reasons, of clips in `output_dir` that the new dataset would not have under any id."""
    if not (output_dir / STATE_FILE).is_file():
        return []
    keys = {entry["key"] for entry in progress}
    reasons = {rows[entry["position"]].id: entry["reason"] for entry in progress}
    names = Dataset.load_from_disk(str(output_dir)).data.table.column("id").to_pylist()
    old = json.loads((output_dir / STATE_FILE).read_text(encoding="utf-8"))["keys"]
    gone = [name for name, key in zip(names, old, strict=True) if key not in keys]
    lost = [(name, reasons.get(name, "it is not in the list")) for name in gone]
    return [(name, reason) for name, reason in lost if reason is not None]
