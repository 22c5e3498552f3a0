"""One video on two processes, and weights that are split over them, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hy_prfl.data.video import read_video
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.inference.video_files import read_record
from hy_prfl.scripts.generate import main
from tests.inference.two_processes import SIZE


ROOT = Path(__file__).parents[2]
PROMPTS = [{"caption": "a red circle", "id": "red"}, {"caption": "a blue square", "id": "blue"}, {"caption": "a star"}]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, pipeline_dir: Path, i2v_pipeline_dir: Path, expert_pipeline_dir: Path
) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("two-processes")
    (folder / "pipelines").mkdir()
    for kind, path in (("t2v", pipeline_dir), ("i2v", i2v_pipeline_dir), ("a14b", expert_pipeline_dir)):
        (folder / "pipelines" / kind).symlink_to(path)
    build_pipeline(num_layers=2, expand_timesteps=True).save_pretrained(folder / "pipelines" / "5b")
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        layers = {f"transformer.blocks.{index}.attn1.to_{part}" for index in (0, 2) for part in "qv"}
        weights = {
            f"{layer}.lora_{half}.weight": shape
            for layer in sorted(layers)
            for half, shape in (("A", (2, 24)), ("B", (24, 2)))
        }
        save_file(
            {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in weights.items()},
            folder / f"{name}.safetensors",
        )
    pixels = np.random.default_rng(0).integers(0, 256, size=(32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / "ddp_cpu.yaml")]
    command = [*launcher, str(ROOT / "tests" / "inference" / "two_processes.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    (folder / "output.txt").write_text(finished.stdout + finished.stderr)
    if finished.returncode:
        raise RuntimeError(f"{finished.stdout}\n{finished.stderr}")
    return folder


@pytest.mark.launch
class TestTwoProcesses:
    CASES = {
        "t2v": (16, 1.0, 1.0),
        "t2v, shards": (16, 0.5, 0.5),
        "t2v, model offload": (16, 1.0, 1.0),
        "t2v, sequential offload": (16, 1.0, 1.0),
        "i2v": (16, 0.5, 1.0),
        "a14b": (16, 0.5, 0.5),
        "5b": (4, 0.5, 0.5),
        "t2v, ring": (16, 1.0, 1.0),
        "i2v, ring": (16, 0.5, 0.5),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_latents_are_those_of_one_process(self, folder: Path, case: str) -> None:
        result: dict[str, Any] = json.loads((folder / "results.json").read_text())[case]
        assert result["error"] < 1e-4 * result["scale"]
        num_tokens, transformer, text_encoder = self.CASES[case]
        assert result["tokens"] == num_tokens / 2
        assert result["transformer"] == pytest.approx(transformer, abs=0.02)
        assert result["text_encoder"] == pytest.approx(text_encoder, abs=0.02)

    def test_the_mean_of_a_view_with_gaps(self, folder: Path) -> None:
        assert json.loads((folder / "results.json").read_text())["mean of a view"] == {"error": 0.0}

    def test_one_process_of_a_group_writes(self, folder: Path) -> None:
        names = [sorted(path.name for path in (folder / f"rank-{rank}").iterdir()) for rank in (0, 1)]
        assert names == [["blue_seed_0.mp4", "manifest.json", "red_seed_0.mp4"], []]

    def test_the_command(self, folder: Path, tmp_path: Path) -> None:
        size = [f"--{name}={value}" for name, value in SIZE.items()]
        options = [f"--prompts={folder / 'prompts.json'}", "--dtype=float32", *size]
        options += [f"--pretrained_model_name_or_path={folder / 'pipelines' / 't2v'}"]
        main([*options, f"--output_dir={tmp_path}"])
        names = sorted(path.name for path in tmp_path.glob("*.mp4"))
        assert names == sorted(path.name for path in (folder / "together").glob("*.mp4"))
        for name in names:
            alone, together = tmp_path / name, folder / "together" / name
            frames = [read_video(path, fps=16, num_frames=5).astype(int) for path in (alone, together)]
            assert np.abs(frames[0] - frames[1]).mean() < 0.1
            # Who made a video is no part of what it was made from.
            assert read_record(alone) == read_record(together)
        assert "3 videos generated, 0 were there" in (folder / "output.txt").read_text()
        assert "0 videos generated, 3 were there" in (folder / "output.txt").read_text()

    def test_all_processes_draw_one_seed(self, folder: Path) -> None:
        (seed,) = {row["seed"] for row in json.loads((folder / "random" / "manifest.json").read_text())}
        assert f"seed: {seed}\n" in (folder / "random" / "generate.yaml").read_text()
        assert len(list((folder / "random").glob(f"*_seed_{seed}.mp4"))) == len(PROMPTS)
