"""
Measures the cost of an update of PRFL, of RGB ReFL, and with each switch: `make benchmark`, or

    python -m examples.benchmark.benchmark
    python -m examples.benchmark.benchmark --sizes 1.3b 14b --num_updates 2     # on a GPU, in bfloat16

Measures time, memory and FLOPs of each case in its own process, and writes `results.json`, `results.md` and two plots
to `outputs/benchmark`. Takes some minutes with the sizes for a CPU. An interrupted run continues where it stopped.
Cases that were measured at another commit, on another machine or with other settings are measured again. See
`examples/benchmark/README.md`.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.benchmark.cases import METHODS, Case, all_cases
from examples.benchmark.inputs import write_models, write_rows
from examples.benchmark.measuring import Measured, matmul_flops, measure
from examples.benchmark.report import write_report
from examples.benchmark.sizes import SIZES, decoding_share
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.planning import plan
from hy_prfl.planning.engines import Engine
from hy_prfl.runtime.atomic_writes import replace_folder, temporary_folder, write_text
from hy_prfl.runtime.distributed import on_cpu
from hy_prfl.runtime.provenance import run_record


MODELS, CASES = "models", "cases"


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Folder for models, cases and results."})
    report_dir: str | None = field(default=None, metadata={"help": "Folder for the results; output_dir if left out."})
    sizes: list[str] = field(
        default_factory=lambda: ["tiny", "mid"], metadata={"help": f"Sizes to measure: {', '.join(SIZES)}."}
    )
    cases: list[str] = field(
        default_factory=list,
        metadata={"help": "Measure only methods and switches with these names from the tables; all if left out."},
    )
    base_clip_only: bool = field(default=False, metadata={"help": "Leave out the clips with more frames or pixels."})
    num_updates: int = field(
        default=3, metadata={"help": "Minimum number of timed updates in each case; the fastest counts."}
    )
    min_seconds: float = field(default=6.0, metadata={"help": "Minimum total seconds of the timed updates of a case."})
    num_inference_steps: int = field(default=40, metadata={"help": "Steps of the sampler's whole chain."})
    num_threads: int = field(default=2, metadata={"help": "Threads on the CPU."})
    fresh: bool = field(default=False, metadata={"help": "Measure all cases again."})

    def __post_init__(self) -> None:
        for name in self.sizes:
            check(name in SIZES, "sizes", name, f"of {', '.join(SIZES)}")
        for name in ("num_updates", "num_threads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.min_seconds >= 0, "min_seconds", self.min_seconds, "at least 0")
        check(self.num_inference_steps >= 8, "num_inference_steps", self.num_inference_steps, "at least 8")


def machine(num_threads: int) -> dict[str, Any]:
    """Machine and versions of a run, as JSON values."""
    record = run_record(seed=0)
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cpu_cores": os.cpu_count(),
        "num_threads": num_threads,
        **{name: record[name] for name in ("devices", "platform", "python", "libraries", "hy_prfl", "git")},
    }


def in_process_of_its_own(log: Path, function: Any, *args: Any) -> None:
    """
    Call a function in a new process and wait for it. What it prints is written to `log`.

    On the CPU it is forked from a server that has imported everything and has done nothing else. On a GPU it starts from
    nothing: some packages ask for the GPUs when they are imported, and CUDA cannot be used in a fork of such a process.

    Raises:
        RuntimeError: If the process failed; with the end of its output.
    """
    context = multiprocessing.get_context("forkserver" if on_cpu() else "spawn")
    context.set_forkserver_preload(["examples.benchmark.cases", "examples.benchmark.report"])
    process = context.Process(target=_with_output_in, args=(log, function, *args))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    if process.exitcode:
        printed = log.read_text(encoding="utf-8", errors="replace")[-3000:] if log.is_file() else ""
        reason = " (killed, perhaps because memory ran out)" if process.exitcode < 0 else ""
        what = " of ".join([function.__name__, *(str(each) for each in args[:1])])
        raise RuntimeError(f"{what} ended with {process.exitcode}{reason}.\n{printed}")


def _with_output_in(log: Path, function: Any, *args: Any) -> None:
    # File descriptors, because torch's profiler prints from C++.
    with log.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    function(*args)


def precision() -> torch.dtype:
    """Type that the models compute in: bfloat16 on a GPU, float32 on the CPU."""
    return torch.float32 if on_cpu() else torch.bfloat16


def prepare_inputs(case: Case, inputs: Path) -> None:
    """Write the models of a size and the rows of a clip, unless they exist."""
    torch.set_num_threads(2)
    if not inputs.exists():
        written = temporary_folder(inputs)
        size = case.size
        write_models(
            written,
            num_reward_layers=size.num_reward_layers,
            reward_options={"head_dims": size.head_dims},
            device="cpu" if on_cpu() else "cuda",
            dtype=precision(),
            text_dim=size.transformer["text_dim"],
            transformer_config=size.transformer,
            # `build_pipeline` makes a smaller VAE by default.
            vae_config={"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, **size.vae},
        )
        replace_folder(written, inputs)
    if not (inputs / str(case.clip)).exists():
        rows = temporary_folder(inputs / str(case.clip))
        write_rows(inputs, rows.name, latents_shape=case.clip.latents_shape, max_sequence_length=case.size.text_tokens)
        replace_folder(rows, inputs / str(case.clip))


def planned(case: Case, training: PRFLTrainingConfig) -> dict[str, float]:
    """Memory and FLOPs of an update that `hy-prfl plan` predicts from the models' configurations."""
    needs = plan(
        training,
        height=case.clip.height,
        width=case.clip.width,
        num_frames=case.clip.num_frames,
        text_tokens=case.size.text_tokens,
        reserved=0,
        gpu_memory=float("inf"),
        engine=Engine(mixed_precision=not on_cpu(), on_gpu=not on_cpu()),
        reward_config=WanRewardModel.load_own_config(training.reward_model),
    )
    return {"planned_bytes": needs.peak * 1e9, "planned_flops": sum(needs.teraflops.values()) * 1e12}


def run_case(case: Case, inputs: Path, result: Path, settings: Mapping[str, Any]) -> None:
    """Measure a case and write the result. A case that does not work or fit here is a result too."""
    if not on_cpu():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    torch.set_num_threads(settings["machine"]["num_threads"])
    device = torch.device("cpu" if on_cpu() else "cuda")
    row: dict[str, Any] = {"matmul_flops": matmul_flops(device, precision())}
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = case.trainer(inputs, Path(folder), Measured)
            row["num_parameters"] = sum(parameter.numel() for parameter in trainer.unwrapped.parameters())
            row |= dataclasses.asdict(measure(trainer, settings["num_updates"], settings["min_seconds"]))
            if METHODS[case.method].decodes is None:
                row |= planned(case, trainer.config)
        except torch.cuda.OutOfMemoryError:
            row["unavailable"] = "out of memory"
        except ValueError as error:
            # The attention kernel is not installed, or does not work on this device.
            if "attention_backend" not in str(error):
                raise
            row["unavailable"] = "not here"
            row["reason"] = str(error)
    write_text(result, json.dumps({"settings": settings, "result": row}, indent=2))


def selected_cases(config: BenchmarkConfig) -> list[Case]:
    """The cases that the options select."""
    cases = all_cases(
        {name: SIZES[name] for name in config.sizes},
        device=torch.device("cpu" if on_cpu() else "cuda"),
        num_inference_steps=config.num_inference_steps,
        only=config.cases,
    )
    return [case for case in cases if not config.base_clip_only or case.clip == case.size.base]


def digest(values: Mapping[str, Any]) -> str:
    """Short hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def measured(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Result of an earlier run with the same settings, if any."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept["result"] if kept["settings"] == json.loads(json.dumps(settings)) else None


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that have no result yet, and write the report."""
    config = parse_config(BenchmarkConfig, argv, description=__doc__)
    folder = Path(config.output_dir)
    if config.fresh:
        for name in (MODELS, CASES):
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in (MODELS, CASES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    report_dir = folder if config.report_dir is None else Path(config.report_dir)
    where = machine(config.num_threads)
    shares = {name: decoding_share(SIZES[name]) for name in config.sizes}
    rows: list[dict[str, Any]] = []
    progress = tqdm(selected_cases(config), desc="Cases")
    for case in progress:
        progress.set_postfix_str(f"{case.size_name}, {case.clip}, {case.label}")
        timing = {"num_updates": config.num_updates, "min_seconds": config.min_seconds}
        settings = {**case.settings, **timing, "machine": where}
        slug = "".join(letter if letter.isalnum() else "_" for letter in case.label)
        path = folder / CASES / f"{case.size_name}-{case.clip}-{slug}.json"
        log = path.with_suffix(".log")
        result = measured(path, settings)
        if result is None:
            inputs = folder / MODELS / f"{case.size_name}-{digest(settings['models'])}"
            if not (inputs / str(case.clip)).exists():
                in_process_of_its_own(log, prepare_inputs, case, inputs)
            in_process_of_its_own(log, run_case, case, inputs, path, settings)
            result = measured(path, settings)
            assert result is not None
        columns = ("size", "clip", "num_tokens", "method", "switch", "options")
        rows.append({**{name: settings[name] for name in columns}, **result})
        write_report(report_dir, rows, machine=where, timing=timing, decoding_shares=shares)
    progress.close()
    print((report_dir / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
