"""Reads lists of clips: JSON, JSON Lines or CSV. A broken list is an error before any model is loaded."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .listed_files import ListedFiles
from .records import columns_of, describe_columns, read_records, read_text
from .schema import LABELS, parse_label


logger = logging.getLogger(__name__)

# Field of a row -> its possible names in a manifest. The later names are those of upstream's `temp_input_data.json` and
# of other trainers.
FIELDS = {
    "id": ("id", "source_id"),
    "video": ("video", "video_path", "file_name", "file_path", "path"),
    "prompt": ("caption", "prompt", "short_caption", "text"),
    "long_prompt": ("long_caption", "long_prompt"),
    "image": ("image", "first_image", "image_path"),
    "last_image": ("last_image", "last_image_path"),
    "pair_id": ("pair_id",),
    "rejected_id": ("rejected_id",),
}
LABEL_FIELDS = {name: (name,) for name in LABELS}


RowT = TypeVar("RowT", bound="ManifestRow")


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """
    One clip of a manifest.

    `where` is its place in the file, for messages. `prompt` is empty if there is none. `missing` has an error text for
    each of its files that does not exist, by path.
    """

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
    missing: Mapping[Path, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """Files of the row; they need not exist."""
        return [path for path in (self.video, self.image, self.last_image) if path is not None]

    @property
    def content(self) -> dict[str, Any]:
        """Content of the row by field, after paths are resolved. Rows with equal content are repeats."""
        paths = {name: getattr(self, name) for name in ("video", "image", "last_image")}
        texts = {name: getattr(self, name) for name in ("id", "prompt", "long_prompt", "pair_id", "rejected_id")}
        labels = {name: value for name, value in self.labels.items() if value is not None}
        return {**{name: path and path.resolve() for name, path in paths.items()}, **texts, "labels": labels}


def read_manifest(path: str | Path, require_video: bool = True) -> list[ManifestRow]:
    """
    Read a manifest: a JSON list, JSON Lines or CSV, by the file's suffix; see `records.read_records`.

    | field | meaning |
    |---|---|
    | `id` (`source_id`) | unique name of the clip; the stem of its video file if left out |
    | `video` (`video_path`, `file_name`, `file_path`, `path`) | absolute, or relative to the working directory or else the \
manifest's folder |
    | `caption` (`prompt`, `short_caption`, `text`) | what the clip shows |
    | `long_caption` (`long_prompt`) | a longer text for the same clip, optional |
    | `text_alignment`, `blur_quality`, `physics_quality`, `human_quality` | 1/0, "good"/"poor" or null, optional |
    | `pair_id` | clips with the same `pair_id` show the same scene, optional |
    | `rejected_id` | id of the clip that this one is better than, optional |
    | `image` (`first_image`, `image_path`) | first frame of an image-to-video prompt without a video, optional |
    | `last_image` (`last_image_path`) | its last frame, for pipelines that need one (FLF2V), optional |

    A caption such as `nan`, `None` or `N/A` counts as missing. Rows that repeat an earlier one are left out, and their
    number is logged. Names of files that exist both in the working directory and in the manifest's folder are logged too.

    Args:
        require_video (`bool`, defaults to `True`):
            Whether every row must name a video. For prompt-only datasets they need not.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file or one of its rows is broken, or there is no column of captions or of videos. The message
            names file, row and field. Missing files and empty captions are not errors here: they concern single clips.
    """
    path = Path(path)
    # `generate` writes the seed of each video into its manifest.
    fields = FIELDS | LABEL_FIELDS | {"seed": ("seed",)}
    records = read_records(path, fields)
    if not records:
        raise ValueError(f"{path}: the manifest has no rows.")
    columns = columns_of(records)
    if not any(name in columns for name in (*FIELDS["prompt"], *FIELDS["long_prompt"])):
        raise ValueError(f"{path}: there is no column `caption`. {describe_columns(columns, fields)}")
    files = ListedFiles(path)
    rows = [_parse_row(files, index, where, record, require_video) for index, (where, record) in enumerate(records)]
    files.warn_of_names_in_both()
    unique = unique_rows(rows)
    warn_of_repeats(path, len(rows), len(unique))
    known = {name for names in fields.values() for name in names}
    ignored = sorted(set(columns) - known)
    if ignored:
        logger.warning(f"{path}: these fields are not known and are ignored: {', '.join(ignored)}.")
    return unique


def unique_rows(rows: Sequence[RowT]) -> list[RowT]:
    """
    Rows without those that repeat an earlier row.

    Raises:
        ValueError: If different rows share an id, or a `rejected_id` is not the id of another row.
    """
    first: dict[str, RowT] = {}
    for row in rows:
        known = first.setdefault(row.id, row)
        if known is row or known.content == row.content:
            continue
        different = [f"`{name}`" for name, value in row.content.items() if value != known.content.get(name)]
        raise ValueError(
            f"{row.where}: `id` {row.id!r} is already taken by {known.where}; the two differ in {', '.join(different)}, "
            "and ids must be unique."
        )
    for row in first.values():
        if row.rejected_id is not None and (row.rejected_id not in first or row.rejected_id == row.id):
            raise ValueError(f"{row.where}: `rejected_id` {row.rejected_id!r} is not the id of another row.")
    return list(first.values())


def warn_of_repeats(path: Path, num_rows: int, num_unique: int) -> None:
    """Log how many rows of a list are left out because they repeat an earlier one."""
    if num_unique < num_rows:
        logger.warning(f"{path}: {num_rows - num_unique} of {num_rows} rows repeat an earlier one and are left out.")


def read_labels(record: Mapping[str, Any], where: str) -> dict[str, int | None]:
    """Parsed labels of a record; None where a value is missing."""
    return {name: parse_label(record[name], source=where, name=name) for name in LABELS if name in record}


def _parse_row(
    files: ListedFiles, index: int, where: str, record: Mapping[str, Any], require_video: bool
) -> ManifestRow:
    text = {name: read_text(record, names, where) for name, names in FIELDS.items()}
    video, image, last_image = (files.find(text[name]) for name in ("video", "image", "last_image"))
    if require_video and video is None:
        raise ValueError(f"{where}: `video` is missing. {describe_columns(list(record), FIELDS)}")
    media = video or image
    return ManifestRow(
        where=where,
        id=text["id"] or (media.stem if media else f"prompt_{index:06d}"),
        # A clip with only a long caption uses that one.
        prompt=text["prompt"] or text["long_prompt"] or "",
        long_prompt=text["long_prompt"] if text["prompt"] else None,
        video=video,
        image=image,
        last_image=last_image,
        pair_id=text["pair_id"],
        rejected_id=text["rejected_id"],
        labels=read_labels(record, where),
        missing=files.missing(text["video"], text["image"], text["last_image"]),
    )
