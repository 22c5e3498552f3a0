"""Stages of this world: on the CPU, without a network, with the recipes of this folder."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from examples import stages


RECIPES = Path("examples/shapes")
ONE_PROCESS, TWO_PROCESSES = Path("accelerate_configs/cpu.yaml"), Path("accelerate_configs/ddp_cpu.yaml")


def on_the_cpu() -> dict[str, str]:
    """Environment of its commands."""
    # Operations this small gain nothing from a second thread, and lose a lot if it has to share its core.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads}


@dataclass(frozen=True)
class Stage(stages.Stage):
    """A stage on the CPU."""

    environment: Mapping[str, str] = field(default_factory=on_the_cpu)


def python(module: str, options: list[str]) -> list[str]:
    """Command that runs a script in this folder."""
    return [sys.executable, "-m", f"examples.shapes.{module}", *options]


def launch(verb: str, options: list[str], *, two_processes: bool = False, recipes: Path = RECIPES) -> list[str]:
    """Command that runs one of the package's scripts with its recipe in `recipes`, this folder by default."""
    accelerate_config = TWO_PROCESSES if two_processes else ONE_PROCESS
    return stages.launch(accelerate_config, verb, ["--config", str(recipes / f"{verb}.yaml"), *options])
