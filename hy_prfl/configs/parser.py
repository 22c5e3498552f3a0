"""Reads a config dataclass from a YAML file and the command line; the command line wins."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser


ConfigT = TypeVar("ConfigT")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


class ConfigParser(HfArgumentParser):
    """`transformers.HfArgumentParser` that reports a bad configuration as a `ValueError` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None = None, description: str | None = None
) -> ConfigT:
    """
    Build `config_class` from `--config FILE.yaml` and the remaining command line options.

    The YAML file is a flat mapping of field names. It is turned into command line options that are put in front of
    the user's own, so both go through the same type conversion (`learning_rate: 5e-6` is a float although YAML reads
    it as a string) and the user's options win.

    Args:
        config_class (`type`):
            A dataclass whose fields are the options. Its `__post_init__` checks the values.
        argv (`Sequence[str]`, *optional*):
            The options, `sys.argv[1:]` if not given.
        description (`str`, *optional*):
            The head of `--help`.

    Raises:
        ValueError: If the YAML file is not a flat mapping, holds a key that is no field, or if any value has the
            wrong type or is refused by the dataclass. The message names the field.
        FileNotFoundError: If the YAML file does not exist.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    config_parser = ConfigParser(add_help=False, allow_abbrev=False, dataclass_types=[])
    config_parser.add_argument("--config", type=Path, default=None)
    known, options = config_parser.parse_known_args(argv)

    parser = ConfigParser(
        dataclass_types=config_class,
        description=description,
        usage="%(prog)s --config FILE.yaml [--option value ...]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=None, help="YAML file with any of the options below.")
    for option in options:
        if option.startswith("--") and option != "--help":
            name = option.removeprefix("--").split("=")[0].replace("-", "_")
            positive = name.removeprefix("no_")  # `--no_flag` turns off a flag that is on by default
            _check_name(positive if hasattr(config_class, positive) else name, config_class, source="command line")
    if known.config is not None:
        options = yaml_to_options(known.config, config_class) + options
    namespace = parser.parse_args(options)
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(config_class) if field.init}  # type: ignore[arg-type]
    return config_class(**values)


def yaml_to_options(path: Path, config_class: type) -> list[str]:
    """Turn a flat YAML mapping into command line options; `null` leaves a field at its default."""
    if not path.is_file():
        raise FileNotFoundError(f"--config: there is no file '{path}'.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return []
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of field names to values, got {type(values).__name__}.")

    options: list[str] = []
    for name, value in values.items():
        _check_name(str(name), config_class, source=str(path))
        options.extend(_to_options(path, name, value))
    return options


def _check_name(name: str, config_class: type, *, source: str) -> None:
    names = [field.name for field in dataclasses.fields(config_class) if field.init]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"{source}: '{name}' is not a field of {config_class.__name__}.{hint}")


def _to_options(path: Path, name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        raise ValueError(f"{path}: '{name}' is a mapping; every field takes a single value or a list.")
    if isinstance(value, list):
        if any(isinstance(item, (list, dict)) or item is None for item in value):
            raise ValueError(f"{path}: '{name}' must be a list of single values, got {value!r}.")
        return [f"--{name}", *(str(item) for item in value)]
    return [f"--{name}={value}"]
