"""Every kind of training that is launched on GPUs in bfloat16: it runs, and computes what float32 does."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hy_prfl.data.synthetic import synthetic_dataset
from hy_prfl.models.reward_model import WanRewardModel

from .matrix import KINDS, all_cases, case_name
from .training import write_models


pytestmark = pytest.mark.launch

# Pipeline, latents and image condition of each kind.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "t2v": ({}, {"latents_shape": (16, 3, 4, 4)}),
    "i2v": (
        {"image_to_video": True},
        {"latents_shape": (16, 3, 4, 4), "condition_shape": (20, 3, 4, 4), "image_embeds_shape": (5, 32)},
    ),
    "5b": (
        {"image_to_video": True, "expand_timesteps": True},
        {"latents_shape": (48, 3, 4, 4), "condition_shape": (48, 1, 4, 4)},
    ),
    "a14b": ({"boundary_ratio": 0.875}, {"latents_shape": (16, 3, 4, 4)}),
}
ENGINES = {
    "float32": ["--config_file", "accelerate_configs/cpu.yaml"],
    "ddp": ["--config_file", "accelerate_configs/ddp_cpu.yaml", "--mixed_precision", "bf16"],
    # DeepSpeed's files as they are on GPUs.
    "zero2": [
        *("--config_file", "accelerate_configs/zero2_cpu.yaml", "--deepspeed_config_file", "ds_configs/zero2.json")
    ],
    "zero3": [
        *("--config_file", "accelerate_configs/zero3_cpu.yaml", "--deepspeed_config_file", "ds_configs/zero3.json")
    ],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a pipeline, a reward model and a dataset of every kind."""
    folder = tmp_path_factory.mktemp("matrix")
    for kind, (pipeline_options, shapes) in MODELS.items():
        fingerprint = write_models(folder / kind, **pipeline_options)
        dataset = synthetic_dataset(
            text_dim=32, text_tokens=3, max_sequence_length=16, num_rows=8,
            vae_fingerprint=fingerprint, **shapes,
        )  # fmt: skip
        dataset.save_to_disk(folder / kind / "data")
        other = WanRewardModel.from_pretrained(folder / kind / "reward")
        other.reset_head()
        other.save_pretrained(folder / kind / "reward-2")
    return folder


def launch(
    models: Path, engine: str, kinds: Sequence[str] = KINDS, degrees: Sequence[int] = (1, 2)
) -> dict[str, dict[str, float]]:
    """Run the cases of an engine."""
    results = models / f"{engine}.json"
    program = Path(__file__).with_name("matrix.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", *ENGINES[engine], str(program)]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        # Accelerate's word for: the end of a training is not the end of the process group.
        "FORK_LAUNCHED": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **({"ACCELERATE_USE_CPU": "true"} if engine in ("float32", "ddp") else {}),
    }
    finished = subprocess.run(
        [*command, str(models), str(results), ",".join(kinds), ",".join(map(str, degrees))],
        env=environment, text=True, capture_output=True, timeout=900,
    )  # fmt: skip
    assert finished.returncode == 0, f"{finished.stdout[-4000:]}\n{finished.stderr[-8000:]}"
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def exact(models: Path) -> dict[str, dict[str, float]]:
    """The cases in float32, in one process."""
    return launch(models, "float32", degrees=[1])


def assert_alike(results: dict[str, dict[str, float]], exact: dict[str, dict[str, float]]) -> None:
    """Losses, logits and norms of gradients are those of float32 but for rounding."""
    different = []
    for name, metrics in results.items():
        expected = exact[case_name(*name.split()[:3], 1)]
        assert set(metrics) == set(expected), name
        different += [
            f"{name}: {metric} is {metrics[metric]:.4g}, in float32 {value:.4g}"
            for metric, value in expected.items()
            if metric.endswith(("loss", "grad_norm", "reward_logit", "anchor"))
            and not math.isclose(metrics[metric], value, rel_tol=0.05, abs_tol=0.01)
        ]
    assert not different


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_bfloat16_computes_what_float32_does(models: Path, exact: dict[str, dict[str, float]], engine: str) -> None:
    results = launch(models, engine)
    assert set(results) == {case_name(*case) for case in all_cases(KINDS, (1, 2))}
    assert_alike(results, exact)


def test_weights_kept_within_a_node(
    models: Path, exact: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 between nodes: here of one process each would keep nothing, so it is one node of two."""
    settings = json.loads(Path("ds_configs/zero3_hpz.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = 2
    file = models / "zero3_hpz.json.config"
    file.write_text(json.dumps(settings))
    configs = ["--config_file", "accelerate_configs/zero3_cpu.yaml", "--deepspeed_config_file", str(file)]
    monkeypatch.setitem(ENGINES, "zero3_hpz", configs)
    assert_alike(launch(models, "zero3_hpz", kinds=["t2v"], degrees=[1]), exact)
