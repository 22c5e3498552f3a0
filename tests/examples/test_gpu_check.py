"""The GPU check without a GPU: its steps at a tiny size, and its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.gpu_check.gpu_check import GPUCheckConfig, expectations, faults, table
from examples.gpu_check.steps import SCALES, all_steps


ROOT = Path(__file__).parents[2]
STEP = {
    "seconds": 2.0, "gigabytes": 10.0, "planned_gigabytes": 10.5, "teraflops": 100.0, "teraflops_per_second": 50.0,
    "metrics": {"flow_loss": 1.0},
}  # fmt: skip


def run(*options: str) -> str:
    command = [sys.executable, "-m", "examples.gpu_check.gpu_check", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.mark.launch
def test_the_command_writes_what_its_steps_found(tmp_path: Path) -> None:
    steps = ["--steps", "environment", "matmul", "communication"]
    assert "all is as expected" in run("--device=cpu", "--sizes=tiny", f"--output_dir={tmp_path}", *steps)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["environment", "matmul", "communication"]
    assert results["communication"] == {"backend": "gloo", "is_exact": True}
    assert results["environment"]["attention_kernels"]["native"] == "works"
    assert "attention kernels that train: " in (tmp_path / "results.md").read_text()


def test_tiny_steps_are_as_planned(tmp_path: Path) -> None:
    """The steps for a GPU at a tiny size on the CPU. The planner can count a CPU's allocations too."""
    steps = all_steps(SCALES["tiny"], tmp_path, tests=False)
    results = {name: step() for name, step in steps.items() if name in ("VAE", "text encoder") or "LoRA" in name}
    assert faults(results) == []
    trained = [result for result in results.values() if "teraflops" in result]
    assert len(trained) == 3
    assert all({"flow_loss", "reward_loss"} <= set(result["metrics"]) for result in trained)
    text = table(results)
    assert "| tiny, LoRA, int8 base |" in text
    assert "| VAE, decode |" in text


@pytest.mark.launch
def test_without_a_gpu_it_says_what_it_would_do(tmp_path: Path) -> None:
    output = run("--sizes=tiny", f"--output_dir={tmp_path / 'out'}")
    assert "There is no CUDA GPU here." in output
    assert "tiny, LoRA, int8 base" in output
    assert not (tmp_path / "out").exists()


def test_real_sizes_are_expected_to_end_in_time() -> None:
    """The expected time is below the documented one, at the rate that the planner assumes."""
    expected = expectations("real")
    assert sum(what["seconds"] for what in expected.values()) < 15 * 60
    assert max(what.get("gigabytes", 0.0) for what in expected.values()) < 76
    with pytest.raises(ValueError, match="`sizes` must be tiny on the CPU"):
        GPUCheckConfig(device="cpu")


def test_faults_are_told() -> None:
    good = {"14B": STEP, "communication": {"backend": "nccl", "is_exact": True}}
    assert faults(good) == []
    assert faults({"14B": {**STEP, "gigabytes": 12.0}}) == ["14B: 12 GB, planned 10.5"]
    assert faults({"14B": {**STEP, "metrics": {"loss": float("nan")}}}) == ["14B: metrics {'loss': nan}"]
    assert faults({"14B": {"error": "OutOfMemoryError: ..."}}) == ["14B: OutOfMemoryError: ..."]
    assert faults({"VAE": {"decode": {"seconds": 1.0, "is_finite": False}}}) == [
        "VAE: decode gives a NaN or an infinity"
    ]
    assert faults({"communication": {"is_exact": False}}) == ["communication: is_exact is False"]


def test_the_table_compares() -> None:
    text = table({"matmul": {"teraflops_per_second": 100.0}, "14B": STEP, "tests": {"left_out": "not enough time"}})
    assert "| 14B | 2.0 | 10 | 10.5 | 50 | 50% |" in text
    assert "| tests | not enough time |" in text
