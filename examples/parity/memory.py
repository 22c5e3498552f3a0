"""
Measures the memory of a process with each engine: `make memory`, or

    python -m examples.parity.memory

Trains all weights of a generator with 104 million parameters (416 MB) on two CPU processes for one step: a
flow-matching and a reward update. Prints the peak memory of each process, and its ratio to that of DDP. Then loads the
same generator in bfloat16, whole and sharded. Writes `outputs/memory.json`. Takes about ten minutes.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

from examples.parity.parity import ENGINES, launch_command, write_inputs
from hy_prfl.configs.parser import parse_config
from hy_prfl.models.loading import load_transformer
from hy_prfl.runtime.sharding import shard_for_zero3


# Engine, degree of context parallelism, whether the reward model is sharded.
RUNS = [("DDP", 1, False), ("ZeRO-3", 2, False), ("ZeRO-3", 1, False), ("ZeRO-2", 1, False), ("ZeRO-3", 2, True)]
# Frames, height and width of the clips.
CLIP = ("17", "256", "256")


@dataclass(kw_only=True)
class MemoryConfig:
    """Options of the measurement."""

    output_dir: str = field(default="outputs/memory", metadata={"help": "Folder for data and runs."})
    output: str = field(default="outputs/memory.json", metadata={"help": "Table to write."})
    load: str | None = field(
        default=None,
        metadata={"help": "Only load: `nothing`, `whole` or `sharded`. Used by the script itself."},
    )


def peak_memory(command: Sequence[str], environment: Mapping[str, str], module: str) -> list[float]:
    """
    Run a command and return the peak memory of each process that runs `module`, in MB.

    Only allocated memory counts. Memory-mapped files do not, because the system can drop their pages.
    """
    peaks: dict[int, float] = {}
    # Without these variables the C library keeps freed memory. ZeRO-3 gathers and frees weights all the time, and the
    # kept memory would count as used.
    environment = {**environment, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    launcher = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while launcher.poll() is None:
        for process in launcher.children(recursive=True):
            try:
                if "LOCAL_RANK" in process.environ() and module in process.cmdline():
                    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
                    allocated = int(status.split("RssAnon:")[1].split()[0]) / 1000
                    peaks[process.pid] = max(allocated, peaks.get(process.pid, 0.0))
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, IndexError):
                continue
        time.sleep(0.02)
    if launcher.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{launcher.stderr.read()}")
    # Helper processes of the libraries have the same command line but need less memory.
    return sorted(peaks.values())[-2:]


def load(folder: Path, how: str) -> None:
    """Load the generator in a process of the second measurement."""
    import deepspeed  # noqa: F401  # so that its memory counts in all cases

    PartialState(cpu=True)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    if how == "nothing":
        return
    load_transformer(
        str(folder / "pipeline"),
        dtype=torch.bfloat16,
        shard=None if how == "whole" else lambda module: shard_for_zero3(module, config),
    )


def main() -> None:
    """Run everything and print the table."""
    config = parse_config(MemoryConfig, description=__doc__)
    folder = Path(config.output_dir)
    if config.load is not None:
        load(folder, config.load)
        return
    if not (folder / "data").exists():
        write_inputs(
            folder,
            num_rows=2,
            num_layers=10,
            num_attention_heads=12,
            attention_head_dim=64,
            ffn_dim=3072,
        )
    rows: list[dict[str, object]] = []
    first = 0.0
    for engine, degree, is_sharded in RUNS:
        more = ["--dry_run", "--dry_run_size", *CLIP, "--gradient_accumulation_steps=1", "--num_inference_steps=3"]
        more += ["--step_range", "1", "1", f"--shard_reward_model={is_sharded}"]
        name = f"{engine}-{degree}-{is_sharded}-{time.time_ns()}"
        command, environment = launch_command(folder, name, ENGINES[engine], "prfl", "full", degree, 1, more)
        peaks = peak_memory(command, environment, "hy_prfl.scripts.train_prfl")
        first = first or max(peaks)
        rows.append(
            {
                "engine": engine,
                "context_parallel_degree": degree,
                "shard_reward_model": is_sharded,
                "peak_megabytes": [round(peak) for peak in peaks],
                "share_of_ddp": round(max(peaks) / first, 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    for how in ("nothing", "whole", "sharded"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launch, "-m", "examples.parity.memory", f"--output_dir={folder}", f"--load={how}"]
        peaks = peak_memory(command, environment, "examples.parity.memory")
        rows.append({"load": how, "dtype": "bfloat16", "peak_megabytes": [round(peak) for peak in peaks]})
        print(json.dumps(rows[-1]), flush=True)
    Path(config.output).write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
