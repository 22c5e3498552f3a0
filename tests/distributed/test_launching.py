"""The way in which tests launch is that of users: `accelerate launch` trains the same, to the bit."""

import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .training import ENGINES, GLOBAL_BATCH_SIZE, WEIGHTS, launch, launch_command, train


@pytest.mark.launch
@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_launch_trains_what_a_real_one_does(inputs: Path, engine: str) -> None:
    size = GLOBAL_BATCH_SIZE if engine == "one process" else GLOBAL_BATCH_SIZE // 2
    arguments = (ENGINES[engine], "prfl", "full", 1, size)
    forked, real = train(inputs, f"forked-{engine}", *arguments), inputs / f"real-{engine}"
    command, environment = launch_command(inputs, real.name, *arguments)
    finished = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=900)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    weights, expected = (load_file(run / WEIGHTS["prfl", "full"]) for run in (forked, real))
    assert set(weights) == set(expected)
    assert all((weights[name] == value).all() for name, value in expected.items())
    assert (forked / "metrics.jsonl").read_text() == (real / "metrics.jsonl").read_text()


@pytest.mark.launch
def test_a_forked_launch_fails_as_a_real_one_does(inputs: Path) -> None:
    finished = launch(inputs, "refused", ENGINES["DDP"], "prfl", "full", 1, 2, ["--learning_rat=1"])
    assert finished.returncode != 0
    assert "error: command line: 'learning_rat' is not a field" in finished.stderr
    assert not (inputs / "refused").exists()
