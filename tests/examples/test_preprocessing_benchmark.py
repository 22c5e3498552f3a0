"""The benchmark of reading ahead runs, and fails if datasets differ. Its times are not tested."""

import re
from pathlib import Path

import pytest
from datasets import Dataset

from examples.benchmark.preprocessing import main, same_rows, write_clip
from hy_prfl.data.video import read_video


def test_it_prints_a_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--source_height=72", "--height=32", "--width=48", "--num_frames=5", "--num_clips=2", "--num_runs=1"]
    main([*sizes, "--num_workers", "2"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("in turn: ")
    assert re.fullmatch(r"2 thread\(s\): [\d.]+ s, [\d.]+ times as fast; at most [\d.]+ is possible", lines[1])


def test_clips_have_the_size_asked_for_and_differ(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_clip(tmp_path / f"{seed}.mp4", num_frames=5, height=72, seed=seed)
    first, second = (read_video(tmp_path / f"{seed}.mp4", fps=16, num_frames=5) for seed in (0, 1))
    assert first.shape == second.shape == (5, 72, 128, 3)
    assert (first != second).mean() > 0.5


def test_datasets_are_compared_bit_for_bit(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-50)):
        Dataset.from_dict({"x": [value]}).save_to_disk(tmp_path / name)
    assert same_rows(tmp_path / "a", tmp_path / "b")
    assert not same_rows(tmp_path / "a", tmp_path / "c")
