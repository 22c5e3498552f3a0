"""What the demo says at its end is in the files that its stages wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.shapes.clips import FAILURES, FPS, draw_clip, render_clip, split_captions
from examples.shapes.judge import judge_manifest, write_json
from examples.shapes.report import ARMS
from examples.shapes.summary import RUNS, curves, finish, summarize
from hy_prfl.inference.video_files import write_video


TIMESTEPS = (100, 500, 900)
# For each arm, whether each of its two videos is good.
GOOD = ([False, False], [True, False], [True, False], [True, True])


def write_clips(folder: Path, good: list[bool]) -> list[dict[str, Any]]:
    """Clips of the world in `folder`, with rows as `generate` writes them."""
    rows = []
    for index, is_good in enumerate(good):
        clip = draw_clip(
            index,
            captions=split_captions("held_out"),
            good_share=float(is_good),
            failures=["frozen"] if not is_good else FAILURES,
            seed=3,
        )
        name = f"{index:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{name}.mp4", render_clip(clip), FPS)
        rows.append({"id": name, "video": f"{name}.mp4", "caption": str(clip.caption), "seed": 7 + index})
    write_json(folder / "manifest.json", rows)
    return rows


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Folder of a demo with two videos for each arm."""
    for arm, good in zip(ARMS, GOOD, strict=True):
        write_clips(tmp_path / "videos" / arm, good)
        verdicts, summary = judge_manifest(tmp_path / "videos" / arm / "manifest.json")
        write_json(tmp_path / "verdicts" / f"{arm}.json", {"summary": summary, "verdicts": verdicts})
        rewards = {"reward": 0.1 + sum(good) / 4, **{f"reward_t{timestep}": timestep / 1000 for timestep in TIMESTEPS}}
        write_json(tmp_path / "scores" / f"{arm}.csv.summary.json", {"rewards": rewards})
    metrics = {f"{name}/t{timestep}": 0.75 for name in ("accuracy", "auc") for timestep in TIMESTEPS}
    write_json(tmp_path / "reward" / "best" / "metrics.json", metrics)
    rows = write_clips(tmp_path / "clips" / "held_out", [True, True, True, True])
    labelled = [{**row, "physics_quality": 1, "human_quality": int(index > 0)} for index, row in enumerate(rows)]
    write_json(tmp_path / "clips" / "held_out" / "manifest.json", labelled)
    for run in RUNS:
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        lines = [{"step": step, "train/loss": 1 / step} for step in (1, 2)]
        lines.append({"step": 2, **{f"validation/auc/t{timestep}": 0.8 for timestep in TIMESTEPS}})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.yaml").write_text("seed: 0\n")
    # The samples of PRFL's only validation are the first two good clips and a frozen one.
    write_clips(tmp_path / "prfl" / "validation" / "step-2", [True, True, False])
    for path in sorted((tmp_path / "prfl" / "validation" / "step-2").glob("*.mp4")):
        path.rename(path.with_name(f"{int(path.stem)}.mp4"))
    return tmp_path


def test_numbers_are_those_of_the_files(demo: Path) -> None:
    summary = summarize(demo, {"clips": 2.0, "prfl": 3.5})
    assert [summary[arm]["good"] for arm in ARMS] == [0.0, 0.5, 0.5, 1.0]
    assert [summary[arm]["failures"]["frozen"] for arm in ARMS] == [2, 1, 1, 0]
    assert [summary[arm]["reward"] for arm in ARMS] == [0.1, 0.35, 0.35, 0.6]
    assert summary["base"]["rewards_by_timestep"] == {"100": 0.1, "500": 0.5, "900": 0.9}
    assert summary["reward_model"]["majority_accuracy"] == 0.75
    assert summary["reward_model"]["num_labels"] == 4
    assert summary["seconds"] == {"clips": 2.0, "prfl": 3.5, "total": 5.5}


def test_the_judge_looks_at_the_samples_of_the_training(demo: Path) -> None:
    lines = [json.loads(line) for line in curves(demo, "prfl").read_text().splitlines()]
    (judged,) = [line for line in lines if "judge/good" in line]
    assert judged == {"step": 2, "judge/good": pytest.approx(2 / 3)}
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert not any("judge/good" in line for line in map(json.loads, curves(demo, "reward").read_text().splitlines()))


def test_the_demo_ends_with_a_table_a_file_and_a_page(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(demo, {"clips": 2.0})
    assert json.loads((demo / "summary.json").read_text()) == summarize(demo, {"clips": 2.0})
    table = capsys.readouterr().out
    for title, good in zip(ARMS.values(), ("0%", "50%", "50%", "100%"), strict=True):
        (line,) = [line for line in table.splitlines() if line.startswith(f"{title:<20}")]
        assert good in line.split()
    page = (demo / "report.html").read_text()
    assert page.count("data:video/mp4") == 8
    assert "http://" not in page.replace("http://www.w3.org", "")
