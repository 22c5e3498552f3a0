"""Folders and text files that are replaced atomically: a reader finds the whole old one or the whole new one."""

import shutil
from pathlib import Path


def temporary_folder(target: Path) -> Path:
    """Where a folder is written before `replace_folder` gives it its name. Leftovers of a killed run are removed."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def replace_folder(temporary: Path, target: Path) -> None:
    """
    Give a finished temporary folder its final name; an older folder of that name disappears.

    The older one is removed only after that, so a table that is memory-mapped from it may be written back to it. A
    process killed between the two renames leaves no folder of that name; `recover_folder` brings the old one back.
    """
    recover_folder(target)
    outdated = _outdated(target)
    if target.exists():
        target.rename(outdated)
    temporary.rename(target)
    shutil.rmtree(outdated, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """
    Undo or finish the swap of `replace_folder` if it was cut off between its two renames, or after them.

    Several processes may call it at once.
    """
    outdated = _outdated(target)
    if outdated.exists() and target.exists():
        shutil.rmtree(outdated, ignore_errors=True)
    elif outdated.exists():
        move(outdated, target)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, unless another process has just done so."""
    try:
        source.rename(target)
    except FileNotFoundError:
        if not target.exists():
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _outdated(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
