"""Several gradient steps along a chain, and what saves memory, on two processes: one process trains the same."""

from pathlib import Path

import pytest

from .training import ENGINES, GLOBAL_BATCH_SIZE, WEIGHTS, relative_difference, train


FILE = WEIGHTS["prfl", "full"]
STEPS = "--num_gradient_steps=2"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("engine", "degree", "schedule", "more"),
    [
        ("DDP", 1, "alternate", ["--rerun_gradient_step=true", "--offload_activations=true"]),
        ("ZeRO-2", 1, "alternate", ["--gradient_checkpointing_blocks=1", "--offload_reward_model=true"]),
        ("ZeRO-3", 1, "alternate", ["--offload_reward_model=true"]),
        ("ZeRO-3", 2, "joint", ["--rerun_gradient_step=true", "--offload_activations=true", "--attention_backend=native", "--rollout_attention_backend=native"]),
    ],
)  # fmt: skip
def test_every_engine_takes_them_as_one_process_does(
    inputs: Path, engine: str, degree: int, schedule: str, more: list[str]
) -> None:
    options = [STEPS, f"--update_schedule={schedule}"]
    one = train(inputs, f"steps-{schedule}", ENGINES["one process"], "prfl", "full", 1, GLOBAL_BATCH_SIZE, options)
    name = f"steps-{schedule}-{engine}-{degree}"
    two = train(inputs, name, ENGINES[engine], "prfl", "full", degree, GLOBAL_BATCH_SIZE * degree // 2, options + more)
    assert relative_difference(two / FILE, one / FILE) < 1e-5
    single = train(
        inputs, f"one-step-{schedule}", ENGINES["one process"], "prfl", "full", 1, GLOBAL_BATCH_SIZE, options[1:]
    )
    assert relative_difference(one / FILE, single / FILE) > 5e-5
