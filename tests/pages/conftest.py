"""Small manifests of real videos, the application without a socket, and the files of a run."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from hy_prfl.data.manifest import read_manifest
from hy_prfl.pages.annotation import clip_items, pair_items
from hy_prfl.pages.gold import with_gold
from hy_prfl.pages.journal import Journal
from hy_prfl.pages.server import PageSettings, build_app
from hy_prfl.pages.study import Study


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Manifest of 24 videos in 12 pairs. Do not write into its folder."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for index in range(24):
        name = f"model_{'ab'[index % 2]}_{index:02d}"
        write_video(folder / f"{name}.mp4", seed=index, height=64, width=96, num_frames=17)
        rows.append(
            {
                "id": name,
                "video": f"{name}.mp4",
                "caption": f"a <square> & more, {index // 2}",
                "pair_id": f"p{index // 2}",
            }
        )
    path = folder / "manifest.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def open_study(manifest: Path, tmp_path: Path) -> Iterator[Callable[..., Study]]:
    """Function that opens a study of the manifest's first clips on the same journal; closes an earlier one."""
    journals: list[Journal] = []

    def open_one(num_items: int = 6, *, kind: str = "clips", gold: Any = None, **options: Any) -> Study:
        for journal in journals:
            journal.close()
        journals[:] = [Journal(tmp_path / "journal.jsonl")]
        rows = read_manifest(manifest)
        items = with_gold(clip_items(rows) if kind == "clips" else pair_items(rows), gold or {})
        questions = options.pop("questions", ["physics_quality"] if kind == "clips" else ["preference"])
        options = {"labels_per_item": 1} | options
        return Study(journals[0], items[:num_items], kind=kind, questions=questions, **options)

    yield open_one
    for journal in journals:
        journal.close()


@pytest.fixture
def open_client(open_study: Callable[..., Study]) -> Callable[..., TestClient]:
    """Function that returns a client of the application of `open_study`, as a browser on this machine."""

    def open_one(*args: Any, settings: dict[str, Any] | None = None, save: Any = None, **options: Any) -> TestClient:
        study = open_study(*args, **options)
        page = PageSettings(
            title="Label <clips>",
            instructions="Look & see.",
            questions=dict.fromkeys(study.questions, "Good?"),
            **(settings or {}),
        )
        client = TestClient(build_app(study, page, save or (lambda now: None)), base_url="http://127.0.0.1:8765")
        client.study = study  # type: ignore[attr-defined]
        return client

    return open_one


@pytest.fixture
def run_dir(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    """Files of a PRFL run of 800 steps that took an hour, validated four times."""
    folder = tmp_path / "run <1>"
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for step in (200, 400, 600, 800):
        lines.append({"step": step, "train/flow_loss": 1 / step, "train/reward": 0.3 + step / 2000})
        reward = {f"validation/reward/t{timestep}": step / 1000 for timestep in (200, 600, 1000)}
        lines.append({"step": step, "validation/reward": step / 1000, **reward})
        for sample in range(3):
            write_video(folder / "validation" / f"step-{step}" / f"{sample:04d}.mp4", seed=sample)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"pretrained_model_name_or_path": "Wan-AI/<b>", "reward_model": "outputs/reward", "lora_rank": 16}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    record = {"started": "2026-01-01T10:00:00+00:00", "command": ["train_prfl.py", "--a", "b"], "num_processes": 8}
    record |= {"git": {"commit": "abc", "dirty": False}, "libraries": {"torch": "2.6"}}
    record |= {"finished": "2026-01-01T11:00:00+00:00", "finished_step": 800}
    (folder / "run.json").write_text(json.dumps([record]))
    return folder
