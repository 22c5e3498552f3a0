"""Real launches of two processes: what they train is what one process trains, and a run goes on where it stopped."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.parity.parity import ENGINES, GLOBAL_BATCH_SIZE, WEIGHTS, relative_difference, train, write_inputs


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def in_project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch configurations name DeepSpeed's files relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.mark.launch
@pytest.mark.parametrize(("script", "tuning"), [("reward", "full"), ("prfl", "full"), ("prfl", "lora")])
def test_zero3_with_context_parallelism_equals_one_process(inputs: Path, script: str, tuning: str) -> None:
    file = WEIGHTS[script, tuning]
    one = train(inputs, f"one-{script}-{tuning}", ENGINES["one process"], script, tuning, 1, GLOBAL_BATCH_SIZE)
    two = train(inputs, f"two-{script}-{tuning}", ENGINES["ZeRO-3"], script, tuning, 2, GLOBAL_BATCH_SIZE)
    assert relative_difference(two / file, one / file) < 1e-5
    untrained = train(inputs, f"start-{script}-{tuning}", ENGINES["one process"], script, tuning, 1, 1, ["--max_train_steps=1", "--learning_rate=1e-12"])  # fmt: skip
    assert relative_difference(one / file, untrained / file) > 1e-4


@pytest.mark.launch
@pytest.mark.parametrize(("engine", "tuning"), [("DDP", "full"), ("ZeRO-3", "full"), ("ZeRO-3", "lora")])
def test_resuming_equals_never_having_stopped(inputs: Path, engine: str, tuning: str) -> None:
    file, options = WEIGHTS["prfl", tuning], ["--checkpointing_steps=2", "--use_ema=true", "--ema_decay=0.5"]
    run = train(inputs, f"resumed-{engine}-{tuning}", ENGINES[engine], "prfl", tuning, 1, 2, options)
    whole, metrics = load_file(run / file), (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoint-4")
    (run / file).unlink()
    train(inputs, run.name, ENGINES[engine], "prfl", tuning, 1, 2, [*options, "--resume_from_checkpoint=latest"])
    resumed = load_file(run / file)
    assert all((resumed[name] == value).all() for name, value in whole.items())
    assert (run / "metrics.jsonl").read_text() == metrics


@pytest.mark.launch
def test_the_average_under_zero3_is_that_of_one_process(inputs: Path) -> None:
    file, options = WEIGHTS["prfl", "full"], ["--use_ema=true", "--ema_decay=0.5", "--learning_rate=1e-3"]
    one = train(inputs, "one-average", ENGINES["one process"], "prfl", "full", 1, GLOBAL_BATCH_SIZE, options)
    two = train(inputs, "two-average", ENGINES["ZeRO-3"], "prfl", "full", 1, GLOBAL_BATCH_SIZE // 2, options)
    assert relative_difference(two / file, one / file) < 1e-5
    assert relative_difference(one / file, one / "checkpoint-4" / file) > 1e-4
