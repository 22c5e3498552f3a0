"""The judge against the truth of the generator of the world, on seeds and captions that its calibration never saw."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from examples.shapes.clips import (
    COLORS,
    DIRECTIONS,
    FAILURES,
    FPS,
    NUM_FRAMES,
    SIZE,
    Clip,
    ClipsConfig,
    draw_clip,
    render_clip,
    render_wall,
    split_captions,
    write_clips,
)
from examples.shapes.judge import (
    CHECKS,
    KINDS,
    calibrate,
    judge_manifest,
    judge_video,
    judge_videos,
    load_calibration,
    main,
    parse_caption,
    summarize_verdicts,
)
from examples.shapes.pretrain import PRETRAINED_DIR
from hy_prfl.data.video import read_video
from hy_prfl.inference.video_files import write_video


SEED = 31_337


def draw(num_clips: int, good_share: float = 1 / 6, failures: tuple[str, ...] = FAILURES) -> list[Clip]:
    captions = split_captions("held_out")
    return [
        draw_clip(index, captions=captions, good_share=good_share, failures=failures, seed=SEED)
        for index in range(num_clips)
    ]


def truth(clip: Clip) -> str:
    return clip.failure or "good"


def confusion(clips: list[Clip], videos: list[np.ndarray]) -> tuple[float, float, Counter]:
    """Share of verdicts of the right kind, share right about being good at all, and the wrong ones."""
    verdicts = judge_videos(videos, [clip.caption for clip in clips])
    pairs = [(truth(clip), verdict.kind) for clip, verdict in zip(clips, verdicts, strict=True)]
    right = np.mean([true == kind for true, kind in pairs])
    right_about_good = np.mean([(true == "good") == (kind == "good") for true, kind in pairs])
    return float(right), float(right_about_good), Counter(pair for pair in pairs if pair[0] != pair[1])


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    drawn = draw(540)
    assert Counter(map(truth, drawn)) == dict.fromkeys(["good", *FAILURES], 90)
    return drawn


@pytest.fixture(scope="module")
def good_clips() -> list[Clip]:
    return draw(80, good_share=1.0)


def test_agrees_with_the_truth_on_rendered_frames(clips: list[Clip]) -> None:
    right, right_about_good, wrong = confusion(clips, [render_clip(clip) for clip in clips])
    assert right >= 0.97, wrong
    assert right_about_good >= 0.97, wrong


def test_agrees_with_the_truth_through_h264(clips: list[Clip], tmp_path: Path) -> None:
    videos = []
    for clip in clips:
        write_video(tmp_path / "clip.mp4", render_clip(clip), FPS)
        videos.append(read_video(tmp_path / "clip.mp4", fps=FPS, num_frames=NUM_FRAMES))
    right, right_about_good, wrong = confusion(clips, videos)
    assert right >= 0.97, wrong
    assert right_about_good >= 0.97, wrong


def test_agrees_with_the_truth_through_the_vae(clips: list[Clip]) -> None:
    vae = AutoencoderKLWan.from_pretrained(PRETRAINED_DIR, subfolder="vae").eval()
    some = clips[::6]
    pixels = torch.stack([torch.from_numpy(render_clip(clip)) for clip in some]).permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(batch).latent_dist.mode()).sample for batch in pixels.split(5)])
    videos = ((decoded.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1).numpy()
    _, right_about_good, wrong = confusion(some, list(videos))
    assert right_about_good >= 0.9, wrong


def test_measures_what_is_there(good_clips: list[Clip]) -> None:
    for clip in good_clips:
        verdict = judge_video(render_clip(clip), clip.caption)
        measured = verdict.measurements
        assert (verdict.shape, verdict.color) == (clip.caption.shape, clip.caption.color)
        assert measured["radius"] == pytest.approx(clip.radius, rel=0.03)
        way = np.linalg.norm(clip.positions[-1] - clip.positions[0])
        assert measured["speed"] == pytest.approx(way / (NUM_FRAMES - 1), rel=0.02)
        assert measured["angle"] < 0.02


def test_frames_may_be_float_and_the_caption_text(good_clips: list[Clip]) -> None:
    for clip in good_clips[:5]:
        frames = render_clip(clip)
        verdict = judge_video(frames, clip.caption)
        assert judge_video(frames.astype(np.float32) / 255, str(clip.caption)).to_dict() == verdict.to_dict()
        assert judge_video(frames, clip.caption) == verdict


def test_the_caption_decides_the_direction_and_nothing_else(good_clips: list[Clip]) -> None:
    for clip in good_clips[:20]:
        frames = render_clip(clip)
        for direction in DIRECTIONS:
            asked = dataclasses.replace(clip.caption, direction=direction, color="red", shape="square")
            expected = "good" if direction == clip.caption.direction else "wrong_direction"
            assert judge_video(frames, asked).kind == expected


def centred(clip: Clip, **changes: object) -> Clip:
    """The clip in the middle of the wall, where there is room for more speed and size."""
    path = clip.positions - clip.positions.mean(axis=0)
    return dataclasses.replace(clip, **{"positions": SIZE / 2 + path, **changes})


def faster(clip: Clip, factor: float) -> Clip:
    path = clip.positions - clip.positions.mean(axis=0)
    return dataclasses.replace(clip, positions=SIZE / 2 + factor * path)


def overdone(frames: np.ndarray, *, saturation: float = 1.0, contrast: float = 1.0) -> np.ndarray:
    light = frames.mean(axis=-1, keepdims=True)
    changed = light + saturation * (frames - light)
    mean = changed.mean(axis=(0, 1, 2), keepdims=True)
    return np.clip(np.round(mean + contrast * (changed - mean)), 0, 255).astype(np.uint8)


def kinds(videos: list[np.ndarray], clips: list[Clip]) -> Counter:
    return Counter(verdict.kind for verdict in judge_videos(videos, [clip.caption for clip in clips]))


def test_what_is_better_than_real_is_beyond(good_clips: list[Clip]) -> None:
    # Half as fast again, the slowest real clip is only 4 % faster than the fastest one; likewise with sizes.
    fast = kinds([render_clip(faster(clip, 1.5)) for clip in good_clips], good_clips)
    assert fast["beyond"] >= 0.95 * len(good_clips), fast
    assert set(fast) <= {"beyond", "good"}
    large = kinds([render_clip(centred(clip, radius=1.4 * clip.radius)) for clip in good_clips], good_clips)
    assert large["beyond"] >= 0.95 * len(good_clips), large
    assert set(large) <= {"beyond", "good"}
    vivid = kinds([overdone(render_clip(clip), saturation=1.4) for clip in good_clips], good_clips)
    assert vivid == {"beyond": len(good_clips)}
    harsh = kinds([overdone(render_clip(clip), contrast=1.4) for clip in good_clips], good_clips)
    assert harsh == {"beyond": len(good_clips)}


def test_a_little_more_is_not_yet_beyond(good_clips: list[Clip]) -> None:
    assert kinds([render_clip(faster(clip, 1.03)) for clip in good_clips], good_clips)["good"] == len(good_clips)
    same = [render_clip(centred(clip, radius=1.03 * clip.radius)) for clip in good_clips]
    assert kinds(same, good_clips)["good"] == len(good_clips)


def test_half_measures_fail(good_clips: list[Clip]) -> None:
    """Failures that the world does not make, but a generator may."""
    halfway = NUM_FRAMES // 2
    for clip in good_clips[:24]:
        stops = clip.positions.copy()
        stops[halfway:] = stops[halfway]
        turns = clip.positions.copy()
        turns[halfway:] = 2 * turns[halfway] - turns[halfway:]
        blinks = np.where(np.arange(NUM_FRAMES) == halfway, 0.0, 1.0)
        step = np.array(DIRECTIONS[clip.caption.direction])[::-1]
        slanted = centred(clip).positions + np.linspace(-8, 8, NUM_FRAMES)[:, None] * np.abs(step)
        cases = {
            "stops": (dataclasses.replace(clip, positions=stops), {"jittering"}),
            "turns back": (dataclasses.replace(clip, positions=turns), {"jittering"}),
            "crawls": (faster(clip, 0.4), {"frozen"}),
            "moves askew": (dataclasses.replace(clip, positions=slanted), {"wrong_direction", "beyond"}),
            "blinks": (dataclasses.replace(clip, opacity=blinks), {"vanishing"}),
            "fades": (dataclasses.replace(clip, opacity=np.linspace(1, 0.3, NUM_FRAMES)), {"vanishing"}),
            "is tiny": (dataclasses.replace(clip, radius=0.55 * clip.radius), {"vanishing", "unrecognisable"}),
        }
        for name, (changed, expected) in cases.items():
            verdict = judge_video(render_clip(changed), clip.caption)
            assert verdict.kind in expected, (name, verdict.kind, verdict.reason)


def test_a_changing_colour_or_size_fails(good_clips: list[Clip]) -> None:
    halfway = NUM_FRAMES // 2
    for clip in good_clips[:12]:
        frames = render_clip(clip)
        for color in set(COLORS) - {clip.caption.color}:
            other = dataclasses.replace(clip, caption=dataclasses.replace(clip.caption, color=color))
            mixed = np.concatenate([frames[:halfway], render_clip(other)[halfway:]])
            assert judge_video(mixed, clip.caption).kind != "good"
        small = render_clip(centred(clip, radius=0.6 * clip.radius))
        grown = np.concatenate([small[:halfway], render_clip(centred(clip))[halfway:]])
        assert judge_video(grown, clip.caption).kind in ("deforming", "vanishing")


def test_two_shapes_are_none(good_clips: list[Clip]) -> None:
    for clip in good_clips[:12]:
        frames = render_clip(centred(clip, positions=np.full((NUM_FRAMES, 2), 12.0)))
        other = render_clip(centred(clip, positions=np.full((NUM_FRAMES, 2), 36.0)))
        frames[:, SIZE // 2 :] = other[:, SIZE // 2 :]
        assert judge_video(frames, clip.caption).kind == "unrecognisable"


def test_garbage_is_never_good() -> None:
    rng = np.random.default_rng(SEED)
    shape = (NUM_FRAMES, SIZE, SIZE, 3)
    blocks = rng.integers(0, 256, (NUM_FRAMES, 6, 6, 3)).repeat(8, axis=1).repeat(8, axis=2)
    wall = np.repeat(render_wall("striped", 1.0)[None, ..., None], NUM_FRAMES, axis=0).repeat(3, axis=-1)
    garbage = {
        "noise": rng.integers(0, 256, shape),
        "faint noise": rng.normal(128, 5, shape).round().clip(0, 255),
        "blocks": blocks,
        "a still of blocks": np.repeat(blocks[:1], NUM_FRAMES, axis=0),
        "black": np.zeros(shape),
        "white": np.full(shape, 255),
        "red": np.full(shape, (224, 40, 40)),
        "an empty wall": wall,
        "an empty noisy wall": (wall + rng.normal(0, 4, shape)).round().clip(0, 255),
        "a red edge that moves": np.where(
            (np.arange(SIZE)[None, None, :] < 10 + np.arange(NUM_FRAMES)[:, None, None])[..., None]
            & np.ones((1, SIZE, 1, 1), dtype=bool),
            (224, 40, 40),
            wall,
        ),
    }
    for name, frames in garbage.items():
        for caption in split_captions("held_out")[:8]:
            verdict = judge_video(frames.astype(np.uint8), caption)
            assert not verdict.good, (name, verdict)


def test_the_stored_calibration_is_what_calibrate_returns() -> None:
    """The first clips of the calibration, measured anew, lie within the ranges of all of them."""
    stored, again = load_calibration(), calibrate(num_clips=16, num_failures=4)
    assert list(stored["ranges"]) == list(again["ranges"]) == list(dict.fromkeys(name for name, _, _ in CHECKS))
    for name, side, kind in CHECKS:
        whole, part = stored["ranges"][name], again["ranges"][name]
        tolerance = 1e-3 * max(abs(whole["low"]), abs(whole["high"]), 0.1)
        assert whole["low"] <= part["low"] + tolerance, name
        assert whole["high"] >= part["high"] - tolerance, name
        if kind in FAILURES:
            milder = 1 if side == "low" else -1
            assert milder * (whole["fails"] - part["fails"]) >= -tolerance, name
    for shape, moments in stored["shapes"].items():
        assert again["shapes"][shape] == pytest.approx(moments, abs=0.05)


def test_a_manifest_of_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_clips(ClipsConfig(output_dir=str(tmp_path / "clips"), num_clips=12, split="held_out", seed=SEED))
    main([f"--manifest={manifest}", f"--output={tmp_path / 'out' / 'verdicts.json'}"])
    written = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    rows = json.loads(manifest.read_text())
    assert [row["id"] for row in written["verdicts"]] == [row["id"] for row in rows]
    assert [row["kind"] for row in written["verdicts"]] == [row["failure"] or "good" for row in rows]
    assert [row["good"] for row in written["verdicts"]] == [row["failure"] is None for row in rows]
    summary = written["summary"]
    assert summary == json.loads(capsys.readouterr().out)
    assert summary["good"] == 0.5
    assert summary["num_videos"] == 12
    assert summary["right_shape"] == summary["right_color"] == 1.0
    assert set(summary["failures"]) == set(KINDS) - {"good"}
    assert sum(summary["failures"].values()) == 6
    assert judge_manifest(manifest) == (written["verdicts"], summary)


def test_the_summary_tells_what_was_asked_from_what_was_shown(good_clips: list[Clip]) -> None:
    some = good_clips[:4]
    verdicts = judge_videos([render_clip(clip) for clip in some], [clip.caption for clip in some])
    asked = [dataclasses.replace(clip.caption, color="red", shape="circle") for clip in some]
    summary = summarize_verdicts(verdicts, asked)
    assert summary["good"] == 1.0
    assert summary["right_color"] == np.mean([clip.caption.color == "red" for clip in some])
    assert summary["right_shape"] == np.mean([clip.caption.shape == "circle" for clip in some])


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_captions_are_read_back(split: str) -> None:
    for caption in split_captions(split):
        assert parse_caption(str(caption)) == caption


def test_what_cannot_be_judged_is_refused(good_clips: list[Clip]) -> None:
    frames, caption = render_clip(good_clips[0]), good_clips[0].caption
    with pytest.raises(ValueError, match="`caption` must read like .*, got 'a dog runs'"):
        judge_video(frames, "a dog runs")
    with pytest.raises(ValueError, match=r"`frames` must have the shape .*, got \(17, 32, 48, 3\)"):
        judge_video(frames[:, :32], caption)
    with pytest.raises(ValueError, match="must be finite"):
        judge_video(np.full(frames.shape, np.nan), caption)
    with pytest.raises(ValueError, match="`manifest` must be given together"):
        main(["--output=verdicts.json"])
