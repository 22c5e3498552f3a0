"""Small manifests of real videos, and the application without a socket."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
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
