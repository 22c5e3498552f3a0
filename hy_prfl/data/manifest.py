"""Lists of clips and of annotations: JSON, JSON Lines or CSV. A broken list stops here, before anything is loaded."""

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .schema import LABELS, parse_label


logger = logging.getLogger(__name__)

# Field of a row -> names it may have in a manifest; upstream's `temp_input_data.json` has the last ones.
FIELDS = {
    "id": ("id", "source_id"),
    "video": ("video", "video_path"),
    "prompt": ("caption", "prompt", "short_caption"),
    "long_prompt": ("long_prompt", "long_caption"),
    "image": ("image", "first_image"),
    "last_image": ("last_image",),
    "pair_id": ("pair_id",),
    "rejected_id": ("rejected_id",),
}


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One clip of a manifest. `where` says where it was written, for messages; `prompt` is empty if there is none."""

    where: str
    id: str
    prompt: str
    long_prompt: str | None = None
    video: Path | None = None
    image: Path | None = None
    last_image: Path | None = None
    pair_id: str | None = None
    rejected_id: str | None = None
    labels: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """Files that the row is made from; they need not exist."""
        return [path for path in (self.video, self.image, self.last_image) if path is not None]


def read_manifest(path: str | Path, require_video: bool = True) -> list[ManifestRow]:
    """
    Read a manifest: a JSON list, JSON Lines or CSV, told by the file's suffix.

    | field | meaning |
    |---|---|
    | `id` (`source_id`) | unique name of the clip; the stem of its video file if left out |
    | `video` (`video_path`) | absolute, or relative to the manifest's folder |
    | `caption` (`prompt`, `short_caption`) | what the clip shows |
    | `long_caption` (`long_prompt`) | a longer text for the same clip, optional |
    | `text_alignment`, `blur_quality`, `physics_quality`, `human_quality` | 1/0, "good"/"poor" or null, optional |
    | `pair_id` | clips with the same one show the same scene, optional |
    | `rejected_id` | id of the clip that this one is better than, optional |
    | `image` (`first_image`) | first frame of an image-to-video prompt without a video, optional |
    | `last_image` | its last frame, for pipelines that need one (FLF2V), optional |

    Args:
        require_video (`bool`, defaults to `True`):
            Whether every row must name a video. Prompts need none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file or one of its rows is broken; names file, row and field. Whether videos exist and
            captions are filled in is not checked here: that concerns one clip, not the manifest.
    """
    path = Path(path)
    records = read_records(path)
    if not records:
        raise ValueError(f"{path}: the manifest has no rows.")
    rows = [_parse_row(path, index, where, record, require_video) for index, (where, record) in enumerate(records)]
    check_ids(rows)
    # `generate` writes the seed of each video into its manifest.
    known = {name for names in FIELDS.values() for name in names} | {*LABELS, "seed"}
    ignored = sorted({name for _, record in records for name in record} - known)
    if ignored:
        logger.warning(f"{path}: these fields are not known and are ignored: {', '.join(ignored)}.")
    return rows


def check_ids(rows: Sequence[ManifestRow]) -> None:
    """Raise a `ValueError` if two rows share an id, or a `rejected_id` names no row, or the row itself."""
    first: dict[str, str] = {}
    for row in rows:
        if row.id in first:
            raise ValueError(f"{row.where}: `id` {row.id!r} is already taken by {first[row.id]}; ids must be unique.")
        first[row.id] = row.where
    for row in rows:
        if row.rejected_id is not None and (row.rejected_id not in first or row.rejected_id == row.id):
            raise ValueError(f"{row.where}: `rejected_id` {row.rejected_id!r} is not the id of another row.")


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """
    Rows of a JSON list, JSON Lines or CSV file as dictionaries, each with the place it comes from.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file does not parse or a row is not a mapping; names file and row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'.")
    suffix = path.suffix.lower()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    if suffix == ".csv":
        return _read_csv(path, text)
    if suffix == ".jsonl":
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        records = [(where, parse_json(line, where)) for where, line in lines]
    elif suffix == ".json":
        values = parse_json(text, str(path))
        if not isinstance(values, list):
            raise ValueError(f"{path}: expected a JSON list of rows, got a {type(values).__name__}.")
        records = [(f"{path}, row {number}", value) for number, value in enumerate(values, 1)]
    else:
        raise ValueError(f"{path}: expected a .json, .jsonl or .csv file.")
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a mapping of field names to values, got {record!r}.")
    return records


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; a `ValueError` names `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def _read_csv(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        records = [(f"{path}, line {reader.line_num}", record) for record in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    for where, record in records:
        if None in record or None in record.values():
            raise ValueError(f"{where}: expected {len(reader.fieldnames or ())} values, as the header has.")
    return records


def read_text(record: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """
    Text of the first of `names` that is filled in, None if none is.

    Raises:
        ValueError: If a value is neither text nor a whole number, or two names disagree.
    """
    found: dict[str, str] = {}
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(f"{where}: `{name}` must be text, got {value!r}.")
        if str(value).strip():
            found[name] = str(value).strip()
    if len(set(found.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(f'`{name}`' for name in found)} mean the same but differ.")
    return next(iter(found.values()), None)


def read_labels(record: Mapping[str, Any], where: str) -> dict[str, int | None]:
    """Labels that a record has a field for, parsed."""
    return {name: parse_label(record[name], source=where, name=name) for name in LABELS if name in record}


def _parse_row(path: Path, index: int, where: str, record: Mapping[str, Any], require_video: bool) -> ManifestRow:
    text = {name: read_text(record, names, where) for name, names in FIELDS.items()}
    video = path.parent / text["video"] if text["video"] else None
    image = path.parent / text["image"] if text["image"] else None
    last_image = path.parent / text["last_image"] if text["last_image"] else None
    if require_video and video is None:
        raise ValueError(f"{where}: `video` is missing.")
    media = video or image
    return ManifestRow(
        where=where,
        id=text["id"] or (media.stem if media else f"prompt_{index:06d}"),
        # A clip with nothing but a long caption is described by that.
        prompt=text["prompt"] or text["long_prompt"] or "",
        long_prompt=text["long_prompt"] if text["prompt"] else None,
        video=video,
        image=image,
        last_image=last_image,
        pair_id=text["pair_id"],
        rejected_id=text["rejected_id"],
        labels=read_labels(record, where),
    )
