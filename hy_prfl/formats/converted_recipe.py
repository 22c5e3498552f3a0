"""A converted YAML file of HY-Video-PRFL: options, commands to run, and what was not carried over."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..runtime.atomic_writes import write_text


PROJECT = Path(__file__).parents[2]
LAUNCH_FOLDERS = ("accelerate_configs", "ds_configs")
# The page with every key and flag of upstream.
TABLE = "docs/upstream.md"


@dataclass
class ConvertedRecipe:
    """
    The result of converting one of upstream's files.

    Args:
        source (`Path`): Upstream's file.
        command (`str`): The command that takes the options: `preprocess`, `train_reward`, `train_prfl` or `score`.
        options (`dict[str, Any]`): Names and values of that command's options.
        origins (`dict[str, str]`): For each option, where its value comes from.
        notes (`list[str]`): What was not carried over, with the reason.
        first (`list[str]`): Shell commands to run before, in this order. They create the files that the options name.
        launch_config (`str`, *optional*): Name of the file in `accelerate_configs/` with the same sharding. If left
            out, the command runs in one process, without `accelerate launch`.
        launch_options (`str`): Options that the command needs besides the YAML file.
        folder (`str`): Folder that the command runs in.
    """

    source: Path
    command: str
    options: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    launch_config: str | None = None
    launch_options: str = ""
    folder: str = "."

    def commands(self, name: str) -> list[str]:
        """
        Shell commands that run the recipe, one after the other, in the current folder.

        Args:
            name (`str`): Path of the YAML file that `to_yaml` wrote.
        """
        if self.folder != ".":
            config, target = (shlex.quote(os.path.abspath(path)) for path in (name, self.options["output_dir"]))
            command = f"hy-prfl {self.command} --config {config} --output_dir {target}"
            return [*self.first, f"(cd {shlex.quote(self.folder)} && {command})"]
        launch = f"hy-prfl {self.command}"
        if self.launch_config is not None:
            config = f"accelerate_configs/{self.launch_config}.yaml"
            launch = f"accelerate launch --config_file {config} -m hy_prfl.scripts.{self.command}"
        return [*self._links(), *self.first, f"{launch} --config {shlex.quote(name)}{self.launch_options}"]

    def plan(self, name: str) -> str | None:
        """Shell command that estimates memory and time on each GPU; None if the recipe is not for training."""
        if self.launch_config is None or not self.command.startswith("train"):
            return None
        degree = self.options["context_parallel_degree"]
        num_gpus = -(-(16 if "multi_node" in self.launch_config else 8) // degree) * degree
        stage = 3 if "zero3" in self.launch_config else 2 if "zero2" in self.launch_config else 0
        words = [f"hy-prfl plan --config {shlex.quote(name)} --num_gpus {num_gpus} --zero_stage {stage}"]
        if "offload" in self.launch_config:
            words.append("--offload true")
        named = " ".join(str(self.options[name]) for name in ("pretrained_model_name_or_path", "train_dataset"))
        words.append("--height 704 --width 1280" if "720" in named else "--height 480 --width 832")
        return " ".join(words)

    def to_yaml(self, name: str = "recipe.yaml") -> str:
        """
        Text of a YAML file for `--config`.

        Args:
            name (`str`, defaults to `"recipe.yaml"`):
                Path of the YAML file, for the commands in its first lines.
        """
        lines = [f"# From HY-Video-PRFL's {self.source.name}. Run in this folder, in this order:"]
        lines += [f"#   {command}" for command in self.commands(name)]
        plan = self.plan(name)
        if plan is not None:
            lines += ["# Estimate memory and time before you start:", f"#   {plan}"]
        for option, value in self.options.items():
            text = yaml.safe_dump([value], default_flow_style=True, width=10_000, allow_unicode=True).strip()[1:-1]
            lines.append(f"{option}: {text}  # {self.origins[option]}")
        lines += ["", "# Not carried over, or changed:"]
        lines += [f"# - {note}" for note in self.notes]
        lines += [f"# All of upstream's keys and flags: {TABLE} of hy_prfl."]
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
        write_text(path, self.to_yaml(str(path)))

    def _links(self) -> list[str]:
        """Command that links the launch files, which refer to each other, into the current folder if they are elsewhere."""
        missing = [PROJECT / name for name in LAUNCH_FOLDERS if not Path(name).is_dir()]
        if self.launch_config is None or not all(folder.is_dir() for folder in missing):
            return []
        return [f"ln -sf {' '.join(shlex.quote(str(folder)) for folder in missing)} ."] if missing else []
