"""
Judges clips of moving shapes from their decoded pixels alone; it never sees a reward model.

    python -m examples.shapes.judge --manifest outputs/videos/manifest.json --output outputs/verdicts.json

The shape of a clip is tracked and measured (`tracking.py`), and held against what good clips of the world show: a clip
that is far outside of their ranges fails, and so does one that is *better* than they ever are (faster, larger, more
saturated), as over-optimised videos are. The ranges are measured by `calibrate` and stored in `judge_calibration.json`:

    python -m examples.shapes.judge --calibrate
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from examples.shapes.clips import (
    COLORS,
    DIRECTIONS,
    FAILURES,
    FPS,
    NUM_FRAMES,
    SHAPES,
    WALLS,
    Caption,
    Clip,
    draw_clip,
    render_clip,
    split_captions,
)
from examples.shapes.tracking import (
    WINDOW,
    area_of_unit,
    measure_video,
    recognise,
    smallest_angle,
)
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.manifest import read_manifest
from hy_prfl.data.video import read_video
from hy_prfl.inference.generation import write_video


CALIBRATION = Path(__file__).with_name("judge_calibration.json")

KINDS = ("good", *FAILURES, "beyond", "unrecognisable")

# A value fails that is further from the good clips of the calibration than this share of the way from the outermost of
# them to the mildest clip that fails so. Generated videos are softer than the calibration's clips: leave them some room.
# All of a small generator's motion trembles more or less; half of the way leaves room for that, and still less than a
# clip needs that stops halfway (1.1 pixels off a steady path).
FAILURE_SHARE = 1 / 3
FAILURE_SHARES = {"unsteadiness": 1 / 2}

# Being beyond the real is a matter of degree, so there is no mildest failure: this much past the outermost good clip.
# Soft edges make a small shape look larger, so its size gets more.
BEYOND_SHARE = {"speed": 0.05, "radius": 0.08, "saturation": 0.05, "wall_light": 0.05, "wall_contrast": 0.05}

# What is checked, in this order: measurement, side, kind of the failure. The first one decides, so what makes later
# measurements meaningless comes first; last comes what is too much in a clip that is good otherwise.
CHECKS = (
    ("saturation", "low", "unrecognisable"),
    ("hue_error", "high", "unrecognisable"),
    ("clutter", "high", "unrecognisable"),
    ("spread", "high", "unrecognisable"),
    ("aspect_change", "high", "deforming"),
    ("presence", "low", "vanishing"),
    ("radius", "low", "vanishing"),
    ("area_change", "high", "deforming"),
    ("hue_change", "high", "deforming"),
    ("unsteadiness", "high", "jittering"),
    ("speed", "low", "frozen"),
    ("angle", "high", "wrong_direction"),
    ("speed", "high", "beyond"),
    ("radius", "high", "beyond"),
    ("saturation", "high", "beyond"),
    ("wall_light", "low", "beyond"),
    ("wall_light", "high", "beyond"),
    ("wall_contrast", "high", "beyond"),
)
PATTERN = re.compile(
    rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) moves ({'|'.join(DIRECTIONS)}) over an? ({'|'.join(WALLS)}) wall"
)


@dataclass(frozen=True)
class Verdict:
    """
    What the judge says about one clip.

    `kind` is "good" or how the clip fails, `reason` the measurement that decided, its value and the bound. `shape` and
    `color` are what is seen, whatever the caption says; a clip of another colour can be good, as in the labels of
    `physics_quality` and `human_quality`. All measurements are there, lengths in pixels, times in frames.
    """

    kind: str
    reason: str | None
    shape: str | None
    color: str | None
    measurements: dict[str, float]

    @property
    def good(self) -> bool:
        return self.kind == "good"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: measurements are rounded, those that do not exist are null."""
        rounded = {name: round(value, 4) if np.isfinite(value) else None for name, value in self.measurements.items()}
        return {**vars(self), "good": self.good, "measurements": rounded}


def parse_caption(text: str) -> Caption:
    """The caption whose text this is; a `ValueError` if it is none of this world's."""
    match = PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"`caption` must read like '{Caption('circle', 'red', 'up', 'plain')}', got {text!r}.")
    color, shape, direction, wall = match.groups()
    return Caption(shape, color, direction, wall)


def judge_video(frames: np.ndarray, caption: Caption | str) -> Verdict:
    """
    Judge one clip.

    Args:
        frames (`np.ndarray` of shape `(num_frames, SIZE, SIZE, 3)`):
            RGB, uint8 or float in [0, 1]; at least 5 frames.
        caption (`Caption` or `str`):
            What the clip is meant to show; only its direction is held against the clip.

    Raises:
        ValueError: If the frames have another shape, or the caption is none of this world's.
    """
    caption = parse_caption(caption) if isinstance(caption, str) else caption
    calibration = load_calibration()
    measured = measure_video(frames, caption)
    shape, color = recognise(measured, calibration["shapes"])
    if shape is not None:
        measured["radius"] = float(np.sqrt(measured["area"] / area_of_unit(shape)))
    for name, side, kind in CHECKS:
        bound = bound_of(name, calibration["ranges"][name], side, kind)
        value = measured.get(name, np.nan)
        # Written so that a measurement that does not exist fails.
        passed = value >= bound if side == "low" else value <= bound
        if not passed:
            return Verdict(kind, f"{name} {value:.3g}, {side} bound {bound:.3g}", shape, color, measured)
    return Verdict("good", None, shape, color, measured)


def judge_videos(videos: Iterable[np.ndarray], captions: Iterable[Caption | str]) -> list[Verdict]:
    """Judge clips one by one; as many captions as videos."""
    return [judge_video(frames, caption) for frames, caption in zip(videos, captions, strict=True)]


def summarize_verdicts(verdicts: Sequence[Verdict], captions: Sequence[Caption | str]) -> dict[str, Any]:
    """Share of good clips, count of each failure, and the share that shows the caption's shape and colour."""
    counts = Counter(verdict.kind for verdict in verdicts)
    asked = [parse_caption(caption) if isinstance(caption, str) else caption for caption in captions]
    pairs = list(zip(verdicts, asked, strict=True))
    return {
        "good": counts["good"] / len(verdicts),
        "failures": {kind: counts[kind] for kind in KINDS[1:]},
        "right_shape": sum(verdict.shape == caption.shape for verdict, caption in pairs) / len(pairs),
        "right_color": sum(verdict.color == caption.color for verdict, caption in pairs) / len(pairs),
        "num_videos": len(verdicts),
    }


def bound_of(name: str, values: Mapping[str, float], side: str, kind: str) -> float:
    """The outermost value of a measurement, on the side "low" or "high", that is no failure of this kind."""
    outermost = values[side]
    if kind == "beyond":
        return outermost * (1 + BEYOND_SHARE[name] if side == "high" else 1 - BEYOND_SHARE[name])
    return outermost + FAILURE_SHARES.get(name, FAILURE_SHARE) * (values["fails"] - outermost)


# What the mildest failure is where the world makes no such clips: no colour, half the way to another colour, all of it
# elsewhere, spread over the whole window, half the smallest radius, the area of two, another colour.
FAILS = {
    "saturation": 0.0,
    "hue_error": smallest_angle() / 2,
    "clutter": 1.0,
    "spread": WINDOW**2 / (2 * np.pi),
    "radius": 3.5,
    "area_change": 1.0,
    "hue_change": smallest_angle(),
}


def calibrate(num_clips: int = 240, num_failures: int = 48, seed: int = 900_000) -> dict[str, Any]:
    """
    Measure clips of the world, as they are rendered and as codecs leave them (see `views`).

    Returns:
        `dict` with `ranges`: for each measurement the lowest and the highest value of good clips, and what the mildest
        clip `fails` with; and `shapes`: for each shape the median skewness and cross moment, by which it is recognised.
    """
    good = measure_clips(num_clips, good_share=1.0, failures=FAILURES, seed=seed)
    fails = dict(FAILS)
    ranges = {}
    for name, side, kind in CHECKS:
        if kind in FAILURES and name not in FAILS:
            bad = measure_clips(num_failures, good_share=0.0, failures=[kind], seed=seed + 1)
            mildest = max if side == "low" else min
            fails[name] = mildest(values[name] for values in bad)
        measured = [values[name] for values in good]
        ranges[name] = {"low": round(min(measured), 4), "high": round(max(measured), 4)}
        if name in fails:
            ranges[name]["fails"] = round(fails[name], 4)
    typical = {
        shape: {
            name: round(float(np.median([values[name] for values in good if values["shape"] == shape])), 4)
            for name in ("skew", "cross")
        }
        for shape in SHAPES
    }
    return {"num_clips": num_clips, "num_failures": num_failures, "seed": seed, "ranges": ranges, "shapes": typical}


def measure_clips(num_clips: int, *, good_share: float, failures: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Measurements of clips of the world in all `views`, with the radius of the shape that is really there."""
    captions = split_captions("train")
    measured: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for index in range(num_clips):
            clip = draw_clip(index, captions=captions, good_share=good_share, failures=failures, seed=seed)
            for frames in views(clip, Path(folder)):
                values = measure_video(frames, clip.caption)
                radius = float(np.sqrt(values["area"] / area_of_unit(clip.caption.shape)))
                measured.append({**values, "radius": radius, "shape": clip.caption.shape})
    return measured


def views(clip: Clip, folder: Path) -> list[np.ndarray]:
    """A clip as it is rendered, through H.264, and softened as a small VAE leaves it; frames are uint8."""
    frames = render_clip(clip)
    write_video(folder / "clip.mp4", frames, FPS)
    return [frames, read_video(folder / "clip.mp4", fps=FPS, num_frames=NUM_FRAMES), soften(frames)]


def soften(frames: np.ndarray) -> np.ndarray:
    """Blur by a pixel and by part of a frame, and take a tenth off the colours, as a small VAE does."""
    pixels = frames.astype(float)
    for axis in (0, 1, 1, 2, 2):  # two passes of 1 2 1 have a deviation of one pixel
        edges = [(1, 1) if dimension == axis else (0, 0) for dimension in range(4)]
        padded = np.moveaxis(np.pad(pixels, edges, mode="edge"), axis, 0)
        pixels = np.moveaxis((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4, 0, axis)
    light = pixels.mean(axis=-1, keepdims=True)
    return np.round(light + 0.9 * (pixels - light)).astype(np.uint8)


@cache
def load_calibration() -> dict[str, Any]:
    """What `calibrate` returned when it was last stored."""
    return json.loads(CALIBRATION.read_text(encoding="utf-8"))


def judge_manifest(path: Path | str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """
    Judge the mp4 files of a manifest of `examples.shapes.clips` or of `generate`.

    Returns:
        A row for each clip, `{"id", "caption", "kind", "good", ...}`, and what `summarize_verdicts` says.

    Raises:
        ValueError: If the manifest is broken, a video cannot be read, or a caption is none of this world's.
    """
    rows = read_manifest(path)
    videos = (read_video(row.video, fps=FPS, num_frames=NUM_FRAMES) for row in rows if row.video is not None)
    captions = [row.prompt for row in rows]
    verdicts = judge_videos(videos, captions)
    records = [
        {"id": row.id, "caption": row.prompt, **verdict.to_dict()} for row, verdict in zip(rows, verdicts, strict=True)
    ]
    return records, summarize_verdicts(verdicts, captions)


@dataclass(kw_only=True)
class JudgeConfig:
    """What to judge."""

    manifest: str | None = field(default=None, metadata={"help": "manifest.json of `generate` or of the clips."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the verdicts and their summary."})
    calibrate: bool = field(default=False, metadata={"help": "Measure good clips anew and store their ranges."})

    def __post_init__(self) -> None:
        given = (self.manifest is not None, self.output is not None)
        check(all(given) or (self.calibrate and not any(given)), "manifest", self.manifest,
              "given together with `output`, or both left out with `calibrate`")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(JudgeConfig, argv, description=__doc__)
    if config.calibrate:
        write_json(CALIBRATION, calibrate())
        print(f"{CALIBRATION}: the ranges of good clips")
    if config.manifest is not None and config.output is not None:
        records, summary = judge_manifest(config.manifest)
        write_json(Path(config.output), {"summary": summary, "verdicts": records})
        print(json.dumps(summary, indent=1))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
