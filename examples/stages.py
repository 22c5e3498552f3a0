"""Runs commands in stages, each once: a stage that is complete, and has not changed since, is not run again."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from hy_prfl.runtime.atomic_writes import write_text


class StageError(RuntimeError):
    """A command of a stage has failed."""


@dataclass(frozen=True)
class Stage:
    """
    Commands that make `outputs`, files or folders below the folder that the stages are run for.

    Args:
        name, title (`str`):
            Name of its record, and what to print when it begins.
        commands (`list[list[str]]`):
            Commands, run in turn.
        outputs (`list[str]`):
            What they make. It is deleted before they run.
        resumes (`bool`, defaults to `False`):
            Whether the commands go on by themselves where they were stopped. Then the outputs of a stage that did not
            end are kept, unless the stage has changed since.
        inputs (`list[Path]`):
            Text files that the stage depends on, besides the recipes (`.yaml`) in its commands.
        environment (`Mapping[str, str]`):
            Environment variables of the commands, on top of those of this process.
        results (`list[str]`):
            Files or folders among the outputs that are there only if the commands came to their end. A training that is
            asked to stop (SIGTERM) saves a checkpoint and ends without an error.
    """

    name: str
    title: str
    commands: list[list[str]]
    outputs: list[str]
    resumes: bool = False
    inputs: list[Path] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=dict)
    results: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """Changes with the commands, the recipes they read and the inputs."""
        recipes = [Path(word) for command in self.commands for word in command if word.endswith(".yaml")]
        files = "".join(path.read_text(encoding="utf-8") for path in [*recipes, *self.inputs])
        return hashlib.sha256((json.dumps(self.commands) + files).encode()).hexdigest()

    def record(self, root: Path) -> Path:
        return root / "stages" / f"{self.name}.json"

    def is_complete(self, root: Path) -> bool:
        """Whether the same commands have made these outputs before."""
        return self._state(root) == "complete"

    def run(self, root: Path, log: Path | None = None) -> None:
        """
        Run the commands, and note that they are complete and how many seconds they took.

        Args:
            log (`Path`, *optional*):
                File for their output, instead of the terminal.

        Raises:
            StageError: If a command fails, or ends without its result.
        """
        if not (self.resumes and self._state(root) == "begun"):
            for output in self.outputs:
                shutil.rmtree(root / output, ignore_errors=True)
                if (root / output).is_file():
                    (root / output).unlink()
        self._note(root, None)
        start = time.monotonic()
        for command in self.commands:
            run_command(command, log, self.environment)
        for result in self.results:
            if not (root / result).exists():
                raise StageError(f"'{self.title}' ended without '{root / result}': it was stopped.{_where(log)}")
        self._note(root, time.monotonic() - start)

    def seconds(self, root: Path) -> float:
        """How long it took when it was run; of a stage that was resumed, since then."""
        return json.loads(self.record(root).read_text(encoding="utf-8"))["seconds"]

    def _state(self, root: Path) -> str:
        """`complete`, `begun` by the same commands, or `other`."""
        record = self.record(root)
        if not record.is_file():
            return "other"
        noted = json.loads(record.read_text(encoding="utf-8"))
        if noted["digest"] != self.digest():
            return "other"
        return "begun" if noted["seconds"] is None else "complete"

    def _note(self, root: Path, seconds: float | None) -> None:
        record = self.record(root)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps({"digest": self.digest(), "seconds": seconds}, indent=1))


def run_stages(stages: Sequence[Stage], root: Path, fresh: bool) -> dict[str, float]:
    """
    Run what is not complete, and all that comes after it; returns the seconds that each stage took.

    Raises:
        StageError: If a command fails; its stage is not complete then.
    """
    for number, stage in enumerate(stages, 1):
        fresh = fresh or not stage.is_complete(root)
        print(f"\n[{number}/{len(stages)}] {stage.title}" + ("" if fresh else ": complete"), flush=True)
        if fresh:
            stage.run(root)
    return {stage.name: stage.seconds(root) for stage in stages}


def run_command(command: list[str], log: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Run one command with its output on the terminal, or at the end of a file."""
    shown = (
        " ".join(command)
        .replace(sys.executable, "python")
        .replace("python -m accelerate.commands.launch", "accelerate launch")
    )
    variables = os.environ | {"TOKENIZERS_PARALLELISM": "false"} | dict(environment or {})
    if log is not None or not sys.stderr.isatty():
        variables.setdefault("TQDM_MININTERVAL", "20")
    with nullcontext() if log is None else log.open("a", encoding="utf-8") as file:
        print(f"$ {shown}", file=file, flush=True)
        code = subprocess.run(command, env=variables, check=False, stdout=file, stderr=file).returncode
    if code != 0:
        raise StageError(f"this command failed with exit code {code}:\n  {shown}{_where(log)}")


def _where(log: Path | None) -> str:
    return "" if log is None else f"\nIts output is in '{log}'."


def launch(accelerate_config: Path | str, verb: str, options: Sequence[str]) -> list[str]:
    """What a user types to run one of the package's scripts with `accelerate launch`."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config)]
    return [*accelerate, "-m", f"hy_prfl.scripts.{verb}", *options]
