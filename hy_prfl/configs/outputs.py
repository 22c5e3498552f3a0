"""Checks of what options want to be written, before anything is loaded."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


# Bytes of a file name, and what is added to it while it is written (`.partial-00012.jsonl.tmp`).
MAX_NAME, ADDED = 255, 25


def check_output_folders(config: Any, *names: str) -> None:
    """Raise a `ValueError` if one of these options is given and no such folder can be made or written to."""
    for name, path in _given(config, names):
        if path.is_file():
            raise ValueError(f"`{name}`: '{path}' is a file, not a folder.")


def check_output_files(config: Any, *names: str) -> None:
    """Raise a `ValueError` if one of these options is given and no such file can be written."""
    for name, path in _given(config, names):
        if path.is_dir():
            raise ValueError(f"`{name}`: '{path}' is a folder, not a file.")


def _given(config: Any, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Those of these options that are given, once it is clear that something can be written there."""
    for name in names:
        path = getattr(config, name)
        if path is not None:
            check_writable(name, path)
            yield name, Path(path)


def check_writable(name: str, path: str) -> None:
    """
    Raise a `ValueError` that names the option if its file or folder cannot be written, whatever it is.

    A file without a name is made in the deepest folder that is there. Permissions alone would not tell.
    """
    if "\0" in path:
        raise ValueError(f"`{name}`: there is a NUL in {path!r}.")
    target = Path(path).absolute()
    for part in target.parts:
        length = len(os.fsencode(part)) + (ADDED if part == target.name else 0)
        if length > MAX_NAME:
            raise ValueError(f"`{name}`: the name '{part}' is too long, at most {MAX_NAME - ADDED} bytes will do.")
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    if existing != target and not existing.is_dir():
        raise ValueError(f"`{name}`: '{existing}' is a file, so there can be no '{path}'.")
    folder = existing if existing.is_dir() else existing.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`{name}`: '{folder}' cannot be written to: {error.strerror}.") from error
