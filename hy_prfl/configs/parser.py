"""Builds a config dataclass from a YAML file and the command line. The command line has priority."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from .yaml_file import TextLoader, read_yaml


ConfigT = TypeVar("ConfigT")

# Environment variable that makes commands print tracebacks of mistakes; see `scripts/running.py`.
TRACEBACK_VARIABLE = "HY_PRFL_TRACEBACK"
EPILOG = (
    "A mistake in options or input ends in one line, `error: ...`, and exit code 2.\n"
    f"Set {TRACEBACK_VARIABLE}=1 in the environment to see its traceback."
)
# Texts for true and false, and names of the types of fields in errors.
TRUE, FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")
KINDS = {int: ("an integer", "integers"), float: ("a number", "numbers"), str: ("a text", "texts")}


class ConfigParser(argparse.ArgumentParser):
    """Reports a bad command line as a `ValueError` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"command line: {message}.")


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None = None, description: str | None = None
) -> ConfigT:
    """
    Build `config_class` from `--config FILE.yaml` and the remaining command line options.

    The YAML file is a flat mapping of field names to values; `null` leaves a field at its default. Values from both
    sources are converted in the same way (`learning_rate: 5e-6` is a float, although YAML reads it as a string). The
    command line has priority: over the same option, and over one that it stands in for (`instead_of` in a field's metadata).

    Fields have the type str, int, float, bool or `Literal`, another type that is made from one string, or a list of
    one of these. Each may be optional. A flag is given as `--flag`, `--flag true` or `--flag false`. A flag that is on by
    default is also turned off by `--no_flag`.

    Args:
        config_class (`type`):
            A dataclass whose fields are the options. Its `__post_init__` checks the values.
        argv (`Sequence[str]`, *optional*):
            The command line options, `sys.argv[1:]` if not given.
        description (`str`, *optional*):
            Text at the top of `--help`.

    Raises:
        ValueError: If the YAML file is not a flat mapping, if a name is not a field, or if a value has the wrong type or
            is refused by the dataclass. The message names the field.
        FileNotFoundError: If the YAML file does not exist.
    """
    argv = [_with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    if not {"-h", "--help"} & set(argv):
        # Checked first: otherwise the error could name the required option that is missing because another is misspelt.
        for name in (word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")):
            positive = name.removeprefix("no_")  # `--no_flag` turns off a flag that is on by default
            if name != "config":
                _check_name(positive if hasattr(config_class, positive) else name, config_class, source="command line")
    types = get_type_hints(config_class)
    given = vars(_build_parser(config_class, types, description).parse_args(argv))
    path = given.pop("config", None)
    values = {} if path is None else _read_file(Path(path), config_class, types)
    replaced = _alternatives(config_class, given)
    values = {name: value for name, value in values.items() if name not in replaced}
    values |= {name: _convert(name, value, types[name], "command line") for name, value in given.items()}
    missing = [
        f"`{field.name}`" for field in _fields(config_class) if _is_required(field) and field.name not in values
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given.")
    return config_class(**values)


def _fields(config_class: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config_class) if field.init]


def _alternatives(config_class: type, names: Collection[str]) -> set[str]:
    """Options that those with these names stand in for, by `instead_of` in their metadata, in either direction."""
    pairs = [
        (field.name, field.metadata["instead_of"]) for field in _fields(config_class) if "instead_of" in field.metadata
    ]
    return {other for pair in pairs for name, other in (pair, pair[::-1]) if name in names}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _with_underscores(word: str) -> str:
    """An option with the name of its field: `--output-dir=a-b` -> `--output_dir=a-b`. Other words are unchanged."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _check_name(name: str, config_class: type, *, source: str) -> None:
    names = [field.name for field in _fields(config_class)]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"{source}: '{name}' is not a field of {config_class.__name__}.{hint}")


def _build_parser(config_class: type, types: dict[str, Any], description: str | None) -> ConfigParser:
    """A parser that assigns texts to options. Types are converted later, together with the values of the YAML file."""
    # For `hy-prfl train_prfl`: argparse would show only `hy-prfl`.
    command = [word for word in sys.argv[1:2] if not word.startswith("-")]
    parser = ConfigParser(
        prog=" ".join([Path(sys.argv[0]).name, *command]),
        description=description,
        usage="%(prog)s --config FILE.yaml [--option value ...]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with any of the options below.")
    for field in _fields(config_class):
        kind, is_list = _scalar_type(types[field.name])
        choices = ("true", "false") if kind is bool else get_args(kind) if get_origin(kind) is Literal else None
        options: dict[str, Any] = {
            "help": _help(field),
            "metavar": field.name.upper() if choices is None else f"{{{','.join(map(str, choices))}}}",
        }
        if kind is bool and not is_list:
            options |= {"nargs": "?", "const": "true"}
        elif is_list:
            options |= {"nargs": "+"}
        parser.add_argument(f"--{field.name}", **options)
        if kind is bool and field.default is True:
            parser.add_argument(
                f"--no_{field.name}", dest=field.name, action="store_const", const="false", help="The opposite."
            )
    return parser


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata.get("help", ""))
    if field.default_factory is not dataclasses.MISSING:
        default = " ".join(map(str, field.default_factory()))
    else:
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    if _is_required(field):
        text += " (required)"
    elif default and field.default is not None:
        text += f" (default: {default})"
    return text.strip().replace("%", "%%")


def _read_file(path: Path, config_class: type, types: dict[str, Any]) -> dict[str, Any]:
    """The values of a flat YAML mapping, without those that are null."""
    values = read_yaml(path, TextLoader)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of field names to values, got {type(values).__name__}.")
    for name, value in values.items():
        _check_name(str(name), config_class, source=str(path))
        if isinstance(value, dict):
            raise ValueError(f"{path}: '{name}' is a mapping, but every field takes a single value or a list.")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise ValueError(f"{path}: '{name}' must be a list of single values, got {value!r}.")
    return {name: _convert(name, value, types[name], str(path)) for name, value in values.items() if value is not None}


def _scalar_type(hint: Any) -> tuple[Any, bool]:
    """The type of a field's value, or of the items of its list, and whether it is a list."""
    options = [option for option in get_args(hint) if option is not NoneType]
    if NoneType in get_args(hint) and len(options) == 1:
        hint = options[0]
    return (get_args(hint)[0], True) if get_origin(hint) is list else (hint, False)


def _convert(name: str, value: str | list[str], hint: Any, source: str) -> Any:
    """Convert the text of a field to its type. For a list, a single value is a list of one item."""
    kind, is_list = _scalar_type(hint)
    if not is_list and isinstance(value, list):
        raise ValueError(f"{source}: `{name}` must be a single value, got the list {value!r}.")
    items = [
        _convert_scalar(name, text, kind, is_list, source) for text in ([value] if isinstance(value, str) else value)
    ]
    return items if is_list else items[0]


def _convert_scalar(name: str, text: str, kind: Any, is_list: bool, source: str) -> Any:
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if text == str(choice):
                return choice
        wanted = f"one of {', '.join(map(str, get_args(kind)))}"
    elif kind is bool:
        if text.lower() in (*TRUE, *FALSE):
            return text.lower() in TRUE
        wanted = "true or false"
    else:
        try:
            return kind(text)
        except ValueError:
            wanted = KINDS.get(kind, (kind.__name__, f"a list of {kind.__name__}"))[is_list]
    raise ValueError(f"{source}: `{name}` must be {wanted}, got {text!r}.")
