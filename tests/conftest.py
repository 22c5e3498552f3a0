"""Fixtures: tiny pipelines made of the real classes, and real mp4 files. Nothing is mocked, nothing is fetched."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from examples.shapes.pipeline import save_pipeline


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny text-to-video `WanPipeline`, with 3 transformer blocks. Do not write into it."""
    return save_pipeline(tmp_path_factory.mktemp("t2v") / "pipeline", num_layers=3)


@pytest.fixture(scope="session")
def i2v_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny `WanImageToVideoPipeline`, with 3 transformer blocks. Do not write into it."""
    return save_pipeline(tmp_path_factory.mktemp("i2v") / "pipeline", num_layers=3, image_to_video=True)


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """
    Function that writes a real H.264 mp4: `write_video(path, num_frames=9, height=32, width=48, fps=16, seed=0)`.

    A bright square moves over a dark ground; where it starts and how bright it is depends on the seed.
    """

    def write(
        path: Path, num_frames: int = 9, height: int = 32, width: int = 48, fps: int = 16, seed: int = 0
    ) -> Path:
        rng = np.random.default_rng(seed)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        color = rng.integers(120, 255, size=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), mode="w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for index in range(num_frames):
                image = np.full((height, width, 3), 20, dtype=np.uint8)
                shift = index % (width // 2)
                image[top : top + height // 3, left + shift : left + shift + width // 4] = color
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return write
