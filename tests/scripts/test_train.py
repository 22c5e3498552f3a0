"""Both trainers as users start them: `accelerate launch`, a YAML file, a kill, and on from the last checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]


@pytest.mark.launch
def test_reward_then_prfl(
    tmp_path: Path, pipeline_dir: Path, write_latents: Callable[..., Path], accelerate_launch: Callable[..., str]
) -> None:
    data = write_latents(tmp_path / "data", 8)
    config = tmp_path / "reward.yaml"
    config.write_text(
        f"pretrained_model_name_or_path: {pipeline_dir}\ntrain_dataset: {data}\nvalidation_dataset: {data}\n"
        "num_layers: 2\ntrain_batch_size: 4\nmax_train_steps: 4\nlearning_rate: 1e-3\nhead_learning_rate: 1e-3\n"
    )
    accelerate_launch("train_reward", "--config", config, "--output_dir", tmp_path / "reward")
    assert list((tmp_path / "reward" / "logs").rglob("events.out.tfevents.*"))
    accelerate_launch(
        "train_prfl", "--output_dir", tmp_path / "prfl", "--pretrained_model_name_or_path", pipeline_dir,
        "--reward_model", tmp_path / "reward" / "best", "--train_dataset", data, "--lora_rank", 2,
        "--train_batch_size", 2, "--max_train_steps", 2, "--num_inference_steps", 4,
    )  # fmt: skip
    assert (tmp_path / "prfl" / "pytorch_lora_weights.safetensors").is_file()
    assert [json.loads(line)["step"] for line in (tmp_path / "prfl" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]


@pytest.mark.launch
def test_dry_run_of_two_processes(tmp_path: Path, pipeline_dir: Path, accelerate_launch: Callable[..., str]) -> None:
    output = accelerate_launch(
        "train_reward", "--dry_run", "--dry_run_size", 9, 32, 32, "--output_dir", tmp_path / "out",
        "--train_dataset", "none", "--pretrained_model_name_or_path", pipeline_dir, "--num_layers", 2,
        num_processes=2,
    )  # fmt: skip
    assert output.count("dry run: latents 16 x 3 x 4 x 4, 2 process(es), engine whole") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.launch
def test_bad_configuration_fails_before_anything_loads(tmp_path: Path, accelerate_launch: Callable[..., str]) -> None:
    with pytest.raises(RuntimeError, match="error: command line: 'learning_rat' is not a field"):
        accelerate_launch("train_reward", "--output_dir", tmp_path / "out", "--learning_rat", 1)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    pipeline_dir: Path,
    write_latents: Callable[..., Path],
    accelerate_launch: Callable[..., str],
) -> tuple[Path, list[object]]:
    """Folder of a run that nothing stopped, and its options."""
    folder = tmp_path_factory.mktemp("whole")
    options: list[object] = [
        "--pretrained_model_name_or_path", pipeline_dir, "--train_dataset", write_latents(folder / "data", 8),
        "--num_layers", 2, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-3,
        "--report_to", "none", "--checkpointing_steps", 5, "--checkpoints_total_limit", 2, "--max_train_steps", 120,
    ]  # fmt: skip
    accelerate_launch("train_reward", "--output_dir", folder / "out", *options)
    return folder / "out", options


@pytest.mark.launch
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path,
    whole: tuple[Path, list[object]],
    accelerate_launch: Callable[..., str],
    signal_number: signal.Signals,
) -> None:
    uninterrupted, options = whole
    command = [sys.executable, "-m", "hy_prfl.scripts.train_reward", "--output_dir", str(tmp_path / "parts")]
    process = subprocess.Popen([*command, *map(str, options)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 12):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal_number)
    code = process.wait(timeout=60)
    assert code == (0 if signal_number == signal.SIGTERM else -signal.SIGKILL)
    stopped_at = len(metrics.read_text().splitlines())
    assert stopped_at < 120
    accelerate_launch(
        "train_reward", "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest", *options
    )

    weights, parts = (
        load_file(run / "reward_model" / "diffusion_pytorch_model.safetensors")
        for run in (uninterrupted, tmp_path / "parts")
    )
    assert all((value == parts[name]).all() for name, value in weights.items())
    assert metrics.read_text() == (uninterrupted / "metrics.jsonl").read_text()
