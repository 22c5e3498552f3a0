"""Two experts on two processes: one process trains the same, whichever expert a micro-batch belongs to."""

from pathlib import Path

import pytest

from examples.parity.parity import ENGINES, GLOBAL_BATCH_SIZE, relative_difference, train, write_inputs


FULL = ["transformer/diffusion_pytorch_model.safetensors", "transformer_2/diffusion_pytorch_model.safetensors"]
LORA = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"]
OPTIONS = ["--learning_rate=1e-3", "--num_inference_steps=6", "--sampler_flow_shift=8", "--max_train_steps=6"]


@pytest.fixture(scope="session")
def expert_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `inputs`, with a pipeline of two experts."""
    folder = tmp_path_factory.mktemp("experts")
    write_inputs(folder, boundary_ratio=0.875)
    return folder


@pytest.mark.launch
@pytest.mark.parametrize(
    ("engine", "tuning", "files", "more"),
    [
        ("DDP", "full", FULL, ["--expert=both"]),
        ("ZeRO-2", "full", FULL, ["--expert=both"]),
        ("ZeRO-3", "full", FULL, ["--expert=both"]),
        ("ZeRO-3", "lora", LORA, ["--expert=both", "--num_gradient_steps=2"]),
        ("DDP", "full", FULL[1:], ["--expert=low_noise", "--shard_frozen_expert=true"]),
        ("ZeRO-3", "full", FULL[1:], ["--expert=low_noise", "--shard_frozen_expert=true"]),
    ],
)
def test_every_engine_trains_them_as_one_process_does(
    expert_inputs: Path, engine: str, tuning: str, files: list[str], more: list[str]
) -> None:
    alone = [option for option in more if "shard" not in option]
    tag = "".join(alone).replace("--", "-")
    single = ENGINES["one process"]
    one = train(expert_inputs, f"one-{tuning}{tag}", single, "prfl", tuning, 1, GLOBAL_BATCH_SIZE, OPTIONS + alone)
    name = f"{engine}-{tuning}{tag}"
    two = train(expert_inputs, name, ENGINES[engine], "prfl", tuning, 1, GLOBAL_BATCH_SIZE // 2, OPTIONS + more)
    for file in files:
        assert relative_difference(two / file, one / file) < 1e-5
    start = train(
        expert_inputs, f"start-{tuning}{tag}", single, "prfl", tuning, 1, 1,
        [*OPTIONS, *alone, "--max_train_steps=1", "--learning_rate=1e-12"],
    )  # fmt: skip
    for file in files:
        assert relative_difference(one / file, start / file) > 1e-3
