from pathlib import Path

import pytest

from hy_prfl.formats.pipeline_info import PipelineInfo
from hy_prfl.inference.video_sizes import check_split_fits


def test_what_divides(pipeline_dir: Path, expert_pipeline_dir: Path) -> None:
    for folder in (pipeline_dir, expert_pipeline_dir):
        check_split_fits(PipelineInfo.read(str(folder)), 2, [(5, 32, 64), (9, 32, 32)])


@pytest.mark.parametrize(
    ("degree", "shape", "message"),
    [
        (3, (9, 48, 48), r"2 heads and the 27 tokens of latents \[16, 3, 6, 6\]"),
        (2, (9, 48, 48), r"these do: \[1\]"),
    ],
)
def test_what_does_not(pipeline_dir: Path, degree: int, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_split_fits(PipelineInfo.read(str(pipeline_dir)), degree, [shape])
