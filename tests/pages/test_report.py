"""The page of a run: whole, true to the run's files, and without anything from elsewhere."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hy_prfl.pages.report_figures import monitor_parts
from hy_prfl.scripts.report import main
from tests.pages.html import Page


PLAN = {"peak": 61.5, "hours": 2.0, "seconds_per_step": 9.0, "num_gpus": 8}


def page_of(run_dir: Path, *options: str) -> tuple[Page, str]:
    main([str(run_dir), *options])
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    return page, text


def rows_of(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_the_page_is_whole_and_needs_nothing_else(run_dir: Path) -> None:
    page, text = page_of(run_dir)
    without_data = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", without_data)
    assert not page.all("link")
    assert not page.all("script")
    assert all(element["src"].startswith("data:") for tag in ("video", "img") for element in page.all(tag))
    # What the run's files say is text, not markup.
    assert "run <1>" in page.texts
    assert "<b>" not in re.findall(r'<p class="note">.*?</p>', text)[0]
    assert [text for text in page.texts if text.startswith("Fine-tuning")] == [
        "Fine-tuning of a generator (PRFL), from Wan-AI/<b>; finished after 800 steps."
    ]
    titles = ["Training", "Against noise", "Samples through training", "Cost", "Configuration", "Provenance"]
    assert [text for text in page.texts if text in (*titles, "Calibration", "Before and after")] == titles
    assert {image["alt"] for image in page.all("img")} == {"flow loss", "reward", "reward by noise level"}
    # 3 samples at 4 validations.
    assert len(page.all("video")) == 12
    assert all(video["aria-label"] for video in page.all("video"))
    table = rows_of(text)
    assert ["git.commit", "&#34;abc&#34;"] in table
    assert ["command", "train_prfl.py --a b"] in table
    assert ["lora_rank", "16"] in table
    assert ["hours", "-", "1"] in table
    assert ["seconds per step", "-", "4.5"] in table


def test_a_run_without_a_monitor_says_so(run_dir: Path) -> None:
    page, _ = page_of(run_dir)
    assert "Monitor" in page.texts
    assert [text for text in page.texts if text.startswith("This run had no monitor")]
    config = {"pretrained_model_name_or_path": "p", "task": "motion_quality", "reward_model": None}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    page, _ = page_of(run_dir)
    assert "Monitor" not in page.texts


def test_the_monitor_is_shown_through_time(run_dir: Path) -> None:
    lines = []
    for step, verdict in ((0, "healthy"), (200, "healthy"), (400, "hacked")):
        measured = {
            "reward": 0.3 + step / 1000,
            "monitor_reward": 0.3,
            "monitor_reward_1": 0.2,
            "monitor_reward_2": 0.4,
        }
        measured |= {
            "reward_gap": step / 1000,
            "sample_drift": step / 500,
            "velocity_drift": step / 800,
            "verdict": 1.0,
        }
        measured |= {"latents_temporal_energy": 0.8, "latents_distance": 0.1}
        measured |= {"real_reward": 0.6, "reward_above_real": step / 1000, "calibration_error": 0.1}
        line: dict[str, Any] = {"step": step, **{f"validation/{name}": value for name, value in measured.items()}}
        lines.append(line | {"verdict": verdict, "verdict_reason": f"<reason {step}>"})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config |= {"monitor_reward_models": ["a/best", "b/best"], "on_hacking": "stop"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    record = json.loads((run_dir / "run.json").read_text())[0]
    del record["finished"], record["finished_step"]
    (run_dir / "run.json").write_text(json.dumps([record | {"stopped_step": 400, "stopped_because": "<reason 400>"}]))
    page, text = page_of(run_dir)
    assert [row[:2] for row in rows_of(text) if len(row) == 3 and row[2].startswith("&lt;reason")] == [
        ["0", "healthy"], ["200", "healthy"], ["400", "hacked"],
    ]  # fmt: skip
    assert [each for each in page.texts if each.endswith("stopped by its monitor after 400 steps.")]
    assert {"hacked", "verdict of the monitor"} <= set(page.texts)
    assert {image["alt"] for image in page.all("img")} == {
        "reward", "Reward in training against held-out", "Distance to the base",
        "Samples to real latents, ratios", "Samples to real latents, distances",
        "Reward in training, samples to real clips",
    }  # fmt: skip
    figures, _, note = monitor_parts(lines, config)
    assert "`on_hacking` is stop" in note
    curves = {
        line.get_label(): line.get_xydata() for line in figures["Reward in training against held-out"].axes[0].lines
    }
    assert list(curves) == [
        "reward in training", "held-out reward", "difference of the two", "reward in training, of real clips",
        "held-out 1: a/best", "held-out 2: b/best",
    ]  # fmt: skip
    np.testing.assert_allclose(curves["reward in training"], [[0, 0.3], [200, 0.5], [400, 0.7]])
    np.testing.assert_allclose(curves["held-out 2: b/best"][:, 1], 0.4)
    np.testing.assert_allclose(curves["reward in training, of real clips"][:, 1], 0.6)
    above, error = (line.get_ydata() for line in figures["Reward in training, samples to real clips"].axes[0].lines)
    np.testing.assert_allclose(above, [0, 0.2, 0.4])
    np.testing.assert_allclose(error, 0.1)


def test_cost_against_plan(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    _, text = page_of(run_dir, "--plan", str(tmp_path / "plan.json"))
    table = rows_of(text)
    assert ["hours", "2", "1"] in table
    assert ["seconds per step", "9", "4.5"] in table
    assert ["GB of GPU memory", "61.5", "not measured"] in table
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="not a plan, these keys are missing: hours, peak, seconds_per_step"):
        page_of(run_dir, "--plan", str(tmp_path / "plan.json"))


def test_before_and_after_and_what_people_say(run_dir: Path, tmp_path: Path, write_video: Callable[..., Path]) -> None:
    for side in ("base", "tuned"):
        rows = [{"id": f"{index}", "video": f"{index}.mp4", "caption": f"<i>{index}"} for index in range(2)]
        for row in rows:
            write_video(tmp_path / side / row["video"], seed=len(side))
        (tmp_path / side / "manifest.json").write_text(json.dumps(rows))
    votes = {
        side: {"count": count, "share": count / 4, "interval": [0.1, 0.9]}
        for side, count in (("left", 1), ("tie", 0), ("right", 3))
    }
    counts = {"left": 1, "tie": 0, "right": 3}
    question = {
        "votes": votes, "score": {"mean": 0.75, "interval": None}, "prompts": counts,
        "agreement": {"fleiss_kappa": 0.5}, "per_prompt": [{"id": "0", "caption": "<i>0", **counts}],
        "per_annotator": {"<ann>": counts},
    }  # fmt: skip
    result = {"left": "base", "right": "tuned", "num_prompts": 2, "num_annotators": 2, "questions": {"q": question}}
    (run_dir / "comparison.json").write_text(json.dumps(result))
    page, text = page_of(run_dir, "--before", str(tmp_path / "base"), "--after", str(tmp_path / "tuned"))
    assert len(page.all("video")) == 12 + 4
    assert ["tuned", "3", "75.0 %", "10.0 % to 90.0 %"] in rows_of(text)
    assert ["&lt;ann&gt;", "1 left, 0 tie, 3 right"] in rows_of(text)
    assert {"role": "img", "aria-label": "base 25 %, tie 0 %, tuned 75 %", "class": "bar"} in page.all("div")
    assert "<i>0" in page.texts


def test_before_and_after_have_the_same_captions(
    run_dir: Path, tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    for side in ("base", "tuned"):
        write_video(tmp_path / side / "0.mp4")
        rows = [{"id": "0", "video": "0.mp4", "caption": f"a cat, {side}"}]
        (tmp_path / side / "manifest.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="the caption of '0' is 'a cat, tuned', but 'a cat, base' in .*base"):
        main([str(run_dir), "--before", str(tmp_path / "base"), "--after", str(tmp_path / "tuned")])
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.yaml", "a: [1,\nb: }", "config.yaml: not valid YAML: .*line 2"),
        ("config.yaml", "- a\n", "config.yaml: expected options by name, got"),
        ("config.yaml", "1: a\n", "config.yaml: expected options by name, got"),
        ("config.yaml", "\xe9".encode("latin-1"), "config.yaml: not valid YAML"),
        ("config.yaml", "just text", "config.yaml: expected options by name, got"),
        ("run.json", "[3]", "run.json: record 1: expected an object, got 3"),
        ("plan.json", "{", "plan.json: not valid JSON"),
        ("plan.json", "[]", "plan.json: not a plan: expected a JSON object, got list"),
        ("comparison.json", "{", "comparison.json: not valid JSON"),
        (
            "comparison.json",
            '{"questions": {}}',
            "comparison.json: not a result of `hy-prfl compare`: there is no `left`",
        ),
        ("comparison.json", '{"questions": 3, "left": "a", "right": "b"}', "not a result of `hy-prfl compare`: 'int'"),
    ],
)
def test_broken_files_are_named(run_dir: Path, name: str, text: str | bytes, words: str) -> None:
    (run_dir / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    options = ["--plan", str(run_dir / name)] if name == "plan.json" else []
    with pytest.raises(ValueError, match=words) as error:
        main([str(run_dir), *options])
    assert "\n" not in str(error.value)
    assert not (run_dir / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: there is no metrics.jsonl"):
        main([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="`run`: there is no file or folder"):
        main([str(tmp_path / "none")])
