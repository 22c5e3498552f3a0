"""Process groups and their threads end before the interpreter exits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hy_prfl.runtime.distributed import build_accelerator


ROOT = Path(__file__).parents[2]
# Runs a script as `accelerate launch -m` does, then writes the names of the remaining threads to a file.
PROGRAM = """
import os, pathlib, runpy, sys
script, folder = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))
runpy.run_module(f"hy_prfl.scripts.{script}", run_name="__main__", alter_sys=True)
names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
(folder / f"threads_{os.environ['RANK']}").write_text("\\n".join(names))
"""

# Writes the timeout of each group in hours.
TIMEOUTS = """
import json, pathlib, sys, torch
import torch.distributed as dist
from hy_prfl.runtime.distributed import TRAINING_TIMEOUT, build_accelerator
from hy_prfl.runtime.context_parallel import ContextParallelGroup
build_accelerator(gradient_accumulation_steps=1, train_batch_size=1, log_with=[], output_dir=pathlib.Path("."))
groups = {"world": dist.group.WORLD, "clip": ContextParallelGroup(2, TRAINING_TIMEOUT).process_group}
backends = {name: group._get_backend(torch.device("cpu")) for name, group in groups.items()}
hours = {name: backend.options._timeout.total_seconds() / 3600 for name, backend in backends.items()}
if dist.get_rank() == 0:
    pathlib.Path(sys.argv[1]).write_text(json.dumps(hours))
"""

# A thread that waits for the interpreter's lock, as one of gloo does that has a last tensor to release: it gets the lock
# before the process group is destroyed. Threads do not take turns by themselves here.
SETTLING = """
import sys, threading
import torch.distributed as dist
from hy_prfl.runtime.distributed import leave_processes
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
ran = threading.Event()
destroy = dist.destroy_process_group
def checked_destroy():
    assert ran.is_set(), "destroyed while a thread waits"
    destroy()
dist.destroy_process_group = checked_destroy
asks = threading.Lock()
asks.acquire()
thread = threading.Thread(target=lambda: (asks.acquire(), ran.set()))
thread.start()
sys.setswitchinterval(1000)
asks.release()
leave_processes()
assert not dist.is_initialized()
"""


@pytest.fixture
def threads_left(tmp_path: Path) -> Callable[..., list[list[str]]]:
    """Function that runs a script on two processes and returns the names of the threads left in each at its end."""

    def run(script: str, *options: object) -> list[list[str]]:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM)
        config = ROOT / "accelerate_configs" / "ddp_cpu.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(program)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run(
            [*command, script, str(tmp_path), *map(str, options)], cwd=ROOT, env=environment, check=True, timeout=300
        )
        return [(tmp_path / f"threads_{rank}").read_text().splitlines() for rank in (0, 1)]

    return run


@pytest.mark.launch
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_ranks_wait_for_hours(engine: str, tmp_path: Path) -> None:
    """Ranks wait long enough while one writes or deletes 57 GB, also within a context-parallel group."""
    (tmp_path / "program.py").write_text(TIMEOUTS)
    config = f"accelerate_configs/{engine}_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, tmp_path / "program.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_USE_CPU": "true"} if engine == "ddp" else {}
    subprocess.run([*command, tmp_path / "hours.json"], cwd=ROOT, env=environment, check=True, timeout=300)
    hours = json.loads((tmp_path / "hours.json").read_text())
    assert set(hours) == {"world", "clip"}
    assert all(1 <= value <= 24 for value in hours.values()), hours


def test_ddp_keeps_gradients_once(tmp_path: Path) -> None:
    """As views of the buckets in which it averages them."""
    accelerator = build_accelerator(
        gradient_accumulation_steps=1, train_batch_size=1, log_with=[], output_dir=tmp_path
    )
    assert accelerator.ddp_handler is not None
    assert accelerator.ddp_handler.gradient_as_bucket_view


@pytest.mark.launch
@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
@pytest.mark.parametrize("script", ["train_reward", "generate"])
def test_no_thread_of_a_process_group_outlives_a_script(
    tmp_path: Path, pipeline_dir: Path, threads_left: Callable[..., list[list[str]]], script: str
) -> None:
    """A thread of gloo that frees a tensor while the interpreter exits would abort the process."""
    (tmp_path / "prompts.json").write_text(
        json.dumps([{"id": "a", "caption": "a dog"}, {"id": "b", "caption": "a cat"}])
    )
    options = {
        "train_reward": ["--dry_run", "--dry_run_size", 9, 32, 32, "--train_dataset", "none", "--num_layers", 2],
        "generate": [
            *("--prompts", tmp_path / "prompts.json", "--height", 32, "--width", 32, "--num_frames", 5),
            *("--num_inference_steps", 2, "--max_sequence_length", 16),
        ],
    }[script]
    left = threads_left(
        script, "--pretrained_model_name_or_path", pipeline_dir, "--output_dir", tmp_path / "out", *options
    )
    for names in left:
        assert "python" in " ".join(names)
        assert not [name for name in names if "gloo" in name]


def test_a_thread_that_waits_for_the_interpreter_finishes_before_the_group_does() -> None:
    subprocess.run([sys.executable, "-c", SETTLING], check=True, cwd=ROOT, timeout=120)
