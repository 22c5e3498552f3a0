"""The judge's verdicts as labels: what a reward model is trained on."""

import json
from pathlib import Path

import pytest

from examples.shapes.annotate import AnnotateConfig, annotate, labels_of
from examples.shapes.clips import FAILURES, FPS, draw_clip, render_clip, split_captions
from examples.shapes.judge import KINDS
from hy_prfl.inference.video_files import write_video


def test_only_good_clips_are_good_in_motion_and_body() -> None:
    for kind in KINDS:
        labels = labels_of(kind)
        assert (labels["physics_quality"] * labels["human_quality"] == 1) == (kind == "good"), kind


def test_labels_are_the_truth_of_the_world(tmp_path: Path) -> None:
    clips = [
        draw_clip(index, captions=split_captions("train"), good_share=0.5, failures=FAILURES, seed=77)
        for index in range(20)
    ]
    rows = []
    for index, clip in enumerate(clips):
        write_video(tmp_path / "videos" / f"{index}.mp4", render_clip(clip), FPS)
        rows.append({"id": str(index), "video": f"{index}.mp4", "caption": str(clip.caption)})
    (tmp_path / "videos" / "manifest.json").write_text(json.dumps(rows))
    splits = annotate(tmp_path / "videos" / "manifest.json", tmp_path / "labels", validation_share=0.25)
    assert [len(splits[name]) for name in ("train", "validation")] == [15, 5]
    for name, part in splits.items():
        assert json.loads((tmp_path / "labels" / f"{name}.json").read_text()) == part
        for row in part:
            truth = clips[int(row["id"])].labels
            assert (row["physics_quality"], row["human_quality"]) == (truth["physics_quality"], truth["human_quality"])
            assert (tmp_path / "labels" / row["video"]).resolve().is_file()


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="`validation_share` must be"):
        AnnotateConfig(manifest="a", output_dir="b", validation_share=1.0)
