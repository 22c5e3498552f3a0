"""Reads lists of prompts to generate videos from: JSON, JSON Lines, CSV, or a text file with one prompt per line."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .listed_files import ListedFiles
from .manifest import warn_of_repeats
from .records import describe_columns, read_records, read_text, read_whole_number
from .video import VideoError, read_image


# Field of a prompt -> its possible names. The later names are those of upstream's `temp_prfl_infer_data.json`.
FIELDS = {
    "caption": ("caption", "prompt", "short_caption", "text"),
    "id": ("id", "image_id"),
    "seed": ("seed",),
    "image": ("image", "first_image", "image_path"),
    "last_image": ("last_image", "last_image_path"),
}

# Longest name of a file in bytes, and the pattern of a video's name while it is written.
MAX_NAME, UNFINISHED = 255, ".{}.mp4.tmp"


@dataclass(frozen=True, kw_only=True)
class VideoPrompt:
    """
    One video to generate. Its `id` and `seed` make its name.

    `image` and `last_image` are for image-to-video pipelines. `missing` has an error text for each of them that does not
    exist, by path.
    """

    id: str
    caption: str
    seed: int = 0
    image: Path | None = None
    last_image: Path | None = None
    missing: Mapping[Path, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the video's file, without suffix."""
        return f"{self.id}_seed_{self.seed}"


def read_prompts(path: str | Path, *, seed: int = 0, num_videos_per_prompt: int = 1) -> list[VideoPrompt]:
    """
    Read a list of prompts: a JSON list, JSON Lines, CSV, or a text file (`.txt`) with one prompt per line.

    | field | meaning |
    |---|---|
    | `caption` (`prompt`, `short_caption`, `text`) | what the video should show |
    | `id` (`image_id`) | name of the prompt, letters, digits, `.`, `_` and `-`; the number of the row if left out |
    | `seed` | seed of the video's noise, a whole number from 0 to 10^18 - 1, optional |
    | `image` (`first_image`, `image_path`) | first frame, optional; absolute, or relative to the working directory or else \
the list's folder |
    | `last_image` (`last_image_path`) | last frame, likewise, optional |

    If a row with an id repeats an earlier row, it is left out, and the number of such rows is logged. Rows without an id
    are numbered and never count as repeats.

    Args:
        seed (`int`, defaults to 0):
            Seed of rows without their own.
        num_videos_per_prompt (`int`, defaults to 1):
            Videos for each row, with seeds `seed`, `seed + 1`, and so on.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file or a row is broken, has an unknown field or no caption, or if two different rows give
            videos of the same name. The message names file, row and field. Whether images exist is checked by
            `check_prompts`.
    """
    path = Path(path)
    records = read_records(path, FIELDS, lines_of="caption")
    if not records:
        raise ValueError(f"{path}: the file has no prompts.")
    files = ListedFiles(path)
    rows: dict[VideoPrompt, str] = {}
    for index, (where, record) in enumerate(records):
        rows.setdefault(_parse_prompt(files, index, where, record, seed), where)
    files.warn_of_names_in_both()
    warn_of_repeats(path, len(records), len(rows))
    prompts: list[VideoPrompt] = []
    first: dict[str, str] = {}
    for row, where in rows.items():
        for offset in range(num_videos_per_prompt):
            prompt = dataclasses.replace(row, seed=row.seed + offset)
            if prompt.seed >= 10**18:
                raise ValueError(f"{where}: `seed` {row.seed}: the seed of its video {offset + 1} is 10^18 or more.")
            too_long = len(UNFINISHED.format(prompt.name)) - MAX_NAME
            if too_long > 0:
                raise ValueError(
                    f"{where}: `id` {prompt.id!r} is too long for a file name, at most {len(prompt.id) - too_long} "
                    "characters are allowed."
                )
            if prompt.name in first:
                raise ValueError(
                    f"{where}: `id` {prompt.id!r} with seed {prompt.seed} is already taken by {first[prompt.name]}."
                )
            first[prompt.name] = where
            prompts.append(prompt)
    return prompts


def check_prompts(prompts: Sequence[VideoPrompt], *, image_to_video: bool, last_image: str) -> None:
    """
    Refuse prompts whose images are missing, unreadable, or do not fit the pipeline.

    Args:
        image_to_video (`bool`):
            Whether the pipeline starts from an image.
        last_image (`str`):
            Whether the pipeline takes a last image: `"none"`, `"optional"` or `"required"`.

    Raises:
        ValueError: With the id of the prompt.
    """
    for prompt in prompts:
        where = f"prompt '{prompt.id}'"
        if not image_to_video and (prompt.image is not None or prompt.last_image is not None):
            raise ValueError(f"{where} has an image, but the pipeline is text-to-video and takes none.")
        if image_to_video and prompt.image is None:
            raise ValueError(f"{where}: `image` is missing, and the pipeline is image-to-video.")
        if prompt.last_image is not None and last_image == "none":
            raise ValueError(f"{where} has a `last_image`, but this pipeline takes only a first image.")
        if prompt.last_image is None and last_image == "required":
            raise ValueError(f"{where}: `last_image` is missing; this pipeline needs a first and a last image.")
    for file in sorted({file for prompt in prompts for file in (prompt.image, prompt.last_image) if file is not None}):
        user = next(prompt for prompt in prompts if file in (prompt.image, prompt.last_image))
        if file in user.missing:
            raise ValueError(f"prompt '{user.id}': {user.missing[file]}.")
        try:
            read_image(file)
        except VideoError as error:
            raise ValueError(f"prompt '{user.id}': {error}") from error


def _parse_prompt(files: ListedFiles, index: int, where: str, record: Mapping[str, Any], seed: int) -> VideoPrompt:
    unknown = sorted(set(record) - {name for names in FIELDS.values() for name in names})
    if unknown:
        raise ValueError(f"{where}: unknown fields: {', '.join(unknown)}. {describe_columns(list(record), FIELDS)}")
    text = {name: read_text(record, names, where) for name, names in FIELDS.items() if name != "seed"}
    if text["caption"] is None:
        raise ValueError(f"{where}: `caption` is missing. {describe_columns(list(record), FIELDS)}")
    prompt_id = text["id"] or f"{index:05d}"
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", prompt_id):
        raise ValueError(
            f"{where}: `id` becomes a file name and may have only letters, digits, '.', '_' and '-', got {prompt_id!r}."
        )
    own_seed = read_whole_number(record, "seed", where)
    return VideoPrompt(
        id=prompt_id,
        caption=text["caption"],
        seed=seed if own_seed is None else own_seed,
        image=files.find(text["image"]),
        last_image=files.find(text["last_image"]),
        missing=files.missing(text["image"], text["last_image"]),
    )
