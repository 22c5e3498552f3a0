"""The page holds everything it shows: parsed as a browser does, its videos decoded back."""

import base64
import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import av
import numpy as np
import pytest

from examples.shapes.report import Comparison, rewards_by_third, write_report
from tests.pages.html import Page


MP4, SVG = "data:video/mp4;base64,", "data:image/svg+xml;base64,"


def arm(good: float, frozen: int, rewards: tuple[float, float, float]) -> dict[str, Any]:
    by_timestep = dict(zip(("201", "600", "1000"), rewards, strict=True))
    failures = {"frozen": frozen, "beyond": 1}
    return {"good": good, "reward": 0.4, "failures": failures, "rewards_by_timestep": by_timestep}


SUMMARY = {
    "base": arm(0.25, 11, (0.31, 0.32, 0.33)),
    "flow_matching": arm(0.5, 7, (0.41, 0.42, 0.43)),
    "prfl": arm(0.875, 2, (0.81, 0.72, 0.63)),
    "seconds": {"clips": 20.4, "train_prfl": 31.0, "total": 51.4},
    "reward_model": {"majority_accuracy": 0.6},
}


@pytest.fixture
def inputs(tmp_path: Path, write_video: Callable[..., Path]) -> dict[str, Any]:
    runs = {
        "reward": [
            {"step": 1, "train/loss": 0.7},
            {"step": 2, "train/loss": 0.6},
            {"step": 2, **{f"validation/{name}/t{t}": t / 1000 for name in ("accuracy", "auc") for t in (200, 1000)}},
        ],
        "flow_matching": [{"step": step, "train/flow_loss": 1 / step} for step in (1, 2)],
        "prfl": [
            {"step": step, "train/flow_loss": 1 / step, "train/reward_loss": 0.5, "train/reward": 0.1 * step}
            for step in (1, 2)
        ]
        + [{"step": 2, "judge/good": 0.75}],
    }
    for name, lines in runs.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    comparisons = [
        Comparison(
            caption=f"a <{color}> shape & a wall",
            seed=100 + index,
            videos={
                name: write_video(tmp_path / f"{color}-{name}.mp4", seed=10 * index + number)
                for number, name in enumerate(("base", "flow_matching", "prfl"))
            },
            verdicts={"base": "wrong_direction", "prfl": "good"},
        )
        for index, color in enumerate(("red", "blue"))
    ]
    return {
        "summary": SUMMARY,
        "runs": {name: tmp_path / f"{name}.jsonl" for name in runs},
        "videos": comparisons,
        "config": {"train_prfl": {"learning_rate": 5e-4, "lora_rank": 16, "output_dir": tmp_path / "out"}},
    }


def test_the_page_is_whole_and_needs_nothing_else(inputs: dict[str, Any], tmp_path: Path) -> None:
    text = write_report(tmp_path / "report" / "index.html", **inputs).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))
    sources = [attributes["src"] for _, attributes in page.elements if "src" in attributes]
    assert all(source.startswith(("data:video/mp4;base64,", "data:image/svg+xml;base64,")) for source in sources)
    assert not page.all("link")
    assert not page.all("script")
    assert not any("href" in attributes for _, attributes in page.elements)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in text


def test_every_video_is_in_the_page(inputs: dict[str, Any], tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "index.html", **inputs).read_text(encoding="utf-8"))
    tags = page.all("video")
    files = [path for comparison in inputs["videos"] for path in comparison.videos.values()]
    assert len(tags) == len(files) == 6
    for tag, path in zip(tags, files, strict=True):
        assert {"autoplay", "loop", "muted", "playsinline"} <= set(tag)
        decoded = [
            np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            for container in (av.open(BytesIO(base64.b64decode(tag["src"].removeprefix(MP4)))), av.open(str(path)))
        ]
        assert decoded[0].shape == (9, 32, 48, 3)
        np.testing.assert_array_equal(*decoded)
    # Captions are text, not markup.
    assert "a <red> shape & a wall" in page.texts
    assert page.texts.count("wrong direction") == page.texts.count("good") - 1 == 2


def test_the_table_says_what_the_summary_says(inputs: dict[str, Any], tmp_path: Path) -> None:
    text = write_report(tmp_path / "index.html", **inputs).read_text(encoding="utf-8")
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    table = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert table[0] == ["", "good", "frozen", "beyond"]
    assert table[1] == ["Before", "25 %", "11", "1"]
    assert table[2] == ["Flow matching only", "50 %", "7", "1"]
    assert table[3] == ["PRFL", "88 %", "2", "1"]
    assert table[4] == ["", "mean reward", "early timesteps", "middle timesteps", "late timesteps"]
    assert table[5] == ["Before", "0.40", "0.33", "0.32", "0.31"]
    assert table[6] == ["Flow matching only", "0.40", "0.43", "0.42", "0.41"]
    assert table[7] == ["PRFL", "0.40", "0.63", "0.72", "0.81"]
    assert ["train prfl", "31"] in table
    assert ["learning_rate", "0.0005"] in table


def test_the_plots_are_pictures_of_the_runs(inputs: dict[str, Any], tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "index.html", **inputs).read_text(encoding="utf-8"))
    images = page.all("img")
    for image in images:
        root = ElementTree.fromstring(base64.b64decode(image["src"].removeprefix(SVG)))
        assert root.tag.endswith("svg")
    assert [image["alt"] for image in images] == [
        "Reward of the clips in training",
        "Judge: share of good clips",
        "Flow-matching loss",
        "Reward loss",
        "Loss of the reward model",
        "Accuracy",
        "AUC",
    ]


def test_same_inputs_same_page(inputs: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    one = write_report(tmp_path / "one.html", **inputs)
    other = write_report(tmp_path / "other.html", **{**inputs, "summary": tmp_path / "summary.json"})
    plots = [re.sub(r"data:image/svg[^\"]+", "", path.read_text(encoding="utf-8")) for path in (one, other)]
    assert plots[0] == plots[1]


def test_what_is_missing_is_left_out(inputs: dict[str, Any], tmp_path: Path) -> None:
    short = {**inputs, "summary": {"base": {"good": 0.5}, "seconds": {}}, "runs": {}, "videos": [], "config": {}}
    page = Page(write_report(tmp_path / "index.html", **short).read_text(encoding="utf-8"))
    assert not page.all("video")
    assert not page.all("img")
    assert [text for text in page.texts if text in ("Results", "Before and after", "Training", "Cost")] == ["Results"]


def test_rewards_are_averaged_by_third() -> None:
    rewards = {"201": 0.1, "400": 0.2, "600": 0.4, "800": 0.6, "1000": 0.8}
    assert rewards_by_third(rewards) == pytest.approx({"late": 0.1, "middle": 0.3, "early": 0.7})
    assert rewards_by_third({"reward_t201": 0.1, "early": 0.5}) == {"late": 0.1, "early": 0.5}
    with pytest.raises(ValueError, match="got 'mean'"):
        rewards_by_third({"mean": 0.5})


def test_files_and_arms_must_be_there(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "index.html", **{**inputs, "runs": {"prfl": tmp_path / "none.jsonl"}})
    with pytest.raises(ValueError, match="must have one of base, flow_matching, prfl, round, got seconds"):
        write_report(tmp_path / "index.html", **{**inputs, "summary": {"seconds": {}}})
    assert not (tmp_path / "index.html").exists()
