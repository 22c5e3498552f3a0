"""Two experts on two processes: one process trains the same, whichever expert a micro-batch belongs to."""

from pathlib import Path

import pytest

from .training import ENGINES, GLOBAL_BATCH_SIZE, launch, relative_difference, train, write_inputs


FULL = ["transformer/diffusion_pytorch_model.safetensors", "transformer_2/diffusion_pytorch_model.safetensors"]
LORA = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"]
OPTIONS = [
    "--learning_rate=1e-3",
    "--num_inference_steps=6",
    "--sampler_flow_shift=8",
    "--max_train_steps=6",
    "--checkpointing_steps=2",
]


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
        ("ZeRO-3", "full", FULL[1:], ["--expert=low_noise", "--shard_frozen_expert=true"]),
    ],
)
def test_every_engine_trains_them_as_one_process_does(
    expert_inputs: Path, engine: str, tuning: str, files: list[str], more: list[str]
) -> None:
    alone = [option for option in more if "shard" not in option]
    name, single = f"{tuning}{''.join(alone).replace('--', '-')}", ENGINES["one process"]
    arguments = ("prfl", tuning, 1)
    one = train(expert_inputs, f"one-{name}", single, *arguments, GLOBAL_BATCH_SIZE, OPTIONS + alone, files[0])
    two = train(
        expert_inputs,
        f"{engine}-{name}",
        ENGINES[engine],
        *arguments,
        GLOBAL_BATCH_SIZE // 2,
        OPTIONS + more,
        files[0],
    )
    for file in files:
        assert relative_difference(two / file, one / file) < 1e-5
        assert relative_difference(one / file, one / "checkpoint-2" / file) > 1e-3


@pytest.mark.launch
def test_both_in_bfloat16(expert_inputs: Path) -> None:
    engine = [*ENGINES["ZeRO-3"], "--deepspeed_config_file", "ds_configs/zero3.json"]
    options = [*OPTIONS, "--expert=both"]
    arguments = ("prfl", "full", 1)
    one = train(expert_inputs, "one-both", ENGINES["one process"], *arguments, GLOBAL_BATCH_SIZE, options, FULL[0])
    two = train(expert_inputs, "bf16-both", engine, *arguments, GLOBAL_BATCH_SIZE // 2, options, FULL[0])
    for file in FULL:
        assert relative_difference(two / file, one / file) < 2e-2


@pytest.mark.launch
def test_both_are_refused_with_an_offloaded_optimizer(expert_inputs: Path) -> None:
    engine = [*ENGINES["ZeRO-3"], "--deepspeed_config_file", "ds_configs/zero3_offload.json"]
    more = [*OPTIONS, "--expert=both"]
    finished = launch(expert_inputs, "offload", engine, "prfl", "full", 1, 1, more)
    assert finished.returncode != 0
    assert "`expert` must be one expert with an offloaded optimizer, got 'both'" in finished.stderr
    assert not (expert_inputs / "offload" / "transformer").exists()
