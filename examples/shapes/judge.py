"""
Judges clips of moving shapes from their decoded pixels alone; it never sees a reward model.

    python -m examples.shapes.judge --manifest outputs/videos/manifest.json --output outputs/verdicts.json

Only the shapes of this world have a colour, so a clip's shape is where the colour is. It is tracked, measured, and held
against what good clips of the generator of the world show: a clip that leaves their range on the bad side fails, and so
does one that is *better* than they ever are (faster, larger, more saturated), as over-optimised videos are. The ranges
are measured on good clips by `calibrate` and stored in `judge_calibration.json`:

    python -m examples.shapes.judge --calibrate
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
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
    SIZE,
    WALLS,
    Caption,
    Clip,
    draw_clip,
    render_clip,
    shape_distance,
    split_captions,
)
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.manifest import read_manifest
from hy_prfl.data.video import read_video
from hy_prfl.generation import write_video


CALIBRATION = Path(__file__).with_name("judge_calibration.json")

KINDS = ("good", *FAILURES, "beyond", "unrecognisable")

# A value fails that lies further from the good clips of the calibration than this share of the way from the outermost
# of them to the mildest clip that fails so. Real videos are softer than the calibration's, so not at the first step.
FAILURE_SHARE = 1 / 3

# What is beyond the real is a matter of degree, with no clip that fails so: this much past the outermost good clip.
BEYOND_SHARE = 0.05

# What is checked, in this order: measurement, side, kind of the failure. The first one decides, so what makes later
# measurements meaningless comes first.
CHECKS = (
    ("saturation", "low", "unrecognisable"),
    ("hue_error", "high", "unrecognisable"),
    ("clutter", "high", "unrecognisable"),
    ("spread", "high", "unrecognisable"),
    ("saturation", "high", "beyond"),
    ("radius", "high", "beyond"),
    ("wall_light", "low", "beyond"),
    ("wall_light", "high", "beyond"),
    ("wall_contrast", "high", "beyond"),
    ("aspect_change", "high", "deforming"),
    ("area_change", "high", "deforming"),
    ("hue_change", "high", "deforming"),
    ("presence", "low", "vanishing"),
    ("radius", "low", "vanishing"),
    ("unsteadiness", "high", "jittering"),
    ("speed", "low", "frozen"),
    ("speed", "high", "beyond"),
    ("angle", "high", "wrong_direction"),
)
# Radius of the window around a shape, in radii of a disc of its area.
WINDOW = 2.2

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
        bound = bound_of(calibration["ranges"][name], side, kind)
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


def bound_of(values: Mapping[str, float], side: str, kind: str) -> float:
    """The outermost value of a measurement, on the side "low" or "high", that is no failure of this kind."""
    outermost = values[side]
    if kind == "beyond":
        return outermost * (1 + BEYOND_SHARE if side == "high" else 1 - BEYOND_SHARE)
    return outermost + FAILURE_SHARE * (values["fails"] - outermost)


@cache
def chroma_of_colors() -> dict[str, np.ndarray]:
    """What is left of each colour without its grey, RGB in [0, 1]."""
    return {name: (np.array(rgb) - np.mean(rgb)) / 255 for name, rgb in COLORS.items()}


@cache
def area_of_unit(shape: str) -> float:
    """Area of a shape of radius 1, measured on a fine grid."""
    axis = np.linspace(-1.2, 1.2, 601)
    inside = shape_distance(shape, axis[None, :], axis[:, None], 1.0) < 0
    return float(inside.sum() * (axis[1] - axis[0]) ** 2)


def smallest_angle() -> float:
    """Angle between the two colours that are nearest to each other."""
    return min(angle_between(*pair) for pair in combinations(chroma_of_colors().values(), 2))


def measure_video(frames: np.ndarray, caption: Caption) -> dict[str, float]:
    """All measurements of a clip but its radius, which depends on what shape it is."""
    if frames.ndim != 4 or frames.shape[0] < 5 or frames.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"`frames` must have the shape (5 or more, {SIZE}, {SIZE}, 3), got {frames.shape}.")
    pixels = frames / 255 if frames.dtype == np.uint8 else np.asarray(frames, dtype=float)
    chroma = pixels - pixels.mean(axis=-1, keepdims=True)
    chroma = chroma - np.median(chroma, axis=(1, 2), keepdims=True)  # a tint of everything is not the shape
    hue, strength = find_color(chroma)
    if strength == 0:
        return {"saturation": 0.0, "hue_error": np.nan}
    color, hue_error = nearest_color(hue)
    ideal = float(np.linalg.norm(chroma_of_colors()[color]))
    along = chroma @ hue
    along = np.where(along > 0.2 * strength, along, 0.0)  # faint stains of the wall are none of the shape
    cover = np.clip((along / strength - 0.25) / 0.5, 0, 1)
    by_frame = (cover[..., None] * chroma).sum(axis=(1, 2))
    return {
        "saturation": strength / ideal,
        "hue_error": hue_error,
        **measure_wall(pixels.mean(axis=-1), along),
        **measure_body(along / ideal, cover, np.array([angle_between(one, hue) for one in by_frame]), caption),
        **{f"hue_{axis}": float(value) for axis, value in zip("rgb", hue, strict=True)},
    }


def find_color(chroma: np.ndarray, num_frames: int = 4) -> tuple[np.ndarray, float]:
    """
    Direction and strength of the shape's colour.

    From the most coloured fiftieth of the pixels (half of the smallest shape) of the most coloured frames: a shape may
    be there for a few frames only.
    """
    length = np.linalg.norm(chroma, axis=-1)
    peak = np.sort(np.quantile(length, 0.98, axis=(1, 2)))[-num_frames:].mean()
    if peak < 1e-3:
        return np.zeros(3), 0.0
    core = chroma[length > 0.7 * peak]
    hue = core.mean(axis=0) / np.linalg.norm(core.mean(axis=0))
    return hue, max(float(np.median(core @ hue)), 0.0)


def nearest_color(hue: np.ndarray) -> tuple[str, float]:
    """Name of the nearest colour, and the angle to it in radians."""
    angles = {name: angle_between(hue, vector) for name, vector in chroma_of_colors().items()}
    name = min(angles, key=lambda key: angles[key])
    return name, angles[name]


def angle_between(one: np.ndarray, other: np.ndarray) -> float:
    """Angle between two vectors in radians; NaN if one has no length."""
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return float(np.arccos(np.clip(one @ other / lengths, -1, 1))) if lengths > 0 else np.nan


def measure_wall(light: np.ndarray, paint: np.ndarray) -> dict[str, float]:
    """Mean light of the wall, and the distance between its dark and its light places, both in [0, 1]."""
    wall = light[paint == 0]
    if wall.size == 0:
        return {}
    dark, bright = np.quantile(wall, [0.05, 0.95])
    return {"wall_light": float(wall.mean()), "wall_contrast": float(bright - dark)}


def measure_body(paint: np.ndarray, cover: np.ndarray, hues: np.ndarray, caption: Caption) -> dict[str, float]:
    """
    Follow the shape through the frames: how big, how shaped, where, and how steadily it is.

    Args:
        paint (`np.ndarray` of shape `(num_frames, SIZE, SIZE)`):
            How much colour a pixel has, 1 inside a perfect shape. Its sum is the area, however soft the edges are.
        cover (`np.ndarray` of shape `(num_frames, SIZE, SIZE)`):
            How much of a pixel is the shape's, its outline sharpened.
        hues (`np.ndarray` of shape `(num_frames,)`):
            Angle between the shape's colour in each frame and in all.
    """
    total = cover.sum(axis=(1, 2))
    # A shape that is fading has no outline to measure.
    there = total > 0.6 * np.quantile(total, 0.75)
    if there.sum() < 3:
        return {"presence": 0.0}
    times = np.flatnonzero(there)
    bodies, centres = zip(*(cut_out(cover[index]) for index in times), strict=True)
    moments = np.array([moments_of(body, centre) for body, centre in zip(bodies, centres, strict=True)])
    area, aspect, spread, skew, cross = moments.T
    painted = paint.sum(axis=(1, 2))
    usual = np.median(painted[times])
    return {
        "clutter": float(np.median(1 - area / total[times])),
        "spread": float(np.median(spread)),
        "presence": float(painted.min() / usual),
        "area": float(usual),
        "aspect_change": float(np.ptp(np.log(aspect))),
        "area_change": float(painted.max() / usual - 1),
        "hue_change": float(hues[times].max()),
        "skew": float(np.median(skew)),
        "cross": float(np.median(cross)),
        **measure_motion(times, np.array(centres), caption),
    }


def cut_out(cover: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One frame's shape without what lies far from it, and its centre (x, y)."""
    y, x = np.mgrid[: cover.shape[0], : cover.shape[1]] + 0.5
    # The median is where most of the shape is, whatever else has a colour.
    columns, rows = np.cumsum(cover.sum(axis=0)), np.cumsum(cover.sum(axis=1))
    middle = [np.searchsorted(sums, sums[-1] / 2) + 0.5 for sums in (columns, rows)]
    reach = WINDOW * np.sqrt(cover.sum() / np.pi)
    body = np.where(np.hypot(x - middle[0], y - middle[1]) < reach, cover, 0.0)
    return body, np.array([(body * x).sum(), (body * y).sum()]) / body.sum()


def moments_of(body: np.ndarray, centre: np.ndarray) -> tuple[float, ...]:
    """Area, width over height, spread (1 / 2 pi for a disc), skewness of y, and E[x^2 y^2] / (E[x^2] E[y^2])."""
    y, x = np.mgrid[: body.shape[0], : body.shape[1]] + 0.5
    x, y = x - centre[0], y - centre[1]
    area = body.sum()
    xx, yy, yyy, xxyy = ((body * product).sum() / area for product in (x**2, y**2, y**3, x**2 * y**2))
    xx, yy = max(xx, 1e-6), max(yy, 1e-6)
    return area, np.sqrt(xx / yy), (xx + yy) / area, yyy / yy**1.5, xxyy / (xx * yy)


def measure_motion(times: np.ndarray, centres: np.ndarray, caption: Caption) -> dict[str, float]:
    """Least-squares velocity, its angle to the caption's direction, and the distance of the path from a steady one."""
    line = np.polynomial.polynomial.polyfit(times, centres, 1)
    expected = np.polynomial.polynomial.polyval(times, line).T
    velocity = line[1]
    return {
        "speed": float(np.linalg.norm(velocity)),
        "angle": angle_between(velocity, np.array(DIRECTIONS[caption.direction], dtype=float)),
        "unsteadiness": float(np.sqrt(((centres - expected) ** 2).sum(axis=1).mean())),
    }


def recognise(
    measured: Mapping[str, float], shapes: Mapping[str, Mapping[str, float]]
) -> tuple[str | None, str | None]:
    """The shape whose skewness and cross moment are nearest, and the nearest colour; None where there is nothing."""
    color = None if "hue_r" not in measured else nearest_color(np.array([measured[f"hue_{axis}"] for axis in "rgb"]))[0]
    if "skew" not in measured:
        return None, color
    distance = {
        shape: np.hypot(measured["skew"] - typical["skew"], measured["cross"] - typical["cross"])
        for shape, typical in shapes.items()
    }
    return min(distance, key=lambda shape: distance[shape]), color


# What the mildest failure is where the world makes no such clips: no colour, half the way to another colour, all of it
# elsewhere, spread over the whole window, no size, the size of two, another colour.
FAILS = {
    "saturation": 0.0,
    "hue_error": smallest_angle() / 2,
    "clutter": 1.0,
    "spread": WINDOW**2 / (2 * np.pi),
    "radius": 0.0,
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
        ranges[name] = {"low": min(measured), "high": max(measured), "fails": fails.get(name)}
    typical = {
        shape: {
            name: float(np.median([values[name] for values in good if values["shape"] == shape]))
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
        write_json(CALIBRATION, json.loads(json.dumps(calibrate()), parse_float=lambda text: round(float(text), 4)))
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
