"""
Judges clips of moving shapes only from their decoded pixels, independently of any reward model.

    python -m examples.shapes.judge --manifest outputs/videos/manifest.json --output outputs/verdicts.json

The shape of a clip is tracked and measured (`tracking.py`), and compared with the ranges of good clips. A clip far outside
of these ranges fails. A clip also fails if it exceeds all good clips (faster, larger, more saturated), as over-optimised
videos do. `calibrate` measures the ranges and stores them in `judge_calibration.json`:

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
from hy_prfl.inference.video_files import write_video


CALIBRATION = Path(__file__).with_name("judge_calibration.json")

KINDS = ("good", *FAILURES, "beyond", "unrecognisable")

# Position of the bound of a measurement between the outermost good clip (0) and the mildest clip with that failure (1).
# Generated videos are softer than the calibration's clips, so the bound is not at 0. The motion of a small generator always
# trembles a little, so the bound of `unsteadiness` is higher. It is still lower than the value of a clip that stops halfway
# (1.1 pixels off a steady path).
FAILURE_SHARE = 1 / 3
FAILURE_SHARES = {"unsteadiness": 1 / 2}

# Bound of the failure `beyond`, relative to the outermost good clip: there is no mildest clip with this failure. Soft
# edges make a small shape look larger, so `radius` has a larger value.
BEYOND_SHARE = {"speed": 0.05, "radius": 0.08, "saturation": 0.05, "wall_light": 0.05, "wall_contrast": 0.05}

# The checks in their order: measurement, side, kind of failure. The first check that fails decides. Failures that make
# other measurements meaningless come first. `beyond` comes last, for clips that are good otherwise.
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
    The judge's result for one clip.

    `kind` is "good" or the kind of failure. `reason` names the measurement that decided, its value and the bound. `shape`
    and `color` are recognised in the video. They need not be those of the caption: as in `physics_quality` and
    `human_quality`, a clip with another colour can be good. `measurements` has lengths in pixels and times in frames.
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
        """Values for JSON: measurements are rounded, and null if they do not exist."""
        rounded = {name: round(value, 4) if np.isfinite(value) else None for name, value in self.measurements.items()}
        return {**vars(self), "good": self.good, "measurements": rounded}


def parse_caption(text: str) -> Caption:
    """Parse the text of a caption. Raises a `ValueError` if it is not one of this dataset's captions."""
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
            What the clip should show. Only its direction is compared with the clip.

    Raises:
        ValueError: If the frames have another shape, or the caption is not one of this dataset's.
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
        # A missing measurement is NaN, for which both comparisons are false, so it fails.
        passed = value >= bound if side == "low" else value <= bound
        if not passed:
            return Verdict(kind, f"{name} {value:.3g}, {side} bound {bound:.3g}", shape, color, measured)
    return Verdict("good", None, shape, color, measured)


def judge_videos(videos: Iterable[np.ndarray], captions: Iterable[Caption | str]) -> list[Verdict]:
    """Judge clips, each with its caption."""
    return [judge_video(frames, caption) for frames, caption in zip(videos, captions, strict=True)]


def summarize_verdicts(verdicts: Sequence[Verdict], captions: Sequence[Caption | str]) -> dict[str, Any]:
    """Share of good clips, count of each failure, and the share that shows the caption's shape and colour."""
    counts = Counter(verdict.kind for verdict in verdicts)
    parsed = [parse_caption(caption) if isinstance(caption, str) else caption for caption in captions]
    pairs = list(zip(verdicts, parsed, strict=True))
    return {
        "good": counts["good"] / len(verdicts),
        "failures": {kind: counts[kind] for kind in KINDS[1:]},
        "right_shape": sum(verdict.shape == caption.shape for verdict, caption in pairs) / len(pairs),
        "right_color": sum(verdict.color == caption.color for verdict, caption in pairs) / len(pairs),
        "num_videos": len(verdicts),
    }


def bound_of(name: str, values: Mapping[str, float], side: str, kind: str) -> float:
    """The last value of a measurement, on the side "low" or "high", that still passes the check for this failure."""
    outermost = values[side]
    if kind == "beyond":
        return outermost * (1 + BEYOND_SHARE[name] if side == "high" else 1 - BEYOND_SHARE[name])
    return outermost + FAILURE_SHARES.get(name, FAILURE_SHARE) * (values["fails"] - outermost)


# Values of the mildest failure, for failures that no rendered clip has.
FAILS = {
    "saturation": 0.0,  # no colour
    "hue_error": smallest_angle() / 2,  # halfway to another colour
    "clutter": 1.0,  # all of the colour is elsewhere
    "spread": WINDOW**2 / (2 * np.pi),  # spread over the whole window
    "radius": 3.5,  # half of the smallest radius
    "area_change": 1.0,  # twice the area
    "hue_change": smallest_angle(),  # another colour
}


def calibrate(num_clips: int = 240, num_failures: int = 48, seed: int = 900_000) -> dict[str, Any]:
    """
    Measure rendered clips in all `views`, such as after video compression.

    Returns:
        `dict` with `ranges` and `shapes`. `ranges` has for each measurement the lowest and the highest value of good
        clips, and in `fails` the value of the mildest failure. `shapes` has for each shape the median skewness and cross
        moment, by which it is recognised.
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
    """Measurements of rendered clips in all `views`. The radius is that of the shape in the caption."""
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
    """Frames (uint8) of a clip as rendered, after H.264 compression, and softened like the output of a small VAE."""
    frames = render_clip(clip)
    write_video(folder / "clip.mp4", frames, FPS)
    return [frames, read_video(folder / "clip.mp4", fps=FPS, num_frames=NUM_FRAMES), soften(frames)]


def soften(frames: np.ndarray) -> np.ndarray:
    """Blur in space and time and reduce the saturation by a tenth, like a small VAE."""
    pixels = frames.astype(float)
    for axis in (0, 1, 1, 2, 2):  # two passes of the kernel (1, 2, 1) have a standard deviation of one pixel
        edges = [(1, 1) if dimension == axis else (0, 0) for dimension in range(4)]
        padded = np.moveaxis(np.pad(pixels, edges, mode="edge"), axis, 0)
        pixels = np.moveaxis((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4, 0, axis)
    light = pixels.mean(axis=-1, keepdims=True)
    return np.round(light + 0.9 * (pixels - light)).astype(np.uint8)


@cache
def load_calibration() -> dict[str, Any]:
    """The stored result of `calibrate`."""
    return json.loads(CALIBRATION.read_text(encoding="utf-8"))


def judge_manifest(path: Path | str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """
    Judge the mp4 files of a manifest of `examples.shapes.clips` or of `generate`.

    Returns:
        A row for each clip, `{"id", "caption", "kind", "good", ...}`, and the result of `summarize_verdicts`.

    Raises:
        ValueError: If the manifest is broken, a video cannot be read, or a caption is not one of this dataset's.
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
    """Options of `judge`."""

    manifest: str | None = field(default=None, metadata={"help": "manifest.json of `generate` or of the clips."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the verdicts and their summary."})
    calibrate: bool = field(default=False, metadata={"help": "Measure the ranges of good clips and store them."})

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
