"""Checks that the files and folders named in options exist, before heavy imports."""

import re
from pathlib import Path
from typing import Any

from .native import check_not_native


# Form of a Hub id, `name` or `user/name`, by the Hub's own rules.
HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$|[^/]{97}))\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)
PIPELINE = "pretrained_model_name_or_path"


def check_files(config: Any, *names: str) -> None:
    """
    Raise a `FileNotFoundError` if one of these options is given and there is no such file; an option with several values
    is checked value by value.
    """
    for name in names:
        value = getattr(config, name)
        for path in value if isinstance(value, list) else [value]:
            if path is not None and not Path(path).is_file():
                raise FileNotFoundError(f"`{name}`: there is no file '{path}'.")


def check_paths(config: Any, *names: str) -> None:
    """Raise a `FileNotFoundError` if one of these options is given and there is no such file or folder."""
    for name in names:
        path = getattr(config, name)
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"`{name}`: there is no file or folder '{path}'.")


def check_sources(config: Any, *names: str, or_file: bool = False) -> None:
    """
    Raise a `FileNotFoundError` if one of these options is given and is neither a folder nor a possible Hub id.

    Each value of a list is checked. The Hub is not contacted. A pipeline in Wan's native format is a `ValueError`.

    Args:
        or_file (`bool`, defaults to `False`):
            Whether a file is accepted too.
    """
    given = {name: getattr(config, name) for name in names}
    for name, source in [
        (name, source) for name, value in given.items() for source in (value if isinstance(value, list) else [value])
    ]:
        if name == PIPELINE and source is not None:
            check_not_native(name, source)
        if source is None or Path(source).is_dir():
            continue
        if Path(source).exists() and not or_file:
            raise FileNotFoundError(f"`{name}`: '{source}' is a file, not a folder.")
        if not Path(source).exists() and not HUB_ID.fullmatch(source):
            kind = "file or folder" if or_file else "folder"
            raise FileNotFoundError(
                f"`{name}`: there is no {kind} '{source}', and it does not have the form of a Hub id (`user/name`)."
            )
