"""A quantised base on two processes: DDP leaves its weights alone, DeepSpeed is refused."""

from pathlib import Path

import pytest

from .training import ENGINES, GLOBAL_BATCH_SIZE, WEIGHTS, launch, relative_difference, train


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
    (inputs / "nowhere").mkdir(exist_ok=True)
    more = [*INT8[:1], f"--train_dataset={inputs / 'nowhere'}"]
    finished = launch(inputs, "zero2-int8", engine, "prfl", "lora", 1, 4, more)
    assert finished.returncode != 0
    assert "`base_quantization` must be left out under ZeRO-2, which casts and shards weights, got 'int8'" in (
        finished.stderr
    )
