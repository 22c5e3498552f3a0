"""Merges annotations into a latent dataset that is already encoded."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from .dataset import load_latent_dataset
from .finished import REPORT_FILE, STATE_FILE
from .schema import LABELS, TASKS, task_label
from .store import replace_columns, save_table


logger = logging.getLogger(__name__)


def merge_labels(
    rows: Mapping[str, Sequence[Any]],
    annotations: Mapping[str, Mapping[str, int]],
    *,
    ignore_unknown_ids: bool = False,
    overwrite: bool = False,
) -> dict[str, list[int | None]]:
    """
    New label columns of a dataset.

    A row keeps its label where there is no annotation. A label that neither has stays None.

    Args:
        rows (`Mapping[str, Sequence]`): The dataset's column `id` and its label columns.
        annotations (`Mapping[str, Mapping[str, int]]`): Labels by id, see `read_annotations`.

    Raises:
        ValueError: If an annotated id is not in the dataset (unless `ignore_unknown_ids`), or an annotation
            contradicts a label (unless `overwrite`).
    """
    unknown = sorted(set(annotations) - set(rows["id"]))
    if unknown and not ignore_unknown_ids:
        raise ValueError(f"{len(unknown)} annotated clips are not in the dataset, the first is `id` {unknown[0]!r}.")
    columns: dict[str, list[int | None]] = {}
    for name in LABELS:
        columns[name] = []
        for clip_id, old in zip(rows["id"], rows[name], strict=True):
            new = annotations.get(clip_id, {}).get(name)
            if new is not None and old is not None and new != old and not overwrite:
                raise ValueError(
                    f"clip {clip_id!r}: `{name}` is {old} in the dataset and {new} in the annotations; "
                    "set `overwrite` to use the annotations."
                )
            columns[name].append(old if new is None else new)
    return columns


def label_dataset(
    dataset: str,
    annotations: Mapping[str, Mapping[str, int]],
    output_dir: str | Path,
    *,
    ignore_unknown_ids: bool = False,
    overwrite: bool = False,
) -> dict[str, dict[str, int]]:
    """
    Write a latent dataset with merged labels to another folder, or in place.

    Args:
        dataset (`str`): Folder or Hub id.
        annotations, ignore_unknown_ids, overwrite: See `merge_labels`.
        output_dir (`str` or `Path`): Folder to write. It must be empty, absent, or `dataset` itself.

    Returns:
        `dict[str, dict[str, int]]`: For each task, the number of rows whose label is good, poor and missing.

    Raises:
        ValueError: For the reasons in `merge_labels`, or if `output_dir` holds something else.
    """
    source_dir, output_dir = Path(dataset).resolve(), Path(output_dir).resolve()
    if output_dir != source_dir and output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"`output_dir` '{output_dir}' is not empty; choose another one, or the dataset itself.")
    latents = load_latent_dataset(dataset)
    table: pa.Table = latents.data.table
    rows = {name: table.column(name).to_pylist() for name in ("id", *LABELS)}
    columns = merge_labels(rows, annotations, ignore_unknown_ids=ignore_unknown_ids, overwrite=overwrite)
    save_table(replace_columns(table, columns), latents.features, output_dir, _side_files(source_dir))
    return count_labels(columns)


def count_labels(columns: Mapping[str, Sequence[int | None]]) -> dict[str, dict[str, int]]:
    """For each task, the number of rows whose label is good, poor and missing, from the label columns."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    counts = {}
    for task in TASKS:
        values = [task_label(row, task) for row in rows]
        counts[task] = {"good": values.count(1), "poor": values.count(0), "missing": values.count(None)}
    return counts


def _side_files(source_dir: Path) -> dict[str, str]:
    """Files that `preprocess` wrote beside the dataset, with a note that labels have been merged."""
    files = {}
    if (source_dir / STATE_FILE).is_file():
        state = json.loads((source_dir / STATE_FILE).read_text(encoding="utf-8"))
        files[STATE_FILE] = json.dumps(state | {"labelled": True})
    if (source_dir / REPORT_FILE).is_file():
        files[REPORT_FILE] = (source_dir / REPORT_FILE).read_text(encoding="utf-8")
    return files
