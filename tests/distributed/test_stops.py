"""Two processes that are killed, spoilt or resumed in another number: nothing is lost, and all ranks agree."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.data.schema import table_to_rows
from hy_prfl.evaluation.scoring import score_rows
from hy_prfl.models.reward_model import WanRewardModel

from .training import ENGINES, GLOBAL_BATCH_SIZE, WEIGHTS, launch, launch_command, relative_difference, train


def launch_until(command: list[str], environment: dict[str, str], log: Path, condition: Callable[[], bool]) -> int:
    """Start a run, kill its second rank as soon as `condition` holds, and return the launcher's exit status."""
    with log.open("w") as file:
        launcher = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        deadline = time.monotonic() + 240
        while not condition():
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.001)
        ranks = [
            process
            for process in psutil.Process(launcher.pid).children(recursive=True)
            if process.environ().get("RANK") == "1" and any("hy_prfl.scripts" in part for part in process.cmdline())
        ]
        assert len(ranks) == 1, ranks
        ranks[0].send_signal(signal.SIGKILL)
        return launcher.wait(timeout=120)


def assert_same_weights(own: Path, other: Path) -> None:
    weights, expected = load_file(own), load_file(other)
    assert set(weights) == set(expected)
    assert all((weights[name] == value).all() for name, value in expected.items())


AVERAGE = ["--use_ema=true", "--ema_decay=0.5"]
DROPOUT = "--lora_dropout=0.3"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("engine", "script", "tuning", "degree", "more"),
    [
        ("DDP", "prfl", "full", 1, AVERAGE),
        ("ZeRO-2", "prfl", "full", 1, AVERAGE),
        ("ZeRO-3", "prfl", "full", 1, AVERAGE),
        ("ZeRO-3", "prfl", "lora", 2, [*AVERAGE, DROPOUT, "--shard_reward_model=true"]),
        ("ZeRO-3", "reward", "lora", 1, [DROPOUT]),
    ],
)
def test_resuming_equals_never_having_stopped(
    inputs: Path, engine: str, script: str, tuning: str, degree: int, more: list[str]
) -> None:
    file, options = WEIGHTS[script, tuning], ["--checkpointing_steps=2", *more]
    arguments = (ENGINES[engine], script, tuning, degree, 2 * degree)
    run = train(inputs, f"resumed-{engine}-{script}-{tuning}", *arguments, options)
    whole, metrics = load_file(run / file), (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoint-4")
    (run / file).unlink()
    train(inputs, run.name, *arguments, [*options, "--resume_from_checkpoint=latest"])
    resumed = load_file(run / file)
    assert all((resumed[name] == value).all() for name, value in whole.items())
    assert (run / "metrics.jsonl").read_text() == metrics


@pytest.mark.launch
@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3"])
def test_going_back_with_other_options_is_that_of_one_process(inputs: Path, engine: str) -> None:
    """One process is compared with AdamW written out in tests/trainers; here DeepSpeed's groups get the options too."""
    file, runs = WEIGHTS["reward", "full"], []
    changed = [
        "--learning_rate=1e-3", "--head_learning_rate=3e-3", "--adam_weight_decay=0.3", "--adam_beta1=0.5",
        "--adam_epsilon=1e-4", "--lr_scheduler=constant", "--checkpoints_total_limit=2",
    ]  # fmt: skip
    for name, batch_size in ((engine, GLOBAL_BATCH_SIZE // 2), ("one process", GLOBAL_BATCH_SIZE)):
        arguments = (ENGINES[name], "reward", "full", 1, batch_size)
        run = train(inputs, f"back-{name}".replace(" ", "-"), *arguments, ["--checkpointing_steps=2"])
        if not (run / "abandoned-1").exists():
            (run / file).rename(run / "unchanged.safetensors")
            resume = f"--resume_from_checkpoint={run / 'checkpoint-2'}"
            train(inputs, run.name, *arguments, ["--checkpointing_steps=2", *changed, resume])
        assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
        assert (run / "abandoned-1" / "metrics.jsonl").read_text().count("\n") == 2
        runs.append(run)
    assert relative_difference(runs[0] / file, runs[1] / file) < 1e-5
    assert relative_difference(runs[1] / "unchanged.safetensors", runs[1] / file) > 1e-3


@pytest.mark.launch
@pytest.mark.parametrize("engine", ["DDP", "ZeRO-3"])
def test_a_rank_killed_in_an_update_and_one_in_a_checkpoint(inputs: Path, engine: str) -> None:
    file = WEIGHTS["prfl", "full"]
    options = ["--max_train_steps=8", "--checkpointing_steps=3", "--resume_from_checkpoint=latest"]
    whole = train(inputs, f"whole-{engine}", ENGINES[engine], "prfl", "full", 1, 2, options)
    run, log = inputs / f"killed-{engine}", inputs / f"killed-{engine}.log"
    command, environment = launch_command(inputs, run.name, ENGINES[engine], "prfl", "full", 1, 2, options)
    metrics = run / "metrics.jsonl"

    def is_in_fifth_update() -> bool:
        return metrics.is_file() and metrics.read_text().count("\n") >= 4

    assert launch_until(command, environment, log, is_in_fifth_update) != 0
    assert "Signal 9 (SIGKILL) received by PID" in log.read_text()
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3"}

    # Once more from checkpoint-3; now the second rank dies while checkpoint-6 is written.
    unfinished = run / ".checkpoint-6.tmp"
    assert launch_until(command, environment, log, unfinished.is_dir) != 0
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3"}
    assert unfinished.is_dir()

    train(inputs, run.name, ENGINES[engine], "prfl", "full", 1, 2, options)
    assert_same_weights(run / file, whole / file)
    assert metrics.read_text() == (whole / "metrics.jsonl").read_text()
    assert not unfinished.exists()


@pytest.mark.launch
@pytest.mark.parametrize(
    ("first", "second", "tuning"),
    [
        (("DDP", 2), ("one process", 4), "full"),
        (("one process", 4), ("DDP", 2), "lora"),
        (("ZeRO-3", 2), ("one process", 4), "full"),
        (("DDP", 2), ("ZeRO-3", 2), "full"),
    ],
)
def test_resuming_on_another_number_of_processes(
    inputs: Path, first: tuple[str, int], second: tuple[str, int], tuning: str
) -> None:
    file, options = WEIGHTS["prfl", tuning], ["--checkpointing_steps=2", "--use_ema=true", "--ema_decay=0.5"]
    name = f"moved-{first[0]}-{second[0]}-{tuning}".replace(" ", "-")
    run = train(inputs, name, ENGINES[first[0]], "prfl", tuning, 1, first[1], options)
    whole = inputs / f"{name}-whole"
    run.rename(whole)
    run.mkdir()
    shutil.copytree(whole / "checkpoint-2", run / "checkpoint-2")
    more = [*options, "--resume_from_checkpoint=latest"]
    finished = launch(inputs, name, ENGINES[second[0]], "prfl", tuning, 1, second[1], more)
    assert finished.returncode == 0, finished.stderr
    output = finished.stdout + finished.stderr
    assert "dropout draws other numbers" in output
    assert "A global micro-batch was" not in output
    difference = relative_difference(run / file, whole / file)
    moved = relative_difference(whole / "checkpoint-2" / file, whole / file)
    if "ZeRO-3" in (first[0], second[0]):
        # Weights, average, schedule and data go on; the moments start anew, and the output says so.
        assert "the moments of AdamW start from zero" in output
        assert 1e-6 < difference < moved
    else:
        assert difference < 1e-6 < moved


@pytest.mark.launch
@pytest.mark.parametrize("engine", ["DDP", "ZeRO-2", "ZeRO-3"])
def test_an_update_spoilt_on_one_rank_is_left_out_on_all(inputs: Path, engine: str) -> None:
    """Row 5 is not finite. One process leaves out the same updates, and ends with the same weights."""
    broken = inputs / "broken"
    if not broken.exists():
        table = load_from_disk(inputs / "data").with_format("arrow")[:]
        latents = [value.values.to_numpy(zero_copy_only=False).copy() for value in table.column("latents")]
        latents[5][:] = np.nan
        column = pa.array(latents, type=table.schema.field("latents").type)
        table = table.set_column(table.schema.get_field_index("latents"), table.schema.field("latents"), column)
        load_from_disk(inputs / "data").__class__(table).save_to_disk(broken)
    file, more = WEIGHTS["reward", "full"], [f"--train_dataset={broken}", "--max_skipped_updates=2"]
    one = train(inputs, "spoilt-one", ENGINES["one process"], "reward", "full", 1, GLOBAL_BATCH_SIZE, more)
    finished = launch(inputs, f"spoilt-{engine}", ENGINES[engine], "reward", "full", 1, 2, more)
    assert finished.returncode == 0, finished.stderr
    reports = [line for line in finished.stderr.splitlines() if "update left out" in line]
    # 4 updates of 2 x 4 clips are two epochs of 16. Once, by the main process.
    assert len(reports) == 2, finished.stderr
    assert all("loss nan, rows" in report and "synthetic-5" in report for report in reports)
    assert relative_difference(inputs / f"spoilt-{engine}" / file, one / file) < 1e-5


@pytest.mark.launch
def test_an_error_of_one_rank_ends_the_run_with_its_message(inputs: Path) -> None:
    """Only the rank that gets the row whose array has the wrong size can know; the other one waits for it."""
    torn = inputs / "torn"
    table = load_from_disk(inputs / "data").with_format("arrow")[:]
    latents = [value.values.to_numpy(zero_copy_only=False).copy() for value in table.column("latents")]
    latents[5] = latents[5][:-1]
    field = table.schema.field("latents")
    table = table.set_column(table.schema.get_field_index("latents"), field, pa.array(latents, type=field.type))
    load_from_disk(inputs / "data").__class__(table).save_to_disk(torn)
    command, environment = launch_command(
        inputs, "torn-run", ENGINES["ZeRO-3"], "prfl", "full", 1, 2, [f"--train_dataset={torn}"]
    )
    finished = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=240)
    assert finished.returncode != 0
    assert "cannot reshape array of size 767" in finished.stderr


@pytest.mark.launch
def test_the_monitor_stops_all_ranks_and_another_number_of_them_goes_on(inputs: Path) -> None:
    """At this learning rate the samples are no longer like the clips after two updates."""
    shutil.copytree(inputs / "reward", inputs / "held_out", dirs_exist_ok=True)
    options = [
        "--learning_rate=0.1", "--lr_warmup_steps=0", "--validation_dataset", str(inputs / "data"), "--validation_steps=2",
        "--num_validation_samples=6", "--monitor_reward_models", str(inputs / "held_out"),
    ]  # fmt: skip
    arguments = ("prfl", "lora", 1)
    command, environment = launch_command(
        inputs, "watched", ENGINES["DDP"], *arguments, GLOBAL_BATCH_SIZE // 2, [*options, "--on_hacking=stop"]
    )
    finished = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("Stopped after step 2, without a result") == 1
    run = inputs / "watched"
    # Each rank has sampled some of the rows.
    files = [load_file(run / "checkpoint-2" / f"monitor-{rank}.safetensors") for rank in (0, 1)]
    rows = [{int(name.split(".")[0]) for name in tensors} for tensors in files]
    assert rows[0] != rows[1]
    assert rows[0] | rows[1] == set(range(6))
    before = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["monitor"]["series"]
    # Real clips are divided as samples are; here each is scored by itself.
    real = table_to_rows(load_latent_dataset(str(inputs / "data"))[:])
    model = WanRewardModel.from_pretrained(inputs / "reward").eval()
    rewards = torch.cat([score_rows(model, [row], [201, 400, 600, 800, 1000], seed=1) for row in real]).sigmoid()
    assert before[0]["real_reward"] == pytest.approx(float(rewards.mean()), abs=1e-5)
    on = ["--on_hacking=warn", "--resume_from_checkpoint=latest"]
    train(inputs, run.name, ENGINES["one process"], *arguments, GLOBAL_BATCH_SIZE, [*options, *on])
    after = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["monitor"]["series"]
    assert [entry["step"] for entry in after] == [0, 2, 4]
    assert after[:2] == before
