"""Checks that output files and folders can be written, before any model is loaded."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


# Longest name of a file in bytes, and the length of the suffix while it is written (`.partial-00012.jsonl.tmp`).
MAX_NAME, ADDED = 255, 25


def check_output_folders(config: Any, *names: str) -> None:
    """Raise a `ValueError` if one of these options is given and its folder cannot be created or written to."""
    for name, path in _given(config, names):
        if path.is_file():
            raise ValueError(f"`{name}`: '{path}' is a file, not a folder.")


def check_output_files(config: Any, *names: str) -> None:
    """Raise a `ValueError` if one of these options is given and its file cannot be written."""
    for name, path in _given(config, names):
        if path.is_dir():
            raise ValueError(f"`{name}`: '{path}' is a folder, not a file.")


def _given(config: Any, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Name and path of each option that is given, after a check that the path can be written."""
    for name in names:
        path = getattr(config, name)
        if path is not None:
            check_writable(name, path)
            yield name, Path(path)


def check_writable(name: str, path: str) -> None:
    """
    Raise a `ValueError` that names the option if its file or folder cannot be written.

    This creates a temporary file in the deepest existing folder, because permissions alone do not show it.
    """
    if "\0" in path:
        raise ValueError(f"`{name}`: {path!r} contains a NUL character.")
    target = Path(path).absolute()
    for part in target.parts:
        length = len(os.fsencode(part)) + (ADDED if part == target.name else 0)
        if length > MAX_NAME:
            raise ValueError(f"`{name}`: the name '{part}' is too long; at most {MAX_NAME - ADDED} bytes are allowed.")
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    if existing != target and not existing.is_dir():
        raise ValueError(f"`{name}`: '{existing}' is a file, so '{path}' cannot be created.")
    folder = existing if existing.is_dir() else existing.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`{name}`: '{folder}' cannot be written to: {error.strerror}.") from error
