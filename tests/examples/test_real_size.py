"""Training steps at 14B on a pretended CUDA device: nothing that CUDA refuses, and what the planner says."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.real_size.library import compile_library
from examples.real_size.real_size import ROOT, faults, run_in_process, table


pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a build of torch with CUDA cannot pretend"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("build"))


# Autocast with block inputs in host memory; DeepSpeed's bfloat16 with images and context parallelism; pairs.
@pytest.mark.parametrize(
    "name",
    ["prfl/wan2.1_t2v_14b_720p_lora", "prfl/wan2.1_i2v_14b_480p_full", "reward/wan2.1_t2v_14b_480p_bt"],
)
def test_a_step_at_real_size(library: Path, name: str) -> None:
    result = run_in_process(ROOT / f"examples/{name}.yaml", library)
    assert not faults(result), result


def test_a_step_that_fails_is_told_by_its_last_line() -> None:
    result = {
        "recipe": "examples/prfl/a.yaml",
        "error": "Traceback\n  ...\nRuntimeError: Expected query, key, and value",
    }
    assert faults(result) == ["RuntimeError: Expected query, key, and value"]
    assert "| `prfl/a` | | | RuntimeError: Expected query, key, and value |" in table([result])


def test_the_device_refuses_what_cuda_refuses(library: Path) -> None:
    """Operands of different types, outside of autocast; and autocast computes norms in float32."""
    program = (
        "import pathlib, sys\n"
        "from examples.real_size.library import load_library\n"
        "load_library(pathlib.Path(sys.argv[1]))\n"
        "from examples.real_size.pretended_cuda import start\n"
        "start()\n"
        "import torch\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    states = torch.empty(1, 2, 8, 16, device='cuda')\n"
        "    with torch.autocast('cuda', torch.bfloat16):\n"
        "        print(torch.nn.RMSNorm(16, device='cuda')(states.bfloat16()).dtype)\n"
        "    torch.nn.functional.scaled_dot_product_attention(states, states, states.bfloat16())\n"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert finished.stdout.strip() == "torch.float32"
    assert finished.stderr.splitlines()[-1].startswith("RuntimeError: Expected query, key, and value to have the same")


def test_differences_from_the_plan_are_told() -> None:
    good: dict[str, Any] = {
        "zero_stage": 0, "is_split": False, "most_syncs": 8, "context_parallel_degree": 1, "measured": 10.0, "planned": 10.2, "measured_teraflops": 5.0,
        "planned_teraflops": 5.0, "num_syncs": 4, "sync_places": {}, "host_buffers": 0.0, "planned_host_buffers": 0.0,
    }  # fmt: skip
    assert faults(good) == []
    assert faults({**good, "planned": 11.0}) == ["measured 10, planned 11"]
    assert faults({**good, "zero_stage": 3, "planned": 11.0}) == []
    assert faults({**good, "measured_teraflops": 5.1}) == ["measured_teraflops 5.1, planned_teraflops 5"]
    assert faults({**good, "num_syncs": 99, "sync_places": {"a.py:1": 99}}) == [
        "99 waits for the device: {'a.py:1': 99}"
    ]
