"""Reads what people say of clips: labels by clip id."""

import logging
from pathlib import Path

from .manifest import FIELDS, LABEL_FIELDS, read_labels, warn_of_repeats
from .records import columns_of, describe_columns, read_records, read_text
from .schema import LABELS


logger = logging.getLogger(__name__)


def read_annotations(path: str | Path) -> dict[str, dict[str, int]]:
    """
    Read labels by clip id from a JSON list, JSON Lines or CSV file.

    Values are as in a manifest: 1/0, "good"/"poor"; null or empty values are ignored.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file or a row is broken, an id is missing or has two rows that differ, or no row has a
            label; names file, row and field.
    """
    path = Path(path)
    fields = {"id": FIELDS["id"], **LABEL_FIELDS, "motion_quality": ("motion_quality",)}
    records = read_records(path, fields)
    annotations: dict[str, dict[str, int]] = {}
    first: dict[str, str] = {}
    for where, record in records:
        clip_id = read_text(record, FIELDS["id"], where)
        if clip_id is None:
            raise ValueError(f"{where}: `id` is missing. {describe_columns(list(record), fields)}")
        if record.get("motion_quality") is not None:
            raise ValueError(
                f"{where}: `motion_quality` is derived (physics_quality and human_quality both good); "
                "annotate those two."
            )
        labels = {name: value for name, value in read_labels(record, where).items() if value is not None}
        if annotations.setdefault(clip_id, labels) != labels:
            raise ValueError(f"{where}: `id` {clip_id!r} is already annotated by {first[clip_id]}, with other labels.")
        first.setdefault(clip_id, where)
    warn_of_repeats(path, len(records), len(annotations))
    if not any(annotations.values()):
        columns = describe_columns(columns_of(records), {"id": FIELDS["id"], **LABEL_FIELDS})
        raise ValueError(f"{path}: no row has a value for any of the labels. {columns}")
    # What else a manifest has may be there: a labelled one is a file of annotations as well.
    known = {*LABELS, *(name for names in FIELDS.values() for name in names)}
    ignored = sorted(set(columns_of(records)) - known)
    if ignored:
        logger.warning(f"{path}: these fields are not labels and are ignored: {', '.join(ignored)}.")
    return annotations
