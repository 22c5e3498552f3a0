"""Checks of what options name, before anything is imported that could read it."""

import re
from pathlib import Path
from typing import Any

from .native import check_not_native


# A name that the Hub might know: `name` or `user/name`.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
PIPELINE = "pretrained_model_name_or_path"


def check_files(config: Any, *names: str) -> None:
    """Raise a `FileNotFoundError` if one of these options is given and there is no such file."""
    for name in names:
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"`{name}`: there is no file '{path}'.")


def check_paths(config: Any, *names: str) -> None:
    """Raise a `FileNotFoundError` if one of these options is given and there is neither such a file nor such a folder."""
    for name in names:
        path = getattr(config, name)
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"`{name}`: there is no file or folder '{path}'.")


def check_sources(config: Any, *names: str, or_file: bool = False) -> None:
    """
    Raise a `FileNotFoundError` if one of these options is given and is no folder, nor could be a Hub id.

    Whether the Hub has it is not asked here. A pipeline in Wan's native format is a `ValueError`.

    Args:
        or_file (`bool`, defaults to `False`):
            Whether a file will do as well.
    """
    for name in names:
        source = getattr(config, name)
        if name == PIPELINE and source is not None:
            check_not_native(name, source)
        if source is None or Path(source).is_dir():
            continue
        if Path(source).exists() and not or_file:
            raise FileNotFoundError(f"`{name}`: '{source}' is a file, not a folder.")
        if not Path(source).exists() and not HUB_ID.fullmatch(source):
            kind = "file or folder" if or_file else "folder"
            raise FileNotFoundError(
                f"`{name}`: there is no {kind} '{source}', and no Hub id (`user/name`) looks like this."
            )
