"""YAML files that people write: read strictly, with errors of one line that name the place."""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice, where PyYAML keeps the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' comes twice", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class TextLoader(StrictLoader):
    """
    Leaves scalars as they are written, except null.

    What type a value has is known to the field that it is for. YAML 1.1 would make an octal number of `010`, true of `on`
    and 750 of `12:30`.
    """


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(node.value)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    value = loader.construct_yaml_float(node)
    return str(node.value) if math.isfinite(value) else str(value)  # `.inf` is no number for Python


for _kind in ("bool", "int", "timestamp"):
    TextLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _text)
TextLoader.add_constructor("tag:yaml.org,2002:float", _float)


def read_yaml(path: Path, loader: type[StrictLoader] = StrictLoader) -> Any:
    """
    What a YAML file holds, None for an empty one.

    Args:
        loader (`type`, defaults to `StrictLoader`):
            `TextLoader` to leave the types of values to the caller.

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
