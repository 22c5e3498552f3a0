"""A quantised base on two processes: DDP leaves its weights alone, DeepSpeed is refused."""

import subprocess
from pathlib import Path

import pytest

from examples.parity.parity import ENGINES, GLOBAL_BATCH_SIZE, WEIGHTS, launch_command, relative_difference, train


INT8 = ["--base_quantization=int8", "--reward_model_quantization=int8"]


@pytest.mark.launch
def test_ddp_with_context_parallelism_equals_one_process(inputs: Path) -> None:
    file = WEIGHTS["prfl", "lora"]
    one = train(inputs, "one-int8", ENGINES["one process"], "prfl", "lora", 1, GLOBAL_BATCH_SIZE, INT8)
    two = train(inputs, "two-int8", ENGINES["DDP"], "prfl", "lora", 2, GLOBAL_BATCH_SIZE, INT8)
    assert relative_difference(two / file, one / file) < 1e-6
    plain = train(inputs, "one-prfl-lora", ENGINES["one process"], "prfl", "lora", 1, GLOBAL_BATCH_SIZE)
    assert relative_difference(one / file, plain / file) > 1e-5


@pytest.mark.launch
def test_deepspeed_is_refused_before_anything_is_loaded(inputs: Path) -> None:
    engine = [*ENGINES["ZeRO-2"], "--num_processes", "1"]
    nowhere = ["--train_dataset=nowhere"]
    command, environment = launch_command(inputs, "zero2-int8", engine, "prfl", "lora", 1, 4, [*INT8[:1], *nowhere])
    (inputs / "nowhere").mkdir(exist_ok=True)
    finished = subprocess.run(
        [word if word != nowhere[0] else f"--train_dataset={inputs / 'nowhere'}" for word in command],
        env=environment, text=True, capture_output=True,
    )  # fmt: skip
    assert finished.returncode != 0
    assert "`base_quantization` must be left out under ZeRO-2, which casts and shards weights, got 'int8'" in (
        finished.stderr
    )
