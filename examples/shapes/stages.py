"""Runs commands in stages. A stage that is complete and has not changed since is not run again."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from examples.shapes.judge import write_json


RECIPES = Path("examples/shapes")
ONE_PROCESS, TWO_PROCESSES = Path("accelerate_configs/cpu.yaml"), Path("accelerate_configs/ddp_cpu.yaml")


class StageError(RuntimeError):
    """A command of a stage has failed."""


@dataclass(frozen=True)
class Stage:
    """Commands that write `outputs`, which are paths below the root folder of the stages."""

    name: str
    title: str
    commands: list[list[str]]
    outputs: list[str]

    def digest(self) -> str:
        """Hash of the commands and of the recipes that they read."""
        recipes = [Path(word) for command in self.commands for word in command if word.endswith(".yaml")]
        text = json.dumps(self.commands) + "".join(path.read_text(encoding="utf-8") for path in recipes)
        return hashlib.sha256(text.encode()).hexdigest()

    def record(self, root: Path) -> Path:
        return root / "stages" / f"{self.name}.json"

    def is_complete(self, root: Path) -> bool:
        """Whether the same commands have written these outputs before."""
        record = self.record(root)
        return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["digest"] == self.digest()

    def run(self, root: Path, log: Path | None = None) -> None:
        """
        Run the commands, then write a record that they are complete, with the seconds that they took.

        Args:
            log (`Path`, *optional*):
                File for the commands' output, instead of the terminal.

        Raises:
            StageError: If a command fails.
        """
        self.record(root).unlink(missing_ok=True)
        for output in self.outputs:
            shutil.rmtree(root / output, ignore_errors=True)
        start = time.monotonic()
        for command in self.commands:
            run_command(command, log)
        write_json(self.record(root), {"digest": self.digest(), "seconds": time.monotonic() - start})

    def seconds(self, root: Path) -> float:
        """Seconds that the stage took, from its record."""
        return json.loads(self.record(root).read_text(encoding="utf-8"))["seconds"]


def run_stages(stages: Sequence[Stage], root: Path, fresh: bool) -> dict[str, float]:
    """
    Run the first stage that is not complete, and all stages after it. Returns the seconds that each stage took.

    Raises:
        StageError: If a command fails. Its stage is then not complete.
    """
    for number, stage in enumerate(stages, 1):
        fresh = fresh or not stage.is_complete(root)
        print(f"\n[{number}/{len(stages)}] {stage.title}" + ("" if fresh else ": complete"), flush=True)
        if fresh:
            stage.run(root)
    return {stage.name: stage.seconds(root) for stage in stages}


def run_command(command: list[str], log: Path | None = None) -> None:
    """Run one command on the CPU. Its output goes to the terminal, or is appended to a file."""
    shown = (
        " ".join(command)
        .replace(sys.executable, "python")
        .replace("python -m accelerate.commands.launch", "accelerate launch")
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}
    # A second thread does not speed up operations this small, and makes them much slower if it shares a core.
    environment.setdefault("OMP_NUM_THREADS", "1")
    if log is not None or not sys.stderr.isatty():
        environment.setdefault("TQDM_MININTERVAL", "20")
    with nullcontext() if log is None else log.open("a", encoding="utf-8") as file:
        print(f"$ {shown}", file=file, flush=True)
        code = subprocess.run(command, env=environment, check=False, stdout=file, stderr=file).returncode
    if code != 0:
        where = "" if log is None else f"\nIts output is in '{log}'."
        raise StageError(f"this command failed with exit code {code}:\n  {shown}{where}")


def python(module: str, options: list[str]) -> list[str]:
    """Command that runs a script in this folder."""
    return [sys.executable, "-m", f"examples.shapes.{module}", *options]


def launch(verb: str, options: list[str], *, two_processes: bool = False, recipes: Path = RECIPES) -> list[str]:
    """Command that runs one of the package's scripts with its recipe in `recipes`, this folder by default."""
    accelerate_config = TWO_PROCESSES if two_processes else ONE_PROCESS
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config)]
    return [*accelerate, "-m", f"hy_prfl.scripts.{verb}", "--config", str(recipes / f"{verb}.yaml"), *options]
