"""The labels of the clips against their pixels: shapes are tracked by colour in the decoded mp4 files."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from examples.shapes.clips import (
    BODY_FAILURES,
    FAILURES,
    MOTION_FAILURES,
    NUM_FRAMES,
    SIZE,
    ClipsConfig,
    split_captions,
    write_clips,
)


WORDS_TO_STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def shape_masks(frames: np.ndarray) -> np.ndarray:
    """Pixels with a colour; the walls have none."""
    return frames.max(axis=-1) - frames.min(axis=-1) > 70


def centres(masks: np.ndarray) -> np.ndarray:
    return np.array([np.argwhere(mask)[:, ::-1].mean(axis=0) for mask in masks])


def aspect_ratios(masks: np.ndarray) -> np.ndarray:
    extents = np.array([np.ptp(np.argwhere(mask), axis=0) + 1 for mask in masks])
    return extents[:, 1] / extents[:, 0]


def caption_step(caption: str) -> np.ndarray:
    (word,) = [word for word in caption.split() if word in WORDS_TO_STEP]
    return np.array(WORDS_TO_STEP[word])


def moves_as_captioned(masks: np.ndarray, caption: str) -> bool:
    """Steady and in the right direction: the whole way is long, straight, and evenly spread over the frames."""
    track = centres(masks)
    step = caption_step(caption)
    # The colour of a pixel is stored for two by two, so that a tracked edge advances by two pixels at a time.
    along = np.diff(track[::4], axis=0) @ step / 4
    across = track @ np.array([step[1], step[0]])
    return bool(along.min() > 0.6 and np.ptp(along) < 0.6 and np.ptp(across) < 1.5)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, np.ndarray]]:
    folder = tmp_path_factory.mktemp("clips")
    manifest = write_clips(ClipsConfig(output_dir=str(folder), num_clips=100, good_share=0.3))
    rows = json.loads(manifest.read_text())
    return [(row, decode(folder / row["video"])) for row in rows]


def of_failure(clips: list[tuple[dict, np.ndarray]], failure: str | None) -> list[tuple[dict, np.ndarray]]:
    found = [(row, shape_masks(frames)) for row, frames in clips if row["failure"] == failure]
    assert len(found) == (30 if failure is None else 14)
    return found


def test_clips_have_the_size_that_wan_needs(clips: list[tuple[dict, np.ndarray]]) -> None:
    assert NUM_FRAMES % 4 == 1
    assert SIZE % 16 == 0
    assert {frames.shape for _, frames in clips} == {(NUM_FRAMES, SIZE, SIZE, 3)}


def test_good_clips_move_steadily_as_captioned(clips: list[tuple[dict, np.ndarray]]) -> None:
    for row, masks in of_failure(clips, None):
        assert moves_as_captioned(masks, row["caption"]), row
        areas = masks.sum(axis=(1, 2))
        assert areas.min() > 0.75 * areas.max(), row
        ratios = aspect_ratios(masks)
        assert ratios.max() / ratios.min() < 1.5, row
        assert row["physics_quality"] == row["human_quality"] == row["text_alignment"] == 1


def test_frozen_clips_do_not_move(clips: list[tuple[dict, np.ndarray]]) -> None:
    for row, masks in of_failure(clips, "frozen"):
        assert not moves_as_captioned(masks, row["caption"]), row
        assert np.ptp(centres(masks), axis=0).max() < 0.5, row


def test_jittering_clips_go_nowhere(clips: list[tuple[dict, np.ndarray]]) -> None:
    for row, masks in of_failure(clips, "jittering"):
        assert not moves_as_captioned(masks, row["caption"]), row
        steps = np.diff(centres(masks), axis=0)
        travelled = np.linalg.norm(steps, axis=1).sum()
        assert travelled > 2 * np.linalg.norm(steps.sum(axis=0)), row
        assert travelled > 15, row


def test_wrong_direction_clips_go_elsewhere(clips: list[tuple[dict, np.ndarray]]) -> None:
    for row, masks in of_failure(clips, "wrong_direction"):
        assert not moves_as_captioned(masks, row["caption"]), row
        track = centres(masks)
        way = track[-1] - track[0]
        assert np.abs(way).max() > 10, row
        assert way @ caption_step(row["caption"]) < 2.5, row


def test_deforming_clips_change_their_shape(clips: list[tuple[dict, np.ndarray]]) -> None:
    for row, masks in of_failure(clips, "deforming"):
        ratios = aspect_ratios(masks)
        assert ratios.max() / ratios.min() > 2, row


def test_vanishing_clips_lose_their_shape(clips: list[tuple[dict, np.ndarray]]) -> None:
    for row, masks in of_failure(clips, "vanishing"):
        assert masks[0].sum() > 60, row
        assert masks[-1].sum() == 0, row


def test_labels_follow_from_the_failure(clips: list[tuple[dict, np.ndarray]]) -> None:
    for row, _ in clips:
        assert row["physics_quality"] == (row["failure"] not in MOTION_FAILURES)
        assert row["human_quality"] == (row["failure"] not in BODY_FAILURES)
        assert row["text_alignment"] == (None if row["failure"] in BODY_FAILURES else row["failure"] is None)
        assert row["blur_quality"] is None


def test_the_colour_is_the_captions(clips: list[tuple[dict, np.ndarray]]) -> None:
    is_on = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
    for row, frames in clips:
        red, green, blue = frames[0][shape_masks(frames[:1])[0]].mean(axis=0) > 130
        assert (red, green, blue) == is_on[row["caption"].split()[1]], row


def test_same_seed_same_files(tmp_path: Path) -> None:
    options = {"good_share": 0.5, "seed": 7}
    short = write_clips(ClipsConfig(output_dir=str(tmp_path / "short"), num_clips=4, **options))
    long = write_clips(ClipsConfig(output_dir=str(tmp_path / "long"), num_clips=6, **options))
    assert json.loads(short.read_text()) == json.loads(long.read_text())[:4]
    for path in (tmp_path / "short" / "videos").iterdir():
        assert path.read_bytes() == (tmp_path / "long" / "videos" / path.name).read_bytes()
    other = write_clips(ClipsConfig(output_dir=str(tmp_path / "other"), num_clips=4, seed=8))
    captions = [[row["caption"] for row in json.loads(path.read_text())] for path in (short, other)]
    assert captions[0] != captions[1]


def test_held_out_captions_are_apart() -> None:
    train, held_out = split_captions("train"), split_captions("held_out")
    assert len(train) == 168
    assert len(held_out) == 24
    assert not set(train) & set(held_out)
    for name in ("shape", "color", "direction", "wall"):
        assert {getattr(caption, name) for caption in train} == {
            getattr(caption, name) for caption in train + held_out
        }


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_clips", 0), ("good_share", 1.5), ("failures", ["melting"]), ("num_held_out_captions", 192)],
)
def test_impossible_options_are_refused(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        ClipsConfig(output_dir=str(tmp_path), **{field: value})


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_can_be_chosen(tmp_path: Path, failure: str) -> None:
    config = ClipsConfig(output_dir=str(tmp_path), num_clips=2, good_share=0, failures=[failure])
    assert [row["failure"] for row in json.loads(write_clips(config).read_text())] == [failure, failure]
