"""
Measures what reading ahead saves in `preprocess`: clips are decoded by threads while the VAE encodes other clips.

    python -m examples.benchmark.preprocessing                    # short 1080p clips, a small VAE of the real class
    python -m examples.benchmark.preprocessing --pipeline Wan-AI/Wan2.1-T2V-14B-Diffusers --num_frames 81   # on a GPU

Writes mp4 files to a temporary folder and makes datasets from them, alternately with `num_workers` 0 and with threads.
Prints the fastest of several runs of each, the ratio, and the largest possible ratio: (r + e) / max(r, e) if reading
takes r seconds and encoding e. Compare only ratios of one run. They are lower if the machine has no free core. All
datasets must be equal, bit for bit.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from datasets import load_from_disk

from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.encoding import LatentEncoder
from hy_prfl.data.finished import request_digest
from hy_prfl.data.manifest import ManifestRow
from hy_prfl.data.preprocessing import ClipContent, ClipEncoder, ClipSettings
from hy_prfl.data.store import build_dataset
from hy_prfl.data.video import VideoError
from hy_prfl.inference.tiny_pipelines import build_pipeline


FPS = 16


@dataclass(kw_only=True)
class PreprocessingConfig:
    """Options of the measurement."""

    pipeline: str | None = field(
        default=None, metadata={"help": "Pipeline whose VAE encodes; a small one with random weights if left out."}
    )
    num_clips: int = field(default=6, metadata={"help": "Clips of a dataset."})
    num_frames: int = field(default=17, metadata={"help": "Frames of a clip, 4k + 1."})
    source_height: int = field(
        default=1080, metadata={"help": "Height of the files in pixels; their aspect ratio is 16:9."}
    )
    height: int = field(default=480, metadata={"help": "Height of the encoded clips."})
    width: int = field(default=832, metadata={"help": "Width of the encoded clips."})
    vae_width: int = field(default=2, metadata={"help": "Channels of the small VAE's first layer; Wan2.1 has 96."})
    num_workers: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Numbers of threads to compare."})
    num_runs: int = field(
        default=3, metadata={"help": "Datasets made with each number of threads; the fastest counts."}
    )
    num_threads: int = field(default=1, metadata={"help": "Number of torch's threads on the CPU."})

    def __post_init__(self) -> None:
        for name in ("num_clips", "num_runs", "num_threads", "vae_width"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for number in self.num_workers:
            check(number >= 1, "num_workers", number, "at least 1")


class TimedEncoder(ClipEncoder):
    """A `ClipEncoder` that adds up the seconds of reading and encoding."""

    reading = encoding = 0.0
    output_dir = Path()

    def read_row(self, row: ManifestRow) -> ClipContent:
        start = time.perf_counter()
        content = super().read_row(row)
        self.reading += time.perf_counter() - start
        return content

    def encode_rows(
        self, rows: Sequence[ManifestRow], contents: Sequence[ClipContent]
    ) -> list[dict[str, Any] | VideoError]:
        start = time.perf_counter()
        results = super().encode_rows(rows, contents)
        self.encoding += time.perf_counter() - start
        return results


def write_clip(path: Path, *, num_frames: int, height: int, seed: int) -> None:
    """Write a moving picture of smooth noise in H.264. Decoding it takes as long as a film."""
    width = height * 16 // 9 // 2 * 2
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 255, (height // 8 + 8, width // 8 + 8, 3), dtype=np.uint8)
    picture = noise.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(num_frames):
            top, left = index % 60, 2 * index % 60
            image = np.ascontiguousarray(picture[top : top + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def make_dataset(encoder: LatentEncoder, config: PreprocessingConfig, folder: Path, num_workers: int) -> TimedEncoder:
    """Encode the clips in `folder` into a dataset in the same folder."""
    settings = ClipSettings(
        num_frames=config.num_frames, min_num_frames=config.num_frames, buckets=((config.height, config.width),)
    )
    rows = [
        ManifestRow(where=path.name, id=path.stem, prompt="soft noise", video=path)
        for path in sorted(folder.glob("*.mp4"))
    ]
    clips = TimedEncoder(encoder, settings)
    output_dir = folder / f"dataset-{num_workers}-{time.monotonic_ns()}"
    build_dataset(rows, clips, output_dir, digest=request_digest(rows, {}), num_workers=num_workers)
    clips.output_dir = output_dir
    return clips


def same_rows(first: Path, second: Path) -> bool:
    """Whether two datasets are equal, bit for bit."""
    return bool(load_from_disk(first).data.table.equals(load_from_disk(second).data.table))


def compare(encoder: LatentEncoder, config: PreprocessingConfig, folder: Path) -> dict[int, float]:
    """Seconds for a dataset with each number of threads, 0 first. Also prints them."""
    fastest: dict[int, float] = {}
    reading = encoding = float("inf")
    expected: Path | None = None
    for _ in range(config.num_runs):
        for number in (0, *config.num_workers):
            start = time.perf_counter()
            clips = make_dataset(encoder, config, folder, number)
            fastest[number] = min(fastest.get(number, float("inf")), time.perf_counter() - start)
            if number == 0:
                reading, encoding = min(reading, clips.reading), min(encoding, clips.encoding)
            expected = clips.output_dir if expected is None else expected
            if not same_rows(expected, clips.output_dir):
                raise RuntimeError(f"The rows with {number} threads differ from those without.")
    most = (reading + encoding) / max(reading, encoding)
    print(f"in turn: {fastest[0]:.2f} s, of them {reading:.2f} reading and {encoding:.2f} encoding")
    for number in config.num_workers:
        ratio = fastest[0] / fastest[number]
        print(
            f"{number} thread(s): {fastest[number]:.2f} s, {ratio:.2f} times as fast; at most {most:.2f} is possible"
        )
    return fastest


def main(argv: Sequence[str] | None = None) -> None:
    """Write the clips, compare and print."""
    config = parse_config(PreprocessingConfig, argv, description=__doc__)
    torch.set_num_threads(config.num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.pipeline is None:
        encoder = LatentEncoder(build_pipeline(vae_base_dim=config.vae_width).to(device), vae_tiling="off")
    else:
        encoder = LatentEncoder.from_pretrained(config.pipeline, device=device, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(config.num_clips):
            path = folder / f"{seed}.mp4"
            write_clip(path, num_frames=config.num_frames, height=config.source_height, seed=seed)
        compare(encoder, config, folder)


if __name__ == "__main__":
    main()
