"""The benchmark of reading runs, and both layouts hold the same clips. Its times are not tested."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmark.reading import ReadingConfig, dataset_reader, main, upstream_reader, write_clips


SMALL = {"height": 16, "width": 32, "num_frames": 5, "num_clips": 2}


def test_both_layouts_hold_the_same_clips(tmp_path: Path) -> None:
    config = ReadingConfig(batch_size=2, **SMALL)
    write_clips(tmp_path, config)
    latents, condition, image_embeds, prompt_embeds, _ = upstream_reader(tmp_path, config)(0)  # type: ignore[misc]
    text: Any = dataset_reader(tmp_path / "text", config)(0)
    image: Any = dataset_reader(tmp_path / "image", config)(0)
    for batch in (text, image):
        assert batch.ids == ["clip-0", "clip-1"]
        assert torch.equal(batch.latents.float(), latents)
        assert torch.equal(batch.prompt_embeds[:, : prompt_embeds.shape[1]].float(), prompt_embeds)
    assert text.condition is None
    assert torch.equal(image.condition[:, 4:].float(), condition)
    assert torch.equal(image.image_embeds.float(), image_embeds)


def test_it_prints_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    main([*(f"--{name}={value}" for name, value in SMALL.items()), "--repetitions=2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:26].strip() for line in lines[2:]] == [
        "upstream, five .npy files",
        "text-to-video row",
        "image-to-video row",
    ]
    assert lines[2].count("(1.00)") == 2
