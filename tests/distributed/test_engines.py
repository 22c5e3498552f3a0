"""Two processes train what one process trains."""

import json
import socket
import subprocess
from pathlib import Path

import pytest

from .training import ENGINES, GLOBAL_BATCH_SIZE, WEIGHTS, launch, launch_command, relative_difference, train


SPLIT = "--shard_reward_model=true"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("script", "tuning", "more"),
    [
        ("reward", "full", []),
        ("reward", "lora", []),
        ("prfl", "full", []),
        ("prfl", "lora", []),
        ("prfl", "full", [SPLIT]),
    ],
)
def test_zero3_with_context_parallelism_equals_one_process(
    inputs: Path, script: str, tuning: str, more: list[str]
) -> None:
    file = WEIGHTS[script, tuning]
    one = train(inputs, f"one-{script}-{tuning}", ENGINES["one process"], script, tuning, 1, GLOBAL_BATCH_SIZE)
    name = f"two-{script}-{tuning}{'-split' if more else ''}"
    two = train(inputs, name, ENGINES["ZeRO-3"], script, tuning, 2, GLOBAL_BATCH_SIZE, more)
    assert relative_difference(two / file, one / file) < 1e-5
    untrained = train(inputs, f"start-{script}-{tuning}", ENGINES["one process"], script, tuning, 1, 1, ["--max_train_steps=1", "--learning_rate=1e-12", "--head_learning_rate=1e-12"][: 3 if script == "reward" else 2])  # fmt: skip
    assert relative_difference(one / file, untrained / file) > 1e-4


@pytest.mark.launch
def test_a_split_reward_model_beside_ddp(inputs: Path) -> None:
    file = WEIGHTS["prfl", "lora"]
    one = train(inputs, "one-prfl-lora", ENGINES["one process"], "prfl", "lora", 1, GLOBAL_BATCH_SIZE)
    two = train(inputs, "ddp-split", ENGINES["DDP"], "prfl", "lora", 1, GLOBAL_BATCH_SIZE // 2, [SPLIT])
    assert relative_difference(two / file, one / file) < 1e-5


@pytest.mark.launch
@pytest.mark.parametrize(("engine", "script"), [("ZeRO-2", "prfl"), ("ZeRO-3", "prfl"), ("ZeRO-3", "reward")])
def test_the_average_is_that_of_one_process(inputs: Path, engine: str, script: str) -> None:
    file, options = WEIGHTS[script, "full"], ["--use_ema=true", "--ema_decay=0.5", "--learning_rate=1e-3"]
    name, size = f"{engine}-{script}-average", GLOBAL_BATCH_SIZE
    one = train(inputs, f"one-{script}-average", ENGINES["one process"], script, "full", 1, size, options)
    two = train(inputs, name, ENGINES[engine], script, "full", 1, size // 2, options)
    assert relative_difference(two / file, one / file) < 1e-5
    # The last checkpoint keeps both: the weights in training, and the average that is the result.
    assert relative_difference(one / file, one / "checkpoint-4" / file) > 1e-4
    for run in (one, two):
        assert relative_difference(run / file, run / "checkpoint-4" / "ema" / file) == 0


@pytest.mark.launch
@pytest.mark.parametrize(("tuning", "start"), [("full", "merge"), ("lora", "continue")])
def test_a_start_from_a_transformer_and_a_lora_is_that_of_one_process(inputs: Path, tuning: str, start: str) -> None:
    """ZeRO-3 reads the transformer and merges the LoRA block by block."""
    file, size = WEIGHTS["prfl", tuning], GLOBAL_BATCH_SIZE
    first = train(inputs, "one-prfl-lora", ENGINES["one process"], "prfl", "lora", 1, size)
    options = [
        f"--transformer_path={inputs / 'pipeline' / 'transformer'}",
        f"--lora_path={first / WEIGHTS['prfl', 'lora']}",
        f"--lora_start={start}",
    ]
    one = train(inputs, f"one-{start}", ENGINES["one process"], "prfl", tuning, 1, size, options)
    two = train(inputs, f"zero3-{start}", ENGINES["ZeRO-3"], "prfl", tuning, 1, size // 2, options)
    assert relative_difference(two / file, one / file) < 1e-5
    if start == "continue":
        assert 1e-4 < relative_difference(one / file, first / file) < 1


@pytest.mark.launch
def test_float16_is_refused(inputs: Path, tmp_path: Path) -> None:
    settings = json.loads(Path("ds_configs/zero2_cpu.json").read_text())
    (tmp_path / "float16.json").write_text(
        json.dumps({**settings, "bf16": {"enabled": False}, "fp16": {"enabled": True}})
    )
    engine = [*ENGINES["ZeRO-2"], "--deepspeed_config_file", str(tmp_path / "float16.json")]
    finished = launch(inputs, "float16", engine, "prfl", "full", 1, 1)
    assert finished.returncode != 0
    assert "`mixed_precision` must be no or bf16, got 'fp16'" in finished.stderr
    assert not (inputs / "float16" / "transformer").exists()


@pytest.mark.launch
def test_two_machines(inputs: Path) -> None:
    """The template, as two launches that find each other over the network; here both on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in (0, 1):
        engine = [
            "--config_file", "accelerate_configs/multi_node_zero3.yaml", "--machine_rank", str(rank),
            "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port),
            "--deepspeed_config_file", "ds_configs/zero3_cpu.json",
        ]  # fmt: skip
        command, environment = launch_command(inputs, "machines", engine, "prfl", "full", 1, GLOBAL_BATCH_SIZE // 2)
        processes.append(
            subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    file = WEIGHTS["prfl", "full"]
    one = train(inputs, "one-prfl-full", ENGINES["one process"], "prfl", "full", 1, GLOBAL_BATCH_SIZE)
    assert relative_difference(inputs / "machines" / file, one / file) < 1e-5
