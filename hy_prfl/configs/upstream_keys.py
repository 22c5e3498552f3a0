"""One of HY-Video-PRFL's YAML files while it is translated: its keys, what became of them, and the new file's text."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .yaml_file import read_yaml


@dataclass
class ConvertedRecipe:
    """
    What became of one of upstream's files.

    Args:
        source (`Path`): That file.
        command (`str`): The command that takes the options: `preprocess`, `train_reward`, `train_prfl` or `score`.
        options (`dict[str, Any]`): Names and values of that command's configuration.
        origins (`dict[str, str]`): For each option what it was made from, or why it has its value.
        notes (`list[str]`): What was not carried over, with the reason.
        first (`list[str]`): Commands that make what the options name, to be run first, in the folder upstream ran in.
        launch_config (`str`): Name of the file in `accelerate_configs/` that shards as the recipe did.
    """

    source: Path
    command: str
    options: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    launch_config: str = "single_gpu"

    def to_yaml(self, name: str = "recipe.yaml") -> str:
        """
        Text of a YAML file for `--config`.

        Args:
            name (`str`, defaults to `"recipe.yaml"`):
                Name of that file, for the command in its head.
        """
        lines = [f"# From HY-Video-PRFL's {self.source.name}."]
        lines += [
            f"#   accelerate launch --config_file accelerate_configs/{self.launch_config}.yaml "
            f"-m hy_prfl.scripts.{self.command} \\",
            f"#       --config {shlex.quote(name)}",
        ]
        for option, value in self.options.items():
            text = yaml.safe_dump([value], default_flow_style=True, width=10_000, allow_unicode=True).strip()[1:-1]
            lines.append(f"{option}: {text}  # {self.origins[option]}")
        if self.first:
            lines += ["", "# To be run first, in the folder that upstream ran in:"]
            lines += [f"#   {command}" for command in self.first]
        lines += ["", "# Not carried over, or not as it was:"]
        lines += [f"# - {note}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        """
        Write the YAML file, complete or not at all.

        Raises:
            FileExistsError: If there is one already.
        """
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"`output` '{path}' exists already.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(self.to_yaml(str(path)), encoding="utf-8")
        os.replace(temporary, path)


class RecipeKeys:
    """The keys of one file by dotted name, and which of them are dealt with."""

    def __init__(self, path: Path) -> None:
        values = read_yaml(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of sections, got {type(values).__name__}.")
        self.path = path
        self.values = flatten(values)
        self.left = set(self.values)
        self.recipe = ConvertedRecipe(path, "")
        for key, value in self.values.items():
            if "${" in str(value):
                self.refuse(key, "a value; `${...}` is not filled in here")

    def take(self, key: str, default: Any = None) -> Any:
        """Value of a key, `default` if it is missing or null."""
        self.left.discard(key)
        value = self.values.get(key)
        return default if value is None or value == "" else value

    def require(self, key: str) -> Any:
        """Value of a key that upstream's code cannot do without."""
        value = self.take(key)
        if value is None:
            raise ValueError(f"{self.path}: `{key}` is missing.")
        return value

    def number(self, key: str, default: Any = None) -> Any:
        """A number; PyYAML takes `1e-6` for a string, and upstream writes `5.` where it means 5."""
        value = self.take(key, default)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.refuse(key, "a number")
        return int(number) if number.is_integer() else number

    def whole(self, key: str, default: int | None = None) -> Any:
        """A whole number."""
        number = self.number(key, default)
        if isinstance(number, float):
            self.refuse(key, "a whole number")
        return number

    def choice(self, key: str, choices: dict[str, Any]) -> Any:
        """What a value stands for; None if the key is missing or null."""
        value = self.take(key)
        if value is not None and value not in choices:
            self.refuse(key, f"one of {', '.join(choices)}")
        return None if value is None else choices[value]

    def option(self, name: str, value: Any, origin: str) -> None:
        """Set an option; `origin` says where its value is from."""
        if value is not None:
            self.recipe.options[name] = value
            self.recipe.origins[name] = origin

    def carry(self, key: str, name: str, read: Callable[[str], Any] | None = None) -> None:
        """Carry one key over as the option `name`."""
        self.option(name, self.take(key) if read is None else read(key), key)

    def expect(self, key: str, value: Any, wanted: str, reason: str) -> None:
        """Refuse any value of a key but one, and say why that one needs no option."""
        if self.values.get(key) not in (None, value):
            self.refuse(key, wanted)
        self.drop(key, reason)

    def drop(self, key: str, reason: str) -> None:
        """Note that a key, or all keys of a section, are not carried over; a null says nothing and needs no note."""
        for name in sorted(self.left):
            if name == key or name.startswith(f"{key}."):
                self.left.discard(name)
                if self.values[name] is not None:
                    self.note(f"{name}: {self.values[name]}: {reason}.")

    def note(self, text: str) -> None:
        """Tell the user something."""
        self.recipe.notes.append(text)

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Stop at a value that has no counterpart."""
        raise ValueError(f"{self.path}: `{key}` must be {wanted}, got {self.values.get(key)!r}.")


def flatten(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def note_weights(keys: RecipeKeys, key: str, path: str) -> None:
    """Say how training starts from a generator in upstream's format."""
    keys.note(
        f"{key}: to start from these weights: hy-prfl convert --transformer {shlex.quote(path)} --output_dir "
        "converted/transformer, and put that into a copy of the pipeline, as its folder `transformer`."
    )


def convert_reward_model(keys: RecipeKeys, prefix: str) -> bool:
    """Whether the recipe names the three files of a reward model; the option is where their conversion goes."""
    parts = {"reward_transformer": "transformer", "mlp": "mlp", "query_attention": "query_attention"}
    paths = {option: keys.take(f"model.{prefix}_{part}_path") for option, part in parts.items()}
    if not any(paths.values()):
        return False
    for option, path in paths.items():
        if path is None:
            raise ValueError(f"{keys.path}: `model.{prefix}_*_path` must name three files; {option} is missing.")
    target = "converted/reward_model"
    options = " ".join(f"--{name} {shlex.quote(str(path))}" for name, path in paths.items())
    if (heads := keys.values.get("lrm.query_attention.num_heads")) not in (None, 8):
        options += f" --num_query_heads {heads}"
    if keys.values.get("lrm.query_attention.return_type") != "query":
        options += " --query_residual false"
    keys.option("reward_model", target, f"model.{prefix}_*_path, converted: see below")
    keys.recipe.first.append(f"hy-prfl convert {options} --output_dir {target}")
    return True


def convert_lists(keys: RecipeKeys, key: str, option: str, pipeline: str, more: Any = None) -> None:
    """List files, with `more` of them if there are, become the dataset that `preprocess` imports them into."""
    lists = keys.take(key)
    if not lists:
        return
    lists = [each for some in (lists, more or []) for each in ([some] if isinstance(some, str) else some)]
    target = f"data/{Path(str(lists[0])).stem}"
    keys.option(option, target, f"{key}, imported: see below")
    source = shlex.quote(str(lists[0]))
    if len(lists) > 1:
        source = f"{target}.list"
        keys.recipe.first.append(f"mkdir -p data && cat {quoted(lists)} > {source}")
    keys.recipe.first.append(
        f"hy-prfl preprocess --upstream_meta {source} --pretrained_model_name_or_path {pipeline} --output_dir {target}"
    )


def quoted(paths: Any) -> str:
    """A path, or several, as words of a shell command."""
    return " ".join(shlex.quote(str(path)) for path in ([paths] if isinstance(paths, str) else paths))
