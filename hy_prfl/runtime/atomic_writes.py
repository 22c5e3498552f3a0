"""Atomic writes: a reader finds either the complete old file or folder, or the complete new one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_name(target: Path, tag: str = "") -> Path:
    """Path of a file or folder while it is being written."""
    return target.with_name(f".{target.name}{tag}.tmp")


def temporary_folder(target: Path) -> Path:
    """Path to write a folder to before `replace_folder` renames it. Leftovers of a killed run are removed."""
    temporary = temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def replace_folder(temporary: Path, target: Path) -> None:
    """
    Give a finished temporary folder its final name, and remove an older folder of that name.

    The older folder is removed last, so the new one may hold tables that are memory-mapped from it. If the process is
    killed between the two renames, there is no folder of that name until `recover_folder` restores the old one.
    """
    recover_folder(target)
    outdated = _outdated(target)
    if target.exists():
        target.rename(outdated)
    temporary.rename(target)
    shutil.rmtree(outdated, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """
    Undo or finish a `replace_folder` that was interrupted between its two renames or after them.

    Several processes may call it at the same time.
    """
    outdated = _outdated(target)
    if outdated.exists() and target.exists():
        shutil.rmtree(outdated, ignore_errors=True)
    elif outdated.exists():
        move(outdated, target)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder. It is no error if another process has just done it."""
    try:
        source.rename(target)
    except FileNotFoundError:
        if not target.exists():
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path, *, tag: str = "") -> Iterator[Path]:
    """
    Yield a temporary path. The file is renamed to `path` at the end of the context, unless an exception was raised.

    Args:
        tag (`str`):
            Part of the temporary name, to be different in each process that writes the same file.
    """
    temporary = temporary_name(path, tag)
    yield temporary
    temporary.replace(path)


def _outdated(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
