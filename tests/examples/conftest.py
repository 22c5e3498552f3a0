"""What several tests of the examples start from."""

import pytest
from diffusers import WanPipeline

from examples.shapes.pretrain import PRETRAINED_DIR


@pytest.fixture(scope="module")
def shipped() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(PRETRAINED_DIR)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
