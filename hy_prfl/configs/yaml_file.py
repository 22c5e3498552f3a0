"""Reads YAML files strictly. Errors have one line and name the place in the file."""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """Refuses repeated keys. PyYAML alone would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' appears twice", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class TextLoader(StrictLoader):
    """
    Leaves scalars as text, except null, because the field decides the type of a value.

    YAML 1.1 would read `010` as an octal number, `on` as true and `12:30` as 750.
    """


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(node.value)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    value = loader.construct_yaml_float(node)
    return str(node.value) if math.isfinite(value) else str(value)  # Python does not read `.inf`


for _kind in ("bool", "int", "timestamp"):
    TextLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _text)
TextLoader.add_constructor("tag:yaml.org,2002:float", _float)


def read_yaml(path: Path, loader: type[StrictLoader] = StrictLoader) -> Any:
    """
    Content of a YAML file, None for an empty one.

    Args:
        loader (`type`, defaults to `StrictLoader`):
            `TextLoader` returns values as text, for the caller to convert.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not valid YAML. The message names file, line and column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'.")
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{path}{place}: not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}.") from error
